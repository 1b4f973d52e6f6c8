"""Ctrl-C while a command starts: status 130 and no traceback, from the first line of ours on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hpo.storage.interrupts import _hurry

COMMANDS = {"help": ("--help",), "status": ("status",), "launch": ("launch", "waves.toml", "--workers", "1")}

# Found and run by every Python that has its folder on the path. Sends itself a Ctrl-C when a module is looked for.
AT_AN_IMPORT = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
"""


def start(command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "hpo", *COMMANDS[command]]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("command", "module"),
    [
        *(("help", module) for module in ("hpo.cli", "typer", "hpo.doctor", "rich.console", "typer.rich_utils")),
        *(("status", module) for module in ("hpo.study.lifecycle", "optuna", "psycopg2", "hpo.terminal")),
        *(("launch", module) for module in ("hpo.launcher.supervision", "sqlalchemy", "numpy", "hpo.study.plan")),
    ],
)
def test_a_ctrl_c_at_an_import_ends_the_command(
    command: str, module: str, environment: dict[str, str], tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    study_file()
    (tmp_path / "sitecustomize").mkdir()
    (tmp_path / "sitecustomize/sitecustomize.py").write_text(AT_AN_IMPORT.format(module=module))
    paths = [str(tmp_path / "sitecustomize"), environment.get("PYTHONPATH", "")]
    given = environment | {"PYTHONPATH": ":".join(filter(None, paths)), "HPO_START": "spawn"}
    with start(command, tmp_path, given) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said


def test_a_signal_finds_a_client_library_that_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that hears of signals ended with an AttributeError."""
    monkeypatch.setitem(sys.modules, "hpo.storage.connection", ModuleType("hpo.storage.connection"))
    _hurry(0.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_ctrl_c_at_any_moment_shows_next_to_no_line_of_ours(
    command: str, environment: dict[str, str], tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    """Until the first lines of ours have run, Python itself may show a traceback; a command may also be through."""
    study_file(trials=200, epochs=50)
    for delay_ms in (*range(0, 200, 20), *range(200, 1001, 200)):
        with start(command, tmp_path, environment) as process:
            time.sleep(delay_ms / 1000)  # as people are: no moment is meant
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        ours = set(re.findall(r"hpo/\w[\w/]*\.py", said)) - {"hpo/__init__.py", "hpo/__main__.py"}
        assert not ours, f"after {delay_ms} ms: {said}"
        if "KeyboardInterrupt" not in said:  # of Python's own, with a traceback or without
            assert process.returncode in (130, 0, -signal.SIGINT), f"after {delay_ms} ms: {process.returncode}, {said}"
