"""Who may use a device's memory: trials share it, or one that did not fit beside the others has it alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpo.models.training.training import TrainingInterrupted

LOOK_S = 0.2  # between two looks at whether waiting is still wanted


class SharedExclusiveLock:
    """Held by many threads at once, or by one of these exclusively, which goes before those that still wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = 0
        self._exclusive = 0  # that wait to be exclusive, or are
        self._taken = False

    @contextmanager
    def shared(self, give_up: Callable[[], bool]) -> Iterator[None]:
        """Hold it beside others, after those that wait for it alone.

        Raises TrainingInterrupted when `give_up()` is true while it waits.
        """
        with self._changed:
            self._wait(lambda: self._exclusive == 0, give_up)
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self, give_up: Callable[[], bool]) -> Iterator[None]:
        """Within `shared`: wait until the others have let go of it; nobody else gets it until the block ends."""
        with self._changed:
            self._holders -= 1
            self._exclusive += 1
            self._changed.notify_all()
            try:
                self._wait(lambda: self._holders == 0 and not self._taken, give_up)
            except TrainingInterrupted:
                self._exclusive -= 1
                raise
            finally:
                self._holders += 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._exclusive -= 1
                self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], give_up: Callable[[], bool]) -> None:
        while not ready():
            if give_up():
                raise TrainingInterrupted
            self._changed.wait(LOOK_S)
