"""The heartbeat of a lease: it says how far the training is, and learns whether the trial may go on.

One thread renews all leases that a process holds, in one round trip.
"""

from __future__ import annotations

import contextvars
import threading
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
    """What a lease's renewals tell and learn while `Leases.take` holds it.

    The lease's owner sets `progress` to what tells how far the training is; it is called at each renewal. The flags
    only ever become true.
    """

    def __init__(self) -> None:
        self.progress: Callable[[], Progress] = lambda: Progress(0)
        self._lost = self._study_stopped = self._out_of_time = False
        self._renewals: Renewals | None = None

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

        False at once where the lease is not renewed.
        """
        return self._renewals is not None and self._renewals.wait_for_rounds(count, timeout_s)

    def learn(self, *, lost: bool, study_stopped: bool, out_of_time: bool) -> None:
        """Keep what a renewal has returned."""
        self._lost = self._lost or lost
        self._study_stopped = self._study_stopped or study_stopped
        self._out_of_time = self._out_of_time or out_of_time

    def renewed_by(self, renewals: Renewals) -> None:
        """The lease is renewed from now on."""
        self._renewals = renewals


class Renewals:
    """Calls `renew` often enough for every lease that is held, from one thread while there are any."""

    def __init__(self, renew: Callable[[], object]) -> None:
        self._renew = renew
        self._lock = threading.Lock()
        self._intervals: list[float] = []  # one for each lease that is held
        self._loop: BackgroundLoop | None = None
        self._interval_s = 0.0  # of the loop

    @contextmanager
    def holding(self, lease_s: float) -> Iterator[None]:
        """Renew while the block runs, often enough for a lease of `lease_s` seconds. Raises WorkerFault where no thread
        can be started."""
        interval_s = min(lease_s / BEATS, BEAT_S)
        with self._lock:
            if self._loop is None or interval_s < self._interval_s:
                self._start(interval_s)
            self._intervals.append(interval_s)
        try:
            yield
        finally:
            with self._lock:
                self._intervals.remove(interval_s)
                if not self._intervals:
                    self._stop()

    def wait_for_rounds(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` more renewals have ended, failed ones too; False after `timeout_s` seconds."""
        loop = self._loop
        return loop is not None and loop.wait_for_rounds(count, timeout_s)

    def _start(self, interval_s: float) -> None:
        loop = contextvars.Context().run(
            BackgroundLoop,
            self._renew,
            interval_s,
            name="hpo-heartbeat",
            failure="leases could not be renewed",
            expected=(PostgresError,),
        )
        loop.start()
        self._stop()
        self._loop, self._interval_s = loop, interval_s

    def _stop(self) -> None:
        if self._loop is not None:
            self._loop.stop()
        self._loop = None
