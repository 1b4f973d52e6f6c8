"""SIGTERM and SIGINT to a worker: its slots are asked to stop, and the process ends soon, whatever it hangs in."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Protocol

log = logging.getLogger("hpo")

END_S = 6.0  # after a signal a worker ends, whatever it hangs in …
GIVE_BACK_S = 1.5  # … and tries for so long to give back what it holds


class Stoppable(Protocol):
    """What a worker must be able to do when a signal arrives."""

    def shorten_retries(self) -> None:
        """Wait no longer for a database that is away."""

    def give_back(self) -> None:
        """Give back all leases, over a connection of its own."""


class StopSignals:
    """Sets `stop_requested` at the first signal, and ends the process END_S later with status 0.

    A thread of its own receives them, through the interpreter's wake-up pipe: the main thread runs no handler while it
    is in C, waiting for a database that does not answer, say. What is not given back by then is given back here.
    """

    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.worker: Stoppable | None = None  # once there is one
        self._received, waker = os.pipe()
        os.set_blocking(waker, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # with a handler, so that the pipe is written to
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        threading.Thread(target=self._end, name="signals", daemon=True).start()

    def _end(self) -> None:
        os.read(self._received, 1)
        self.stop_requested.set()
        if self.worker is not None:
            self.worker.shorten_retries()
            time.sleep(END_S)
            log.warning("ended by a signal in the middle of its work")
            last = threading.Thread(target=self.worker.give_back, daemon=True)
            last.start()
            last.join(GIVE_BACK_S)
        os._exit(0)
