"""The native code reads and writes only what is its own: trainings of many shapes under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.models.kernel import native
from tests.unit.sanitized import EDGES, MANY

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def built(folder: Path, source: Path) -> Path:
    """The library of the C files in `source`, with sanitizers."""
    library = folder / "sanitized.so"
    files = [str(path) for path in sorted(source.glob("*.c"))]
    command = ["gcc", "-std=gnu11", *SANITIZERS, *native.MACHINE, *native.ARITHMETIC, "-shared", "-fPIC", *files]
    subprocess.run([*command, "-lm", "-o", str(library)], check=True)
    return library


def preload() -> str:
    """AddressSanitizer's library, which has to be there before any other is loaded."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip("gcc has no AddressSanitizer here")
    return path


def trained(library: Path, preloaded: str) -> subprocess.CompletedProcess[str]:
    options = "detect_leaks=0:allocator_may_return_null=1"
    environment = {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": options, "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-m", "tests.unit.sanitized", str(library)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_no_access_is_out_of_bounds_and_nothing_is_undefined(tmp_path: Path) -> None:
    preloaded = preload()
    done = trained(built(tmp_path, native.SOURCES[0].parent), preloaded)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(EDGES) + MANY


def test_the_sanitizer_would_see_a_step_too_far(tmp_path: Path) -> None:
    """That the test above can fail: with one number too many in a loop, it does."""
    preloaded = preload()
    shutil.copytree(native.SOURCES[0].parent, tmp_path / "kernel")
    wrong = tmp_path / "kernel" / "stem.c"
    text = wrong.read_text()
    assert "l->padded = take(memory, 4 * l->B * padded_sequence(l));" in text
    wrong.write_text(text.replace("4 * l->B * padded_sequence(l)", "4 * l->B * padded_sequence(l) - 4"))
    done = trained(built(tmp_path, tmp_path / "kernel"), preloaded)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
