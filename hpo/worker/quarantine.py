"""Studies that a standing worker cannot work on: set aside with a growing pause, while it serves the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hpo.errors import StudyFault
from hpo.storage.url import mask

log = logging.getLogger("hpo")

PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0  # until a study is tried again, doubling
FAULTS = (StudyFault, OSError)  # what makes one study unworkable and others not


@dataclass(frozen=True)
class _Fault:
    message: str
    pause_s: float
    until: float  # by the monotonic clock


class Quarantine:
    """The studies that are set aside, by name."""

    def __init__(self) -> None:
        self._faults: dict[str, _Fault] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the study's pause lasts."""
        return name in self._faults and self._faults[name].until > time.monotonic()

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """A fault of the study in the block does not go on: it is logged once, and the study is set aside."""
        try:
            yield
        except FAULTS as error:
            earlier = self._faults.get(name)
            pause_s = PAUSE_S if earlier is None else min(2 * earlier.pause_s, LONGEST_PAUSE_S)
            if earlier is None or earlier.message != str(error):
                log.warning("study %s is set aside: %s", name, mask(str(error)))
            self._faults[name] = _Fault(str(error), pause_s, time.monotonic() + pause_s)

    def release(self, name: str) -> None:
        """The study could be worked on again."""
        self._faults.pop(name, None)
