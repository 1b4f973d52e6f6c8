"""SIGTERM and SIGINT to a worker: its slots are asked to stop, and the process ends soon, whatever it hangs in."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Protocol

from hpo.storage.interrupts import SignalThread

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

    A thread of its own receives them. What is not given back by then is given back there.
    """

    def __init__(self) -> None:
        self.received = False
        self.stop_requested = threading.Event()  # by a signal, or by a slot that ended with an error
        self.worker: Stoppable | None = None  # once there is one
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # with a handler, so that the thread hears of it
        SignalThread(self._end)

    def _end(self) -> None:
        self.received = True
        self.stop_requested.set()
        if self.worker is not None:
            self.worker.shorten_retries()
            time.sleep(END_S)
            log.warning("ended by a signal in the middle of its work")
            last = threading.Thread(target=self.worker.give_back, daemon=True)
            last.start()
            last.join(GIVE_BACK_S)
        os._exit(0)
