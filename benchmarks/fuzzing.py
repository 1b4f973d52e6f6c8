"""What the fuzzers of this folder share: each input is tried in a child process whose memory and time are measured.

A fuzzer is a script with `attempt(seed, folder) -> Trial`. `main` starts `SCRIPT --serve` as a child, gives it seeds,
and starts another one where it dies or takes longer than KILL_S. A failure is whatever a user must not meet:

- an exception that is no HpoError, or one whose message is not one short line (MOST characters, nothing that controls a
  terminal); a warning, a line on standard error, or a line of the log of that kind
- more than SLOW_S seconds of the processor, or KILL_S of the clock; the death of the process
- more memory than the trial says is allowed: the largest resident size of the process less that before (Linux only)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SLOW_S = 20.0  # of the processor, as the machine may be busy
KILL_S = 300.0  # of the clock, the start of a child included
MOST = 1_100  # characters of a message
ADDRESSES = (
    6 * 2**30
)  # bytes of addresses that a child may have beyond those of its start; the machine is saved from more
MIB = 2**20


@dataclass
class Trial:
    """One input: what a user does with it, and the bytes that this may take beside what the process has."""

    run: Callable[[], None]
    allowed: int
    size: int  # bytes of the input, for the peak factor


def one_line(text: str, most: int = MOST) -> bool:
    """Whether a terminal shows the text as one short line, and can be told nothing by it."""
    kinds = set(map(unicodedata.category, text))
    return 0 < len(text) < most and not kinds & {"Cc", "Cs", "Zl", "Zp"} and not set(text) & set(TURNS)


TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # these show what follows in another order


@contextmanager
def _logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hpo")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def outcome_of(trial: Trial) -> tuple[str | None, int]:
    """None for an accepted input, "" for one that is refused in order, else what is wrong; and the bytes it took."""
    from hpo.errors import HpoError

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _memory("VmRSS"), time.process_time()
    with warnings.catch_warnings(record=True) as warned, _logged() as lines:
        warnings.simplefilter("always")
        outcome: str | None = None
        try:
            trial.run()
        except HpoError as error:
            outcome = "" if one_line(str(error)) else f"not one line: {_where(error)}"
            if "does not fit into the memory" in str(error):
                outcome = _where(error)
        except Exception as error:
            outcome = _where(error)
    seconds, grew = time.process_time() - began, _memory("VmHWM") - before
    if not outcome and warned:
        outcome = f"{warned[0].category.__name__} in {Path(warned[0].filename).name}: {str(warned[0].message)[:80]}"
    if not outcome and (odd := [line for line in lines if not one_line(line)]):
        outcome = f"not one line in the log: {odd[0][-80:]!r}"
    if not outcome and seconds > SLOW_S:
        outcome = f"it took more than {SLOW_S:g} s"
    if not outcome and grew > trial.allowed:
        outcome = "more memory than is allowed"
        print(f"{grew / MIB:.0f} MiB, allowed {trial.allowed / MIB:.0f}", file=sys.stderr)
    return outcome, grew


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if "site-packages" not in each.filename and "/lib/python" not in each.filename][-1]
    text = str(error).splitlines()[0][-80:] if str(error) else ""
    inner = f" ({Path(frames[-1].filename).name})" if frames[-1] is not ours else ""
    return f"{type(error).__name__} in {Path(ours.filename).name}:{ours.lineno}{inner}: {text}"


def _serve(attempt: Callable[[int, Path], Trial]) -> None:
    """Try the seeds that come on standard input; an outcome a line goes to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    addresses = _memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    noise = sys.stderr.fileno()
    with tempfile.TemporaryDirectory() as top:
        for line in sys.stdin:
            folder = Path(top) / "input"
            folder.mkdir()
            trial = attempt(int(line), folder)
            began, said = time.process_time(), os.fstat(noise).st_size
            outcome, grew = outcome_of(trial)
            if not outcome and os.fstat(noise).st_size > said:
                outcome = "something on standard error"
            answer = {"outcome": outcome, "grew": grew, "size": trial.size, "allowed": trial.allowed}
            print(json.dumps(answer | {"seconds": time.process_time() - began}), file=answers, flush=True)
            shutil.rmtree(folder)


class _Child:
    """A process that serves; a new one where the last has died."""

    def __init__(self, script: str) -> None:
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, script, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
        )

    def ask(self, seed: int) -> dict[str, Any] | str:
        """The answer, or how the process ended."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        print(seed, file=to, flush=True)
        if not select.select([back], [], [], KILL_S)[0]:
            self.close()
            return f"it took more than {KILL_S:g} s"
        if line := back.readline():
            return dict(json.loads(line))
        self._noise.seek(0)
        last = (self._noise.read().strip().splitlines() or [""])[-1]
        return f"the process ended with status {self._process.wait()}: {last[:200]}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Tally:
    """What came of the inputs."""

    accepted: int = 0
    refused: int = 0
    failures: dict[str, list[int]] = field(default_factory=dict)  # kind -> seeds
    slowest: tuple[float, int] = (0.0, 0)  # seconds, seed
    most: tuple[int, int] = (0, 0)  # bytes, seed
    nearest: tuple[float, int] = (0.0, 0)  # of what is allowed, seed

    def add(self, seed: int, answer: dict[str, Any] | str) -> str | None:
        outcome = answer if isinstance(answer, str) else answer["outcome"]
        if isinstance(answer, dict):
            self.slowest = max(self.slowest, (answer["seconds"], seed))
            self.most = max(self.most, (answer["grew"], seed))
            self.nearest = max(self.nearest, (answer["grew"] / answer["allowed"], seed))
        if outcome is None:
            self.accepted += 1
        elif not outcome:
            self.refused += 1
        else:
            self.failures.setdefault(outcome, []).append(seed)
        return outcome

    def __str__(self) -> str:
        failed = sum(map(len, self.failures.values()))
        tried = self.accepted + self.refused + failed
        lines = [
            f"{tried} inputs: {self.accepted} accepted, {self.refused} refused, {failed} "
            f"failures of {len(self.failures)} kinds; slowest {self.slowest[0]:.1f} s (seed {self.slowest[1]}), most "
            f"memory {self.most[0] / MIB:.0f} MiB (seed {self.most[1]}), at most {self.nearest[0]:.0%} of what is "
            f"allowed (seed {self.nearest[1]})"
        ]
        return "\n".join(
            lines + [f"{len(seeds):5} x {kind} (seed {seeds[0]})" for kind, seeds in self.failures.items()]
        )


def main(script: str, description: str | None, attempt: Callable[[int, Path], Trial]) -> None:
    """The command line of a fuzzer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the others follow")
    parser.add_argument("--only", type=int, help="try the input of this seed alone, and show its traceback")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of the failures")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        _serve(attempt)
        return
    if given.only is not None:
        folder = given.keep or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        trial = attempt(given.only, folder)
        print(f"in {folder}: {[(str(path.relative_to(folder)), _size(path)) for path in sorted(folder.rglob('*'))]}")
        print(*outcome_of(trial))
        trial.run()
        return
    end, tally, child = time.monotonic() + 60 * given.minutes, Tally(), _Child(script)
    for seed in range(given.seed, given.seed + given.inputs):
        if time.monotonic() > end:
            break
        answer = child.ask(seed)
        outcome = tally.add(seed, answer)
        if isinstance(answer, str):
            child.close()
            child = _Child(script)
        if outcome and len(tally.failures[outcome]) == 1:
            print(f"seed {seed}: {outcome}", flush=True)
            if given.keep is not None:
                shutil.rmtree(given.keep / str(seed), ignore_errors=True)
                (given.keep / str(seed)).mkdir(parents=True)
                attempt(seed, given.keep / str(seed))
    child.close()
    print(tally)
    sys.exit(bool(tally.failures))


def _size(path: Path) -> int:
    return path.lstat().st_size
