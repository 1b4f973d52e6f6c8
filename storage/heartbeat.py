"""The heartbeat of a lease: it says how far the training is, and learns whether the trial may go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hpo.storage.background import BackgroundLoop
from hpo.storage.errors import PostgresError

BEATS = 4  # renewals within the time of a lease …
BEAT_S = 2.0  # … and at least one in so long: a renewal also returns whether the study was stopped


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    progress: int  # batches, ever growing
    epoch: int | None = None
    metric: float | None = None


class Heartbeat:
    """Renews a lease from a thread of its own while `Leases.take` holds it.

    The lease's owner sets `progress` to what tells how far the training is; the thread calls it at each renewal. The
    flags only ever become true.
    """

    def __init__(self) -> None:
        self.progress: Callable[[], Progress] = lambda: Progress(0)
        self._lost = self._study_stopped = self._out_of_time = False
        self._loop: BackgroundLoop | None = None

    @property
    def lost(self) -> bool:
        """Whether the lease is lost: another worker goes on with the trial, or nobody."""
        return self._lost

    @property
    def study_stopped(self) -> bool:
        """Whether somebody stopped the study."""
        return self._study_stopped

    @property
    def out_of_time(self) -> bool:
        """Whether the study's wall-clock budget is spent."""
        return self._out_of_time

    def wait_for_rounds(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` more renewals have ended, failed ones too; False after `timeout_s` seconds.

        False at once where the heartbeat does not run.
        """
        return self._loop is not None and self._loop.wait_for_rounds(count, timeout_s)

    def learn(self, *, lost: bool, study_stopped: bool, out_of_time: bool) -> None:
        """Keep what a renewal has returned."""
        self._lost = self._lost or lost
        self._study_stopped = self._study_stopped or study_stopped
        self._out_of_time = self._out_of_time or out_of_time

    @contextmanager
    def running(self, renew: Callable[[], object], lease_s: float, number: int) -> Iterator[None]:
        """Call `renew` while the block runs, often enough for a lease of `lease_s` seconds on trial `number`."""
        loop = BackgroundLoop(
            renew,
            min(lease_s / BEATS, BEAT_S),
            name="hpo-heartbeat",
            failure=f"the lease of trial {number} could not be renewed",
            expected=(PostgresError,),
        )
        with loop:
            self._loop = loop
            yield
