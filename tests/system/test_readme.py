"""The README is run: its commands as they stand, its study file, its Python, its tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.study.config import load
from hpo.study.space import PARAMETERS
from tests.conftest import Cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
QUICK = ["--set", "train.epochs=2", "--set", "study.trials=3", "--set", "space.hidden_size=8"]  # not the full study


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[list[str]]:
    """Every `hpo …` line of the shell blocks, in order."""
    lines = (shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines())
    return [line for line in lines if line and line[0] == "hpo"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the examples, as a reader's checkout has them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_every_command_runs_in_the_order_of_the_readme(cli: Cli, checkout: Path) -> None:
    assert len(commands()) > 10
    for _, name, *rest in commands():
        arguments = [argument for argument in rest if argument not in ("--trials", "50")]
        done = cli(name, *arguments, *(QUICK if name == "launch" else []), cwd=checkout)
        assert done.returncode == 0, f"hpo {name} {rest}: {done.stderr}"


def test_the_make_targets_of_the_readme_exist() -> None:
    wanted = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert wanted == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in wanted)


def test_the_study_file_is_valid_and_every_entry_of_the_space_is_named(checkout: Path) -> None:
    (text,) = blocks("toml")
    path = ROOT / "examples" / "readme.toml"
    file = checkout / "study.toml"
    file.write_text(text.replace('"data/', f'"{path.parent}/data/'))
    config = load(file)
    assert config.study.timeout_s == 1800
    assert len(config.enqueue) == 1
    assert all(f"`{name}`" in README for name in PARAMETERS)


def test_the_python_examples_run(environment: dict[str, str], checkout: Path) -> None:
    printed = []
    for code in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout.split()
    assert float(printed[0]) > 0.4


def test_the_tree_in_the_readme_is_the_tree() -> None:
    block = next(block for block in blocks("") if block.startswith("hpo/"))
    named = [line.split()[0].rstrip("/") for line in block.splitlines()]
    assert all((ROOT / name).exists() for name in named)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    assert folders <= set(named)


def test_every_file_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sql|c))`", text))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(named) > 50
    assert [name for name in sorted(named) if not any(f"/{path}".endswith(f"/{name}") for path in tracked)] == []
