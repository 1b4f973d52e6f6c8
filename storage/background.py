"""The one class of background loops."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from hpo.errors import WorkerFault

log = logging.getLogger(__name__)


class BackgroundLoop:
    """Calls a function every `interval_s` seconds, first after one interval, in a daemon thread.

    An exception does not end the loop. It is logged after the words `failure`: one of the `expected` kinds in a line,
    any other with its traceback. A context manager: the loop runs while the block does.
    """

    def __init__(
        self,
        function: Callable[[], object],
        interval_s: float,
        *,
        name: str,
        failure: str,
        expected: tuple[type[Exception], ...] = (),
    ) -> None:
        self._function, self._interval_s, self._failure, self._expected = function, interval_s, failure, expected
        self._stopped = threading.Event()
        self._ended = threading.Condition()  # notified after each round
        self._rounds = 0
        context = contextvars.copy_context()  # what the log says of its maker, it says of the loop
        self._thread = threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True)

    def start(self) -> None:
        """Begin; once only. Raises WorkerFault where the process can have no thread more."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise WorkerFault(
                f"the thread {self._thread.name} could not be started ({error}): this process has used up the memory "
                f"or the number of processes that it may have (ulimit -v, ulimit -u); fewer slots or workers need less"
            ) from error

    def stop(self, timeout_s: float | None = None) -> None:
        """End the loop, and wait for the round that it is in; no longer than `timeout_s`."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def wait_for_rounds(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` rounds more have ended, failed ones too; False when that takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._ended:
            wanted = self._rounds + count
            return self._ended.wait_for(lambda: self._rounds >= wanted, deadline - time.monotonic())

    def __enter__(self) -> BackgroundLoop:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._function()
            except self._expected as error:
                log.warning("%s: %s", self._failure, error)
            except Exception:
                log.exception("%s", self._failure)
            with self._ended:
                self._rounds += 1
                self._ended.notify_all()
