"""Damaged data files: only the project's own errors may come of them, in time and in bounded memory.

    python benchmarks/fuzz_readers.py [--minutes 10] [--seed 0] [--inputs N] [--keep FOLDER]

Takes a valid file of each format that `hpo.read` knows, changes bytes, cells or the whole structure (sizes that lie in
zip and npy headers and in parquet footers, columns of odd types, bombs, long names, ids whose padding would fill the
memory), and reads it as a study, a prediction or an evaluation would. `fuzzing.py` says what a failure is; here also
sequences that contradict themselves. The memory that reading may take is `allowed`, as the docstring of
`hpo.models.data.readers.read` states it. `tests/unit/test_fuzz_readers.py` runs it for a few seconds and holds the
inputs that it has found.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
from fuzz_study_files import damage_bytes, damage_csv, damage_npz
from fuzzing import MIB, Trial

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"


def allowed(size: int) -> int:
    """Bytes that reading a file of that size may take."""
    from hpo.models.data.sizes import MEMORY, MEMORY_TIMES

    return MEMORY + MEMORY_TIMES * size


# ------------------------------------------------------------------------------------------------ the valid files


def write_files(folder: Path) -> None:
    """Small files of every format, made up and real."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    X = np.round(np.sin(np.arange(6)[None, :] * (1 + labels[:, None])) + rng.normal(0, 0.4, (40, 6)), 4)
    words, groups = np.array(["slow", "fast"])[labels], np.arange(40) // 2
    arrays: dict[str, Any] = {"X": X[:, :, None], "y": words, "lengths": rng.integers(4, 7, 40), "groups": groups}
    np.savez(folder / "waves.npz", **arrays)
    np.savez_compressed(folder / "zipped.npz", **arrays)
    long = [f"{i},{t},{X[i, t]},{-X[i, t]},{words[i]},{groups[i]}" for i in range(40) for t in range(6 - i % 3)]
    write(folder / "long.csv", ["id,step,value,other,label,group", *long])
    dated = [
        row.replace(f",{t},", f",2024-01-0{t + 1}T09:30:00+01:00,", 1)
        for row, t in zip(long, range(1000), strict=False)
        if t < 6
    ]
    write(folder / "dated.csv", ["id,step,value,other,label,group", *dated])
    wide = [[*map(str, X[i]), words[i], str(groups[i])] for i in range(40)]
    head = ["t0", "t1", "t2", "t3", "t4", "t5", "label", "group"]
    wide[3][2] = wide[4][5] = ""
    write(folder / "wide.csv", [",".join(row) for row in [head, *wide]])
    write(folder / "wide.tsv", ["\t".join(row) for row in [head, *wide]])
    write(folder / "comma.csv", [";".join(row).replace(".", ",") for row in [head, *wide]])
    (folder / "long.csv.gz").write_bytes(gzip.compress((folder / "long.csv").read_bytes(), mtime=0))
    (folder / "wide.tsv.gz").write_bytes(gzip.compress((folder / "wide.tsv").read_bytes(), mtime=0))
    top = "@problemName waves\n@univariate false\n@dimensions 2\n@equalLength false\n@classLabel true slow fast\n@data"
    rows = [",".join(map(str, X[i, : 6 - i % 3])) for i in range(40)]
    rows = [f"{row}:{row.replace('0.1', '?')}:{words[i]}" for i, row in enumerate(rows)]
    rows[2] = "?,1.0:?,?:slow"
    write(folder / "unequal.ts", [top, *rows])
    (folder / "unequal.ts.gz").write_bytes(gzip.compress((folder / "unequal.ts").read_bytes(), mtime=0))
    shutil.copyfile(EXAMPLES / "ItalyPowerDemand_TRAIN.ts", folder / "italy.ts")
    vowels = (EXAMPLES / "JapaneseVowels_TRAIN.ts").read_text().splitlines()
    start = vowels.index("@data") + 1
    write(folder / "vowels.ts", vowels[: start + 12])
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        return
    table = pyarrow.csv.read_csv(folder / "long.csv")
    pyarrow.parquet.write_table(table, folder / "long.parquet")
    pyarrow.parquet.write_table(
        table, folder / "pages.parquet", compression="zstd", data_page_size=200, row_group_size=50
    )


def write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ the changes

CELLS = (
    "", " ", "nan", "inf", "-inf", "1e999", "1e-999", "x", "0x1", "1,5", '"', '"a\nb"', "\0", "é", "🙂", "?", "1_0",
    "-", "True", "9" * 400, "9" * 5000,
    "2020-01-01", "2020-13-45", "0000-00-00", "2024-02-30T25:61:61", "2024-01-01T00:00:00.123456789Z", "99999-01-01",
    "2024-01-01T00+99:99", "=1+1", ";",
    "\t", ":", "@data", "#", "\ufeff", "NaN", "None", "١", "\x1b[31m", "\x1b]0;title\a", "\u202e", "\u200b",
    "a" * 3000, "\x85", "\u2028", "\x7f",
    "1e308", "-1e308", "1e-320", "4e38", "-0", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30,
    "<script>", "](x)", "%s", "%r%n", "{}",
    "1e5", "1.", ".5", "+1", "--1", "１", "∞", "\ud800",
)  # fmt: skip
NAMES = (
    "id", "step", "label", "group", "value", "t0", "t00", "t7", "t1e9", "x", "", " ", "2024-01-01", "2024-01-02",
    "2024-01-01T00:00:00", "2024-99-99",
    "0", "1", "t" + "9" * 400, "n" * 5000, "\x1b[31mred", "a\nb", "é", "e\u0301", "Unnamed: 0", "__index_level_0__",
    "\0", "٣", "t٣", "t1.5", "t1.50",
    "\u202ex", "<b>", "\ud800",
)  # fmt: skip


def damage_cells(rng: random.Random, text: str) -> str:
    """Cells, columns and names of a table changed, whatever separates them."""
    separator = max(",;\t", key=text.split("\n", 1)[0].count)
    rows = [line.split(separator) for line in text.splitlines()]
    for _ in range(rng.choice((1, 1, 2, 5))):
        what, column = rng.randrange(8), rng.randrange(len(rows[0]))
        if what < 2:
            row = rng.choice(rows) or [""]
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        elif what == 2:
            rows[0][column] = rng.choice(NAMES)
        elif what == 3:
            for i, row in enumerate(rows):
                row.insert(column, rng.choice(NAMES) if i == 0 else rng.choice(CELLS[:30]))
        elif what == 4:
            cell = rng.choice(CELLS)
            for row in rows[1:]:
                row[column : column + 1] = [cell]
        elif what == 5:
            for row in rows:
                del row[column:]
        elif what == 6:
            rng.shuffle(rows)
        else:
            for i, row in enumerate(rows[1:]):
                row[column : column + 1] = [
                    rng.choice(("2024-01-0{}", "{}", "{}.5", "-{}", "{}e300", "1{:030}", "T{}")).format(i)
                ]
        if not rows[0]:
            rows[0] = ["a"]
    return rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(separator.join(row) for row in rows)


def odd_table(rng: random.Random) -> str:
    """A table of another shape."""
    n = rng.choice((10, 1_000, 20_000))
    k = n // 2
    return rng.choice(
        (
            lambda: ",".join(f"t{i}" for i in range(n)) + ",label\n" + "1," * n + "a\n",
            lambda: ",".join(f"t{i}" for i in range(n)) + "\n" + ",".join("1" * n) + "\n",
            lambda: ",".join(["id", "step", *(f"c{i}" for i in range(n))]) + "\n" + "1," * (n + 1) + "1\n",
            lambda: ",".join(["t1"] * n) + "\n" + "1," * n + "a\n",
            lambda: ",".join("t" * i for i in range(1, min(n, 800))) + "\n1\n",
            lambda: "id,step,v\n" + "".join(f"{i},0,1\n" for i in range(k)) + "".join(f"x,{i},1\n" for i in range(k)),
            lambda: "id,step,v\n" + "".join(f"{i},{i},1\n" for i in range(n)),
            lambda: '"' * n,
            lambda: '"' + "a," * n + "\n" * n,
            lambda: "t0,label\n" + "\n" * n + "1,a\n",
            lambda: "t0,label\n" + '1,"' + "a" * 10 * n + '"\n',
            lambda: "," * n + "\n" + "," * n,
            lambda: ";" * n + "\n" + "1;" * n,
            lambda: "x" * 10 * n,
            lambda: "t0,label\n" + "".join(f"1,{'a' * i}\n" for i in range(min(n, 1000))),
            lambda: "t0\n" + "1\n" * n,
            lambda: "t0,label\n" + "".join(f"{i},{i}\n" for i in range(n)),
        )
    )()


def odd_ts(rng: random.Random) -> str:
    """A .ts file of another shape."""
    n = rng.choice((10, 1_000, 20_000))
    top = "@univariate true\n@classLabel true a b\n@data\n"
    return rng.choice(
        (
            lambda: top + "1:a\n" * n,
            lambda: top + "1," * n + "1:a\n" + "1:b\n" * n,
            lambda: top.replace("@univariate true", f"@dimensions {n}") + "1:" * n + "a\n",
            lambda: top.replace("@univariate true", "@dimensions " + "9" * n) + "1:a\n",
            lambda: top.replace("true a b", "true " + " ".join(f"c{i}" for i in range(n))) + "1:a\n",
            lambda: top.replace("true a b", "true") + "".join(f"1:{'c' * (i % 900)}{i}\n" for i in range(min(n, 2000))),
            lambda: top + ":" * n + "\n",
            lambda: top + "," * n + ":a\n",
            lambda: top + "?," * n + "1:a\n1:b\n",
            lambda: "@" * n + "\n" + top,
            lambda: ("@x " * n + "\n") + top + "1:a\n",
            lambda: "@data\n" * n,
            lambda: "#" * n + "\n" + top + "#\n" * n,
            lambda: top.replace("univariate", "u" * n) + "1:a\n",
            lambda: top + "1:" + "a" * n + "\n",
            lambda: top.replace("true a b", "false") + "1\n" * n,
        )
    )()


TS = (
    "true", "false", "@data", "@classLabel", "@univariate", "@equalLength", "@timeStamps", "@dimensions", ":", ",",
    "slow", "fast", "\n", "0.", "-", "?",
)  # fmt: skip


def damage_ts(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice((1, 2, 4))):
        i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        what = rng.randrange(4)
        if what == 0:
            text = text[:i] + text[min(j, i + rng.choice((1, 10, 10**6))) :]
        elif what == 1:
            text = text[:i] + rng.choice(CELLS + NAMES) + text[i:]
        elif what == 2:
            text = text.replace(rng.choice(TS), rng.choice(TS + CELLS), rng.choice((1, 3, -1)))
        else:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
    return text


def damage_text(rng: random.Random, path: Path, content: bytes) -> bytes:
    """Of csv, tsv and ts, unzipped."""
    text, ts = content.decode(), ".ts" in path.name
    what = rng.randrange(10)
    if what == 0:
        return damage_bytes(rng, content)
    if what == 1:
        text = odd_ts(rng) if ts else odd_table(rng)
    elif ts:
        text = damage_ts(rng, text)
    elif what == 2:
        text = damage_csv(rng, text)
    else:
        text = damage_cells(rng, text)
    kind = rng.choice(("utf-8",) * 30 + ("utf-8-sig", "utf-16", "latin-1", "utf-32", "utf-7"))
    return text.encode(kind, "surrogatepass" if kind == "utf-8" and rng.random() < 0.5 else "replace")


def damage_gzip(rng: random.Random, path: Path, content: bytes) -> bytes:
    what = rng.randrange(8)
    if what == 0:
        return damage_bytes(rng, content)
    if what == 1:
        return content + rng.choice((content, b"\0" * 100, b"x", content[:20]))
    if what == 2:
        return bomb(rng, path)
    if what == 3:
        return gzip.decompress(content)
    if what == 4:
        changed = bytearray(content)
        changed[rng.choice((2, 3, 8, 9, -1, -2, -3, -4, -5))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return gzip.compress(damage_text(rng, path, gzip.decompress(content)), mtime=0)


def bomb(rng: random.Random, path: Path) -> bytes:
    """A gz file of a few kilobytes that holds megabytes."""
    head, row = rng.choice(
        (
            ("t0,label\n", "1,a\n"),
            ("t0\n", "1\n"),
            ("id,step,v\n", "1,1,1\n"),
            ("t0,t1\n", "0,0\n"),
            ("x", "x"),
            ("", "\n"),
            ("", "\0"),
        )
    )
    if ".ts" in path.name:
        head, row = rng.choice(
            (("@classLabel true a\n@data\n", "1:a\n"), ("@classLabel false\n@data\n", "1\n"), ("", "#\n"), ("", "x"))
        )
    size = rng.choice((3 * MIB, 8 * MIB, 200 * MIB))
    return gzip.compress((head + row * (size // len(row))).encode(), 1 if size > 10 * MIB else 9, mtime=0)


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """A npy file with whatever header."""
    text = header if isinstance(header, bytes) else header.encode()
    size = len(text) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes(version)
        + struct.pack("<H" if version == (1, 0) else "<I", size % (2**16 if version == (1, 0) else 2**32))
        + text
        + data
    )


def odd_npy(rng: random.Random) -> bytes:
    """A npy file whose header lies, or is none."""
    kinds = (
        "<f8", "<f4", "<f2", "|i1", "|b1", "<U4", "<U100000000", "|S3", "|V0", "|V8", "|O", "<M8[s]", "<c16", ">f8",
        "<f16",
        "<i8", "<U0", "|S0", "x", "",
    )  # fmt: skip
    shapes = (
        "(40, 6)", "(40, 6, 1)", "(4000000000, 6)", "(1000000, 1000000)", "(0, 6)", "(40, 0)", "()", "(40,)", "(-1, 6)",
        "(True, 6)", "(40.0, 6)", "(9223372036854775807,)", "(9223372036854775808, 2)", "(4294967296, 4294967296)",
        "(40, 100000000)", "(" + "1, " * 40 + ")", "40", "None", "(2, '3')",
    )  # fmt: skip
    kind, shape = rng.choice(kinds), rng.choice(shapes)
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.choice(('False', 'True', 'None', '2'))}, 'shape': {shape}, }}"
    if rng.random() < 0.3:
        header = rng.choice(
            (
                "", "{}", "[" * 3000, "(" * 200 + ")" * 200,
                "{'descr': [('a', '<f8'), ('b', '<f8')], 'fortran_order': False, 'shape': (4,), }",
                header + " " * 60_000,
                "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1" * 5000 + ",), }",
                header.replace("descr", "dscr"), "-" * 5000 + "1", "{'a': " * 300, "\0", "é" * 10,
                "{'descr': ('<f8', (3,)), 'fortran_order': False, 'shape': (4,), }",
                "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1+" * 3000 + "1,), }",
                "{'descr': [('" + "a" * 3000 + "', '<f8')], 'fortran_order': False, 'shape': (4,), }",
                "{'descr': {}, 'fortran_order': False, 'shape': (4,), }",
            )
        )  # fmt: skip
    data = bytes(rng.choice((0, 8, 40 * 6 * 8, 40 * 6 * 4, 40, 1000)))
    version = rng.choice(((1, 0), (1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    return npy(header, data, version, rng.choice((None, None, None, 0, 65535, 2**31)))


def damage_zip(rng: random.Random, path: Path) -> None:
    """An npz file with members that lie: sizes, names, headers, methods; twice the same name; bombs."""
    with zipfile.ZipFile(path) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    what = rng.randrange(9)
    place = rng.randrange(len(members))
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    if what < 3:
        members[place] = (members[place][0], odd_npy(rng))
    elif what == 3:
        name = rng.choice(
            (
                "X.npy",
                "X",
                "../X.npy",
                "/X.npy",
                "x" * 3000 + ".npy",
                "\x1b[31m.npy",
                "a\nb.npy",
                "é.npy",
                "X/",
                "y.npy",
                ".npy",
                "X.npy.npy",
                "lengths.npy",
            )
        )
        members.insert(place, (name, members[place][1]))
    elif what == 4:
        N = rng.choice((10**5, 10**6, 3 * 10**7))
        kind = rng.choice(("|i1", "|b1", "<f8", "<U1", "<f2"))
        shape = rng.choice((f"({N}, 1)", f"(1, {N})", f"(1, 1, {N})", f"({N},)"))
        members[place] = (
            members[place][0],
            npy(
                f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}", bytes(N * np.dtype(kind).itemsize)
            ),
        )
    elif what == 5:
        members[place] = (members[place][0], damage_bytes(rng, members[place][1]))
    buffer = io.BytesIO()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name twice
        with zipfile.ZipFile(buffer, "w", method) as file:
            for name, content in members:
                file.writestr(name, content)
    content = bytearray(buffer.getvalue())
    if what > 5:
        lie_in_zip(rng, content)
    path.write_bytes(content)


def lie_in_zip(rng: random.Random, content: bytearray) -> None:
    """Other numbers in local headers, the central directory or its end, in place."""
    fields = {
        b"PK\x03\x04": (4, 6, 8, 14, 18, 22, 26, 28),
        b"PK\x01\x02": (6, 8, 10, 16, 20, 24, 28, 30, 32, 42),
        b"PK\x05\x06": (8, 10, 12, 16, 20),
    }
    for _ in range(rng.choice((1, 1, 2))):
        sign = rng.choice(list(fields))
        found = [i for i in range(len(content)) if content.startswith(sign, i)]
        at = rng.choice(found) + rng.choice(fields[sign])
        content[at : at + 4] = rng.choice(
            (
                struct.pack("<I", rng.choice((0, 1, 100, 2**16, 2**31 - 1, 2**32 - 1, 2**30))),
                struct.pack("<H", rng.randrange(2**16)) + content[at + 2 : at + 4],
            )
        )


def damage_parquet(rng: random.Random, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    what = rng.randrange(6)
    content = bytearray(path.read_bytes())
    if what == 0:
        path.write_bytes(damage_bytes(rng, bytes(content)))
        return
    if what < 3:  # the footer, or the headers of pages
        size = int.from_bytes(content[-8:-4], "little")
        low, high = (len(content) - 8 - size, len(content)) if what == 1 else (4, len(content) - size - 8)
        for _ in range(rng.choice((1, 1, 2, 6))):
            content[rng.randrange(max(low, 0), max(high, 1)) % len(content)] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
        path.write_bytes(content)
        return
    table = pq.read_table(path)
    if what == 3 and rng.random() < 0.2:
        N = rng.choice((10**5, 10**6, 2 * 10**7))
        table = pa.table({"id": pa.repeat(0, N), "step": pa.repeat(0, N), "v": pa.repeat(rng.choice((0.0, "1")), N)})
        pq.write_table(table, path, compression=rng.choice(("zstd", "gzip", "none")))
        return
    if what == 3 and rng.random() < 0.3:
        n = rng.choice((100, 2000))
        table = pa.table({"id": [1], "step": [1], **{f"c{i}": [1.0] for i in range(n)}})
    for _ in range(rng.choice((1, 1, 2))):
        column = rng.randrange(table.num_columns)
        name = rng.choice((table.column_names[column], *NAMES)).encode(errors="replace").decode()
        if rng.random() < 0.7:
            table = table.set_column(column, name, odd_column(rng, table.num_rows))
        else:
            table = table.append_column(name, odd_column(rng, table.num_rows))
    if rng.random() < 0.2:
        found = rng.choice(
            (
                b"{}",
                b"{",
                b"[]",
                b'"x"',
                b"null",
                b'{"index_columns": ["other", {}, 3, null]}',
                b'{"index_columns": 3}',
                b'{"index_columns": ["value", "value"]}',
                b'{"index_columns": ["\x1b"]}',
                b"\xff",
                b"[" * 5000,
                b'{"index_columns": ["gone"]}',
            )
        )
        table = table.replace_schema_metadata({b"pandas": found})
    try:
        pq.write_table(table, path)
    except (pa.ArrowException, OSError, ValueError):
        path.write_bytes(damage_bytes(rng, bytes(content)))


def odd_column(rng: random.Random, n: int) -> Any:
    """n values of some type of Arrow."""
    import decimal

    import pyarrow as pa

    makers: list[Callable[[], Any]] = [
        lambda: pa.array([None] * n),
        lambda: pa.array([None] * n, pa.float64()),
        lambda: pa.array([rng.choice((1, None)) for _ in range(n)], pa.int64()),
        lambda: pa.array([2**63 + i for i in range(n)], pa.uint64()),
        lambda: pa.array([float(i) for i in range(n)], pa.float16()) if n < 2000 else pa.array([None] * n),
        lambda: pa.array([decimal.Decimal(10) ** 30 + i for i in range(n)]),
        lambda: pa.array([decimal.Decimal("1.5")] * n),
        lambda: pa.array([rng.choice(CELLS).encode(errors="replace").decode() for _ in range(n)]),
        lambda: pa.array([f"2024-01-01T00:{i // 60 % 60:02}:{i % 60:02}" for i in range(n)]),
        lambda: pa.array([b"\xff" + bytes([i % 256]) for i in range(n)]),
        lambda: pa.array([[i] for i in range(n)]),
        lambda: pa.array([[1.0, 2.0]] * n, pa.list_(pa.float64(), 2)),
        lambda: pa.array([{"a": i} for i in range(n)]),
        lambda: pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["a"] * n).dictionary_encode(),
        lambda: pa.array([i * 10**15 for i in range(n)], pa.timestamp(rng.choice(("s", "ms", "us", "ns")),
        rng.choice((None, "UTC", "+01:00", "Europe/Berlin")))),
        lambda: pa.array([rng.choice((0, 2**62, -(2**62))) for _ in range(n)], pa.timestamp(
        rng.choice(("s", "us", "ns")), rng.choice((None, "UTC")))),
        lambda: pa.array(list(range(n)), pa.date32()),
        lambda: pa.array([2**31 - 1 - i for i in range(n)], pa.date32()),
        lambda: pa.array(list(range(n)), pa.time64("us")),
        lambda: pa.array(list(range(n)), pa.duration(rng.choice(("s", "ns")))),
        lambda: pa.array([rng.random() < 0.5 for _ in range(n)]),
        lambda: pa.array([rng.choice(math_odd) for _ in range(n)]),
        lambda: pa.array(["x" * 2000] * n, pa.large_string()),
    ]  # fmt: skip
    math_odd = (float("nan"), float("inf"), 1e308, -0.0, 1e-320, None)
    return rng.choice(makers)()


# ------------------------------------------------------------------------------------------------------- the way

_valid: list[Path] = []  # of this process, written at the first input


def valid_files() -> list[Path]:
    if not _valid:
        folder = Path(tempfile.mkdtemp())
        write_files(folder)
        _valid.extend(sorted(folder.iterdir()))
    return _valid


def make_input(seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of that seed, and how it is read."""
    rng = random.Random(seed)
    source = rng.choice(valid_files())
    path = folder / source.name
    content = source.read_bytes()
    path.write_bytes(content)
    if rng.random() < 0.02:
        pass
    elif path.suffix == ".npz":
        if rng.random() < 0.4:
            damage_npz(rng, path)
        elif rng.random() < 0.3:
            path.write_bytes(damage_bytes(rng, content))
        else:
            damage_zip(rng, path)
    elif path.suffix == ".parquet":
        damage_parquet(rng, path)
    elif path.suffix == ".gz":
        path.write_bytes(damage_gzip(rng, path, content))
    else:
        path.write_bytes(damage_text(rng, path, content))
    if rng.random() < 0.03:
        path = path.rename(folder / rng.choice(valid_files()).name)
    return path, how(rng)


def misplaced(rng: random.Random, path: Path) -> Path:
    """Something else where the file was, or the file under an odd name."""
    suffix = "".join(path.suffixes)
    what = rng.randrange(8)
    if what > 4:
        return path.rename(
            path.with_name(rng.choice(("a\nb", "\x1b[31m", "é", "n" * 200, "a.b", "\u202e", "\udcff")) + suffix)
        )
    if what == 4:
        return path.with_name(rng.choice(("a\0b", "x" * 300, "gone")) + suffix)
    path.unlink()
    if what == 0:
        path.mkdir()
    elif what == 1:
        os.mkfifo(path)
    else:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "gone", path.name, "/proc/self/mem", "/")))
    return path


def how(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {"labeled": rng.choice((True, True, False, None))}
    if rng.random() < 0.1:
        given[rng.choice(("label", "id", "step", "group"))] = rng.choice(
            ("label", "id", "group", "value", "t0", "x\ny", "é")
        )
    if rng.random() < 0.1:
        given["classes"] = rng.choice((("fast", "slow"), ("1", "2"), ("a",), ("x\x1b",)))
    if rng.random() < 0.1:
        given["features"] = rng.choice((("value", "other"), ("other",), ("x0",), ("value", "\x1b[31m"), tuple("abc")))
        given["named"] = rng.random() < 0.7
    return given


def check(found: Any) -> None:
    """Raise AssertionError for sequences that contradict themselves, and whatever keeping them raises."""
    from hpo.models.data.canonical import fingerprint

    N, T, F = found.values.shape
    assert min(N, T, F) > 0
    assert found.values.dtype == np.float32
    assert np.isfinite(found.values).all(), "values that are no finite numbers"
    assert found.lengths.dtype == np.int64
    assert found.lengths.shape == (N,)
    assert found.lengths.min() >= 1
    assert found.lengths.max() == T
    assert not found.values[np.arange(T) >= found.lengths[:, None]].any(), "values beyond the length"
    assert len(found.ids) == N
    assert len(found.features) == F == len(set(found.features))
    assert len(set(found.classes)) == len(found.classes)
    assert found.filled >= 0
    if found.labels is not None:
        assert found.labels.shape == (N,)
        assert 0 <= found.labels.min() <= found.labels.max() < len(found.classes)
    if found.groups is not None:
        assert found.groups.shape == (N,)
    for names in (found.ids, found.features, found.classes):
        assert all(isinstance(name, str) for name in names)
        json.dumps(names, ensure_ascii=False).encode()
    fingerprint(found.take(range(min(N, 100))))


def attempt(seed: int, folder: Path) -> Trial:
    from hpo.models.data.readers import read

    path, given = make_input(seed, folder)
    size = path.stat().st_size
    if seed % 50 == 7:
        path = misplaced(random.Random(seed), path)
    (folder / "how.json").write_text(json.dumps(given))
    return Trial(lambda: check(read(path, **given)), allowed(size), size)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    fuzzing.main(__file__, __doc__, attempt)
