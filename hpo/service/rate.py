"""How often an owner may write: one script in a loop leaves the database to the others."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_OWNERS = 4096  # that are remembered


class Rate:
    """At most `most` calls a minute of each owner in this process, and as many at once after a minute without any."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()  # owner -> calls not forgotten yet, when
        self._lock = threading.Lock()

    def wait_s(self, owner: str) -> int:
        """Count a call. Seconds after which there is room for it, where it is one too many and not counted; else 0."""
        now, each_s = self._clock(), 60 / self.most
        with self._lock:
            count, at = self._spent.pop(owner, (0.0, now))
            count = max(0.0, count - (now - at) / each_s)
            allowed = count <= self.most - 1
            self._spent[owner] = (count + allowed, now)
            while len(self._spent) > MOST_OWNERS:
                self._spent.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((count - self.most + 1) * each_s))
