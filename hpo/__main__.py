"""The program `hpo`, also as `python -m hpo`."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 130  # exit status
STARTS = ("hpo.__main__", "__main__", "hpo.cli", "hpo.launcher.launch")  # what these import, before anything has begun


def main() -> None:
    """Run a command. From here on a Ctrl-C ends it with status 130 and no traceback, unless it is told to ignore it.

    What Python does before its first line (some hundredths of a second) is out of reach.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from hpo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:  # the command is over: nothing is left to tell
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """End at once while a command imports what it needs: what is imported may swallow a KeyboardInterrupt, and then the
    command goes on as if nobody had pressed a key. Else raise it.
    """
    importing = False
    while frame is not None:
        if importing and frame.f_globals.get("__name__") in STARTS:
            os._exit(INTERRUPTED)
        importing = frame.f_code.co_filename.startswith("<frozen importlib") or (importing and not _ours(frame))
        frame = frame.f_back
    raise KeyboardInterrupt


def _ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("hpo")


if __name__ == "__main__":
    main()
