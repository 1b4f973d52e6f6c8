"""What a study's workers are to the launcher that waits for them, wherever they run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

from hpo.errors import HpoError
from hpo.storage.masking import mask

RESTARTS = 5  # of one worker that ends with an error again and again, before it is left alone
PAUSE_S = 1.0  # before the first restart of a worker, twice as long before each further one
STOP_S = 30.0  # that workers have to finish a batch and give their trial back


class LaunchError(HpoError):
    """The workers cannot go on, or the study ended without a model."""


class Interrupted(HpoError):
    """Asked to stop: trials in flight were given back, the next launch goes on with them."""

    exit_status = 130


class Workers(Protocol):
    """A context manager: leaving it ends those that still run."""

    where_logs_are: str  # for an error

    def __enter__(self) -> Workers: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def tend(self) -> None:
        """Start those again that ended with an error. Raises LaunchError when none is left that could go on."""

    def running(self) -> bool:
        """Whether some run, or will again."""

    def rest(self, timeout_s: float) -> None:
        """Wait, at most until a worker begins or ends."""

    def stop(self) -> None:
        """Ask all to finish a batch and give their trial back; end those that have not after STOP_S."""


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, masked: not all that is in it went through our standard error."""
    return mask("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]))
