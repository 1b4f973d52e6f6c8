"""Data larger than what a process may hold for itself: the same bits, in pieces and mapped from files."""

from __future__ import annotations

import gzip
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as serialized

from hpo.models.data import buffers, canonical
from hpo.models.data.order import in_order
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.kernel.native import Kernel
from hpo.study.config import load
from hpo.study.plan import make_plan
from hpo.study.readout import readout, suspicions
from tests.unit.test_training import AUGMENTED, CONVOLUTIONS, MASKED, kernel, run, sequences, training

__all__ = ["kernel"]

N, T, F = 60, 9, 3


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """small_pieces() makes an array of more than 200 bytes a large one, and looks at 700 of it at a time."""

    def begin() -> None:
        monkeypatch.setattr(buffers, "IN_MEMORY", 200)
        monkeypatch.setattr(buffers, "PIECE", 700)

    return begin


def arrays() -> dict[str, Any]:
    """Sequences of unequal lengths at unequal times with gaps, an offset, a feature that some lack, groups, times and
    weights; some are alike, some in the first columns, as they begin with zeros."""
    random = np.random.default_rng(0)
    X = random.normal(size=(N, T, F)) + np.array([0, 300, 0])
    X[random.random(X.shape) < 0.1] = np.nan
    X[:20, :4] = 0
    X[::7, :, 2] = np.nan
    X[40:50] = X[30:40]
    steps = np.cumsum(random.uniform(1, 3, (N, T)), axis=1)
    lengths = random.integers(5, T + 1, N)
    lengths[40:50] = lengths[30:40]
    steps[40:50] = steps[30:40]
    y, groups = np.array(["a", "b", "c"])[np.arange(N) % 3], np.arange(N) // 2
    beside = {"groups": groups, "time": np.arange(N), "weight": 1.0 + (y == "a")}
    return {"X": X, "y": y, "lengths": lengths, "steps": steps, **beside}


def whole() -> dict[str, Any]:
    """Neither gaps nor padding."""
    return {"X": np.random.default_rng(0).normal(size=(N, T, F)).astype(np.float32), "y": np.arange(N) % 2}


def even() -> dict[str, Any]:
    """Steps at equal distances, in an order of memory that is not the usual one."""
    found = whole()
    return {**found, "X": np.asfortranarray(found["X"]), "steps": np.arange(T) * 5.0 + np.zeros((N, 1))}


def write_npz(folder: Path, content: dict[str, Any]) -> Path:
    np.savez(folder / "data.npz", **content)
    return folder / "data.npz"


def write_compressed(folder: Path, content: dict[str, Any]) -> Path:
    np.savez_compressed(folder / "data.npz", **content)
    return folder / "data.npz"


def write_csv(folder: Path, content: dict[str, Any]) -> Path:
    """In long form, the rows in any order."""
    lines = [
        f"s{i},{step},{content['y'][i]}," + ",".join("" if np.isnan(value) else repr(float(value)) for value in row)
        for i, sequence in enumerate(content["X"])
        for step, row in enumerate(sequence)
        if step < content.get("lengths", np.full(N, T))[i]
    ]
    order = np.random.default_rng(0).permutation(len(lines)).tolist()
    header = ",".join(["id", "step", "label", *(f"f{f}" for f in range(F))])
    (folder / "data.csv").write_text("\n".join([header, *(lines[i] for i in order)]) + "\n")
    return folder / "data.csv"


def write_gz(folder: Path, content: dict[str, Any]) -> Path:
    path = write_csv(folder, content)
    (folder / "data.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder / "data.csv.gz"


def write_parquet(folder: Path, content: dict[str, Any]) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.read_csv(write_csv(folder, content)).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("content", [arrays, whole, even])
@pytest.mark.parametrize("write", [write_npz, write_compressed, write_csv, write_gz, write_parquet])
def test_a_study_of_large_data_is_that_of_the_same_data_in_memory(
    write: Callable[[Path, dict[str, Any]], Path],
    content: Callable[[], dict[str, Any]],
    small_pieces: Callable[[], None],
    tmp_path: Path,
) -> None:
    given = content()
    path, more = write(tmp_path, given), []
    if path.suffix == ".npz" and "time" in given:
        more = ["data.time=recorded", "data.weight=reliability", "data.validation=0.3"]
    config = load(path, more)
    plan, train, test = make_plan(config)
    said = [*readout(plan, train, test), *suspicions(train, test)]
    small_pieces()
    again, mapped, mapped_test = make_plan(config)
    assert again == plan
    assert test is not None
    assert mapped_test is not None
    for one, other in ((mapped, train), (mapped_test, test)):
        assert canonical.to_bytes(one) == canonical.to_bytes(other)
    assert [*readout(again, mapped, mapped_test), *suspicions(mapped, mapped_test)] == said
    assert not isinstance(owner(mapped.values), np.ndarray)


def owner(array: NDArray[Any]) -> object:
    """What holds the memory that an array shows."""
    found: Any = array
    while isinstance(found, np.ndarray) and found.base is not None:
        found = found.base
    return found


@pytest.mark.parametrize("optional", [(), ("observed", "times"), ("groups", "moments", "weights")])
def test_the_stored_file_is_as_safetensors_writes_it(optional: tuple[str, ...], tmp_path: Path) -> None:
    found = read(write_npz(tmp_path, arrays()), time="t", weight="w")
    kept: dict[str, Any] = {
        name: getattr(found, name) if name in optional else None
        for name in ("observed", "times", "groups", "moments", "weights")
    }
    found = replace(found, **kept, classes=("a", "bä", 'c"\\'))
    tensors: dict[str, Any] = {"values": found.values, "lengths": found.lengths, "labels": found.labels}
    tensors |= {name: value for name, value in kept.items() if value is not None}
    content = canonical.to_bytes(found)
    size = int.from_bytes(content[:8], "little")
    meta = json.loads(content[8 : 8 + size])["__metadata__"]
    assert content == serialized(tensors, meta)


def mapped_again(data: Sequences, folder: Path, small_pieces: Callable[[], None]) -> Sequences:
    """The same as it is stored, large."""
    canonical.save(data, folder / "stored")
    small_pieces()
    found = canonical.load(folder / "stored")
    assert not found.values.flags.writeable
    return found


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "channel": {"normalization": "channel", "difference": True},
    "sequence": {"normalization": "sequence", "difference": True},
    "none": {"normalization": "none", "sequence_length": 6},
    "patches": {"stem": "patch", "patch_length": 4, "normalization": "sequence"},
    "convolutions": CONVOLUTIONS,
    "masked": MASKED,
    "augmented": AUGMENTED,
    "masked and augmented": MASKED | AUGMENTED,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("variable", [False, True])
def test_a_training_on_large_data_gives_the_bits_of_one_in_memory(
    name: str, native: bool, variable: bool, small_pieces: Callable[[], None], kernel: Kernel, tmp_path: Path
) -> None:
    data, given = sequences(variable=variable), CONFIGURATIONS[name] | {"folds": 3}
    used = kernel if native else None
    first = run(training(data, kernel=used, **given), 2)
    again = run(training(mapped_again(data, tmp_path, small_pieces), kernel=used, **given), 2)
    for one, other in zip(first.history, again.history, strict=True):
        assert replace(one, seconds=0) == replace(other, seconds=0)
    for own, others in zip(first.weights(), again.weights(), strict=True):
        assert all(torch.equal(own[key], others[key]) for key in own)


def test_the_order_of_alike_sequences_is_the_same(small_pieces: Callable[[], None]) -> None:
    """They differ in a late value, in a label, in what was observed, in a time, or in nothing."""
    random = np.random.default_rng(0)
    X = np.zeros((50, 8, 4))
    X[random.integers(0, 50, 20), 7, 3] = 1
    X[random.integers(0, 50, 20), 4, 0] = -0.0
    X[random.random(X.shape) < 0.02] = np.nan
    steps = np.arange(8.0) + np.zeros((50, 1))
    steps[random.integers(0, 50, 20), 7] += 5
    data = read({"X": X, "y": random.integers(0, 2, 50), "steps": steps})
    expected = in_order(data)
    small_pieces()
    found = in_order(data)
    assert found.ids == expected.ids
    assert canonical.to_bytes(found) == canonical.to_bytes(expected)


def test_faults_are_told_where_they_stand(small_pieces: Callable[[], None], tmp_path: Path) -> None:
    X = whole()["X"]
    X[47, 5, 1] = np.inf
    small_pieces()
    with pytest.raises(DataError, match=r"data\.npz, sequence 47, step 5, feature 'x1' is infinite"):
        read(write_npz(tmp_path, {"X": X}))
    steps = np.arange(T) + np.zeros((N, 1))
    steps[51, 6:] = np.nan
    with pytest.raises(DataError, match="sequence 51 has a value at step 6, but not where that is"):
        read({"X": np.zeros((N, T, F)), "steps": steps, "lengths": np.full(N, T)})


def test_a_feature_that_float32_cannot_hold_is_told_alike(
    small_pieces: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    X = np.random.default_rng(0).normal(size=(N, T, 2)) + np.array([0, 3e7])
    X[3, 4:] = np.nan
    read({"X": X})
    small_pieces()
    read({"X": X})
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second
    assert "feature 'x1' runs from" in first


@pytest.mark.parametrize("flip", [0, 1])
def test_a_damaged_large_npz_file_is_refused(flip: int, small_pieces: Callable[[], None], tmp_path: Path) -> None:
    path = write_npz(tmp_path, whole())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= flip
    path.write_bytes(content)
    small_pieces()
    if not flip:
        assert read(path).n == N
        return
    with pytest.raises(DataError, match="is damaged: Bad CRC-32"):
        read(path)


def test_pieces_cover_all_rows_and_none_is_of_one_row(small_pieces: Callable[[], None]) -> None:
    small_pieces()
    for rows in range(300):
        for size in (1, 100, 350, 700, 10_000):
            parts = buffers.pieces(rows, size)
            assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
            assert all(part.stop - part.start > 1 for part in parts) or rows < 2


NO_ROOM = """
import logging, resource, sys
import numpy as np
from hpo.models.data import buffers
logging.basicConfig(stream=sys.stdout)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
found = buffers.empty((buffers.IN_MEMORY + 1,), np.uint8)
found[:] = 1
growing = buffers.Growing()
try:
    for _ in range(9):
        growing.append(np.zeros(buffers.IN_MEMORY // 8, np.uint8))
except buffers.NoRoom as error:
    print(error)
"""


def test_without_room_for_temporary_files_the_way_out_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", NO_ROOM], env=environment, capture_output=True, text=True)
    warned, refused = done.stdout.splitlines()
    assert f"{tmp_path} has no place for 32 MiB of data (File too large): it is held in memory; set TMPDIR" in warned
    assert f"{tmp_path} has no room for 36 MiB of data (File too large): set TMPDIR to a folder on a disk" in refused
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(buffers.MADVISE is None, reason="there is no madvise")
def test_the_pages_of_rows_are_asked_for_before_they_are_taken(
    small_pieces: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces()
    asked: list[tuple[int, int]] = []
    real = buffers.MADVISE
    assert real is not None

    def noted(begin: int, size: int, advice: int) -> int:
        asked.append((begin, begin + size))
        return int(real(begin, size, advice))

    monkeypatch.setattr(buffers, "MADVISE", noted)
    array = buffers.copied(np.arange(12000, dtype=np.float32).reshape(40, 300))
    rows = np.array([31, 2, 2, 17])
    assert (buffers.taken(array, rows) == array[rows]).all()
    start, size = array.ctypes.data, array.strides[0]
    assert [end for _, end in asked] == [start + (row + 1) * size for row in rows.tolist()]
    for row, (begin, _) in zip(rows.tolist(), asked, strict=True):
        assert begin % mmap.PAGESIZE == 0
        assert 0 <= start + row * size - begin < mmap.PAGESIZE
    assert real(asked[0][0], asked[0][1] - asked[0][0], mmap.MADV_WILLNEED) == 0
