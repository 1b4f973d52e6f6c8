"""The program `hpo`, also as `python -m hpo`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run a command. From here on a Ctrl-C ends it with status 130 and no traceback, unless it is told to ignore it.

    What Python does before its first line (some hundredths of a second) is out of reach.
    """
    interruptible = _raises()
    if interruptible:  # while it imports, it ends at once: an import may do anything with an exception
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from hpo.cli import main as run

    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if _raises():  # the command is over: nothing is left to tell
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _raises() -> bool:
    """Whether a Ctrl-C raises KeyboardInterrupt, as nobody has decided otherwise."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


if __name__ == "__main__":
    main()
