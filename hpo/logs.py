"""What processes that stay write to their standard error: lines of text, or of JSON for whoever collects them."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from hpo.errors import HpoError
from hpo.storage.masking import mask, unmasked

log = logging.getLogger("hpo")

FORMATS = ("text", "json")
TEXT, TIME = "%(asctime)s %(process)d %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"

_about: ContextVar[Mapping[str, Any]] = ContextVar("_about", default=MappingProxyType({}))


class LogError(HpoError):
    """HPO_LOG_FORMAT is no format."""


@contextmanager
def about(**known: Any) -> Iterator[None]:
    """Lines of JSON that are logged in the block say this, too: the study, the trial, the request."""
    earlier = _about.set({**_about.get(), **known})
    try:
        yield
    finally:
        _about.reset(earlier)


class JsonLines(logging.Formatter):
    """A JSON object a line, without a secret in any of its texts."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **_about.get(),
            **getattr(record, "fields", {}),  # given as extra={"fields": …}
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: mask(item) if isinstance(item, str) else item for name, item in found.items()})


def wanted_format() -> str:
    """HPO_LOG_FORMAT. Raises LogError."""
    wanted = os.environ.get("HPO_LOG_FORMAT") or "text"
    if wanted not in FORMATS:
        raise LogError(f"HPO_LOG_FORMAT must be one of {', '.join(FORMATS)}, got {wanted!r}")
    return wanted


def set_up() -> None:
    """Log to the standard error as HPO_LOG_FORMAT says; in JSON, what libraries log, warnings and tracebacks are, too.

    Raises LogError.
    """
    json_lines = wanted_format() == "json"
    # What is masked as a whole line may be no JSON any more.
    handler = logging.StreamHandler(unmasked(sys.stderr) if json_lines else sys.stderr)
    handler.setFormatter(JsonLines() if json_lines else logging.Formatter(TEXT, TIME))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if json_lines:
        logging.captureWarnings(True)
        optuna = logging.getLogger("optuna")  # it has a handler of its own, if it was imported
        optuna.handlers.clear()
        optuna.propagate = True
        sys.excepthook = lambda _, error, __: say_defect(error)
        threading.excepthook = lambda given: say_defect(given.exc_value)


def say_error(text: str) -> None:
    """The one line of an error that ends the process."""
    if _logs_json():
        log.error("%s", text)
    elif sys.stderr is not None:
        sys.stderr.write(f"hpo: {text}\n")


def say_defect(error: BaseException | None) -> None:
    """The traceback of an error that is no HpoError."""
    if _logs_json():
        log.critical("ended by an error that nobody foresaw", exc_info=error)
    elif error is not None:
        sys.__excepthook__(type(error), error, error.__traceback__)


def _logs_json() -> bool:
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)
