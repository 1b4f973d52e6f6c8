"""Damaged data files: benchmarks/fuzz_readers.py for a moment, and what it has found."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpo.errors import SHOWN_MOST, legible
from hpo.models.data import sizes
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_readers.py"


def test_only_our_own_errors_come_of_damaged_files() -> None:
    """Inputs that are known, so that a failure is one that a change has brought."""
    command = [sys.executable, str(SCRIPT), "--seed", "5000", "--inputs", "700"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried, accepted, refused = map(int, re.findall(r"\d+", done.stdout)[:3])
    assert tried == 700
    assert accepted > 70
    assert refused > 400


def test_a_message_is_one_line_that_a_terminal_only_shows() -> None:
    assert legible("a\n\x1b[31mb\x9b\u202e\ud800\0") == r"a\n\x1b[31mb\x9b\u202e\ud800\x00"
    assert legible("می\u200cخواهم 👩\u200d🚀, é") == "می\u200cخواهم 👩\u200d🚀, é"  # joiners belong to the words
    cut = legible("start" + "x" * 10**6 + "end")
    assert len(cut) < SHOWN_MOST
    assert (cut[:5], cut[-3:]) == ("start", "end")


def refused(path: Path, message: str, **how: Any) -> None:
    with pytest.raises(DataError, match=message) as found:
        read(path, **how)
    assert str(found.value).isprintable()
    assert len(str(found.value)) < SHOWN_MOST


def message_of(path: Path) -> str:
    """Why the file is refused; "" where it is read."""
    try:
        read(path)
    except DataError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------ npz


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def described(kind: str, shape: str) -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


def zipped(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(npy("-" * 900 + "1"), "this is no array", id="seed 20"),
        pytest.param(npy("{'a': " * 150), "this is no array", id="seed 881"),
        pytest.param(npy("(((\n"), "this is no array", id="seed 4096"),
        pytest.param(npy(described("<f8", "(4000000000, 6)"), bytes(480)), "says to be float64", id="seed 824"),
        pytest.param(npy(described("<f8", "(-1, 6)"), bytes(480)), "says to be float64", id="a negative shape"),
        pytest.param(npy(described("<U0", "(1000000000,)")), "says to be <U0", id="letters without a size"),
        pytest.param(npy(described("|V8", "(40, 6)"), bytes(8 * 240)), "holds records", id="records"),
        pytest.param(npy(described("<f8", "(40, 6)"), bytes(1919)), "says to be float64", id="a byte short"),
        pytest.param(npy(described("|O", "(40, 6)"), bytes(240)), "never loaded: save labels as a str", id="objects"),
        pytest.param(b"", "this is no array", id="nothing"),
    ],
)
def test_an_array_whose_header_lies_is_refused_before_it_is_made(content: bytes, message: str, tmp_path: Path) -> None:
    refused(zipped(tmp_path / "x.npz", ("X.npy", content)), message)


def test_an_array_of_python_2_is_read_without_a_warning(tmp_path: Path) -> None:
    """Seed 1009419."""
    old = npy(described("<f8", "(2L, 3L)") + "\n", bytes(48))
    assert read(zipped(tmp_path / "x.npz", ("X.npy", old))).n == 2


def test_text_of_letters_that_there_are_not_is_refused(tmp_path: Path) -> None:
    """Seed 105914: numpy ended in a SystemError."""
    X = npy(described("<f8", "(2, 3)"), bytes(48))
    for kind, letter in (("<U1", b"\xff\xff\xff\x7f"), (">U1", b"\x7f\xff\xff\xff")):
        y = npy(described(kind, "(2,)"), letter * 2)
        refused(zipped(tmp_path / "x.npz", ("X.npy", X), ("y.npy", y)), "holds text that is none")


def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    X = npy(described("<f8", "(2, 3)"), bytes(48))
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(tmp_path / "x.npz", ("X.npy", X), ("X.npy", X))
    refused(tmp_path / "x.npz", "holds the array 'X' twice")


def test_an_archive_that_unzips_to_far_more_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "NUMBERS", (4 * 2**20, 30))  # or it would have to unzip to a gigabyte
    X = npy(described("|i1", "(3000, 10000)"), bytes(30_000_000))
    refused(zipped(tmp_path / "x.npz", ("X.npy", X), method=zipfile.ZIP_DEFLATED), "becomes more than .* bytes")
    np.savez(tmp_path / "x.npz", X=np.zeros((300, 1000), np.int8))  # as large, but it says so
    assert read(tmp_path / "x.npz").n == 300


def test_an_archive_that_says_to_unzip_to_little_is_not_unzipped_beyond_that(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", ("X.npy", npy(described("|i1", "(1, 9)"), bytes(10**7))), method=8)
    content = bytearray(path.read_bytes())
    size = len(npy(described("|i1", "(1, 9)"))) + 9
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    refused(path, "is damaged: Bad CRC-32")


def test_a_damaged_archive_leaves_no_file_open(tmp_path: Path) -> None:
    """Seed 288: a ResourceWarning, which is an error here, of numpy.load."""
    np.savez(tmp_path / "x.npz", X=np.ones((40, 6)))
    content = (tmp_path / "x.npz").read_bytes()
    for at in range(0, len(content), 7):
        (tmp_path / "x.npz").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        assert message_of(tmp_path / "x.npz").isprintable()


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("x.csv", "x" * 200_000, "field larger than field limit", id="seed 169"),
        pytest.param("x.csv", f"{'9' * 5000},a\n1,2\n", "the first row must name every column", id="seed 8458"),
        pytest.param("x.csv", "t0,\x1b[31mred\n1,2\n", r"t0, \\x1b\[31mred", id="seed 338"),
        pytest.param("x.csv", "id,\u202ex\n1,2\n", r"id, \\u202ex", id="seed 374"),
        pytest.param("x.csv", f"id,{'n' * 5000}\n1,2\n", "needs columns 'id' and 'step'", id="seed 454"),
        pytest.param("x.ts", f"@classLabel true a\n@data\n1:{'a' * 5000}\n", "not one of @classLabel", id="seed 443"),
        pytest.param("x.ts", f"@classLabel false\n@data\n{'a' * 5000}\n", "could not convert", id="seed 147"),
        pytest.param("x.ts", "@classLabel false\n@data\n" + "1:" * 70_000 + "1\n", "is it transposed", id="transposed"),
    ],
)
def test_found_by_fuzzing(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, message)


def test_names_of_the_caller_cannot_speak_to_the_terminal_either(tmp_path: Path) -> None:
    """Seeds 62 and 77."""
    (tmp_path / "x.csv").write_text("t0,label\n1,slow\n2,fast\n")
    refused(tmp_path / "x.csv", r"training data \(x\\x1b\)", classes=("x\x1b",))
    refused(tmp_path / "x.csv", r"expected 2: value, \\x1b\[31m", features=("value", "\x1b[31m"))


def test_a_warning_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seed 2357."""
    (tmp_path / "a\n\x1b.tsv").write_text("t0\tt1\n1\t2\n")
    read(tmp_path / "a\n\x1b.tsv")
    assert r"a\n\x1b.tsv: read with tabs between its cells" in caplog.messages[0]


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [("x.csv.gz", "t0\n", "1\n"), ("x.tsv.gz", "t0\tt1\n", "1\t1\r"), ("x.ts.gz", "@classLabel false\n@data\n", "1\n")],
)
@pytest.mark.parametrize(("rows", "message"), [(10**7, "becomes more than"), (3 * 10**6, "holds 3,000,00. rows in")])
def test_text_that_unzips_to_far_more_is_refused(
    name: str, head: str, row: str, rows: int, message: str, tmp_path: Path
) -> None:
    """Seeds 619 and 1452: gigabytes and minutes of a file of some kilobytes."""
    (tmp_path / name).write_bytes(gzip.compress((head + row * rows).encode()))
    refused(tmp_path / name, message)


@pytest.mark.parametrize("kind", ["csv", "ts", "parquet"])
def test_sequences_of_which_one_is_far_longer_than_the_others_are_refused(kind: str, tmp_path: Path) -> None:
    """Two thousand rows for which padding would need megabytes are read; twenty thousand, gigabytes, are not."""
    path = tmp_path / f"x.{kind}"
    for n, fits in ((1_000, True), (10_000, False)):
        rows = [*((str(i), 0) for i in range(n)), *(("long", i) for i in range(n))]
        if kind == "ts":
            path.write_text("@classLabel false\n@data\n" + "1\n" * n + ",".join("1" * n) + "\n")
        elif kind == "csv":
            path.write_text("id,step,v\n" + "".join(f"{name},{step},1\n" for name, step in rows))
        else:
            pyarrow = pytest.importorskip("pyarrow")
            names, steps = map(list, zip(*rows, strict=True))
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table({"id": names, "step": steps, "v": [1.0] * len(rows)}), path)
        if fits:
            assert read(path).values.shape == (n + 1, n, 1)
        else:
            refused(path, r"padded to the 10,000 steps of the longest one they take more than 1,000 times")


# ------------------------------------------------------------------------------------------------ parquet


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": [1, 1], "step": [0, 1], "v": [0.5, 1.5], **columns})
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("said", "message"),
    [
        pytest.param('{"index_columns": 3}', "what pandas wrote of its index is damaged", id="seed 7"),
        pytest.param("{", "is empty, damaged or not a parquet file", id="seed 1446"),
        pytest.param("[" * 5000, "is empty, damaged or not a parquet file", id="seed 1177"),
        pytest.param('{"index_columns": ["\x1b"]}', "is empty, damaged or not a parquet file", id="seed 1101"),
        pytest.param('{"index_columns": ["gone", {}, null]}', "", id="seed 242"),
    ],
)
def test_what_pandas_wrote_may_be_damaged(said: str, message: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": [1, 1], "step": [0, 1], "v": [0.5, 1.5]}).replace_schema_metadata({"pandas": said})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    if message:
        refused(tmp_path / "x.parquet", message)
    else:
        assert read(tmp_path / "x.parquet").n == 1


def test_two_columns_of_one_name_are_refused_also_where_pandas_calls_them_its_index(tmp_path: Path) -> None:
    """Seed 1037820."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([[1], [0], [0.5], [0.5]], names=["id", "step", "v", "v"])
    table = table.replace_schema_metadata({"pandas": '{"index_columns": ["v"]}'})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "the first row must name every column, each differently")


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path: Path) -> None:
    """Seeds 25 and 36: Arrow's messages have two."""
    path = parquet(tmp_path / "x.parquet")
    content = path.read_bytes()
    for at in range(4, len(content), 11):
        path.write_bytes(content[:at] + b"\x0f" + content[at + 1 :])
        assert message_of(path).isprintable()


def test_a_parquet_file_that_becomes_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    n = 3_000_000
    table = {"id": pyarrow.repeat(0, n), "step": pyarrow.repeat(0, n), "v": pyarrow.repeat(0.5, n)}
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(table), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "holds 3,000,000 rows in .* bytes: if that is right, write it without compression")


def test_a_table_without_rows_and_a_day_that_python_has_not(tmp_path: Path) -> None:
    """Seeds 107019 and 117154."""
    pyarrow = pytest.importorskip("pyarrow")
    days = pyarrow.array([2**31 - 1, 0], pyarrow.date32())
    refused(parquet(tmp_path / "x.parquet", label=days), "column 'label' holds a value that cannot be read")
    schema = pyarrow.schema([("id", pyarrow.int64()), ("step", pyarrow.int64()), ("v", pyarrow.float64())])
    pytest.importorskip("pyarrow.parquet").write_table(schema.empty_table(), tmp_path / "y.parquet")
    refused(tmp_path / "y.parquet", "is empty: it holds no values")


def test_a_number_that_signals_is_a_missing_one(tmp_path: Path) -> None:
    """Seed 1534: numpy warned of a cast."""
    values = np.ones((2, 3))
    values.view(np.uint64)[0, 1] = 0x7FF0000000000001
    np.savez(tmp_path / "x.npz", X=values)
    assert read(tmp_path / "x.npz").filled == 1


# ------------------------------------------------------------------------------------------------ no file


@pytest.mark.parametrize("name", ["x.csv", "x.npz", "x.ts", "x.parquet", "x.csv.gz"])
def test_what_is_no_file_is_refused_and_nobody_waits_for_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    makers: tuple[Callable[[], object], ...] = (
        path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path),
    )  # fmt: skip
    for make in makers:
        make()
        refused(path, "is no file that holds its data|cannot be read")
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    refused(tmp_path / f"a\0{name}", r"a\\x00x.*is no file that holds its data")
    refused(tmp_path / ("n" * 300 + name), "cannot be read: File name too long")


def test_memory_that_is_not_there_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("Unable to allocate 179. GiB")

    monkeypatch.setattr("hpo.models.data.readers.to_sequences", fail)
    np.savez(tmp_path / "x.npz", X=np.ones((2, 3)))
    refused(tmp_path / "x.npz", "does not fit into the memory that this process may have")


def test_the_docstring_states_the_bound_that_the_fuzzer_holds() -> None:
    stated = f"{sizes.MEMORY // 2**30} GiB and {sizes.MEMORY_TIMES:,} times its size"
    assert stated in " ".join(str(read.__doc__).split())
