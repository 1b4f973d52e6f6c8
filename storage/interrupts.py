"""A signal is noticed at any moment, also while the main thread waits in C for a database that does not answer.

Python runs its handlers in the main thread, once that is back from C. A thread that reads the interpreter's wake-up
pipe hears of a signal at once, and can end what the main thread waits for.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SignalThread:
    """Calls a function in a thread of its own after each SIGINT or SIGTERM that has a handler in Python.

    To be made in the main thread; one at a time hears of signals, the last one made.
    """

    def __init__(self, heard: Callable[[], object]) -> None:
        self._heard = heard
        self._pipe, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._earlier = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """End the thread, and leave the pipe to whoever had it before."""
        signal.set_wakeup_fd(self._earlier, warn_on_full_buffer=False)
        os.close(self._waker)

    def _listen(self) -> None:
        while numbers := os.read(self._pipe, 16):
            if {signal.SIGINT, signal.SIGTERM} & set(numbers):
                self._heard()
        os.close(self._pipe)


@contextmanager
def calls_end_with_a_signal(seconds: float) -> Iterator[None]:
    """Within the block a signal leaves every call to a database no more than so many seconds (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    thread = SignalThread(lambda: _hurry(seconds))
    try:
        yield
    finally:
        thread.close()


def _hurry(seconds: float) -> None:
    connection = sys.modules.get("hpo.storage.connection")
    if connection is not None and hasattr(
        connection, "hurry_all"
    ):  # else the client library is not loaded, or not whole, and waits for nothing
        connection.hurry_all(seconds)
