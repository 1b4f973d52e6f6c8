"""What a worker logs of the trial in hand, kept for its page, with a line for each epoch that no other log has."""

from __future__ import annotations

import csv
import io
import logging
import threading
import time
from collections import deque

from hpo.storage.url import mask

ROWS = 200  # the last so many are kept

_thread = threading.local()  # a slot's trial and what is said of it stay in one thread


class _Keeper(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _keep(record.created, record.levelname, mask(self.format(record)))


_keeper = _Keeper()


def begin() -> None:
    """Forget the trial before, and keep what this thread logs from now on."""
    logging.getLogger("hpo").addHandler(_keeper)  # once, however often it is called
    _thread.rows = deque(maxlen=ROWS)


def note(message: str) -> None:
    """A row that goes to no other log."""
    _keep(time.time(), "DEBUG", message)


def written() -> bytes:
    """The rows as CSV (time, level, message): the dashboard shows a table of them."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("time", "level", "message"))
    for moment, level, message in getattr(_thread, "rows", ()):
        rows.writerow((time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)), level, message))
    return text.getvalue().encode()


def _keep(moment: float, level: str, message: str) -> None:
    if (rows := getattr(_thread, "rows", None)) is not None:
        rows.append((moment, level, message))
