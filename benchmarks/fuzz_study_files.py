"""Damaged study files and data files: only the project's own errors may come of them.

    python benchmarks/fuzz_study_files.py [--minutes 10] [--seed 0] [--keep FOLDER]

Takes a valid study file and its data, changes one or a few things (keys, types, numbers, nested tables, letters,
encodings, `--set`; shapes, types and bytes of the data), and goes the way of `hpo launch` up to the plan: `load`,
`make_plan`, what a worker draws from and prunes with, and the plan's way into the database and back. Whatever is raised
but an HpoError is a failure, and so are an input of more than SLOW_S seconds, a message that is not one short text, and
a plan that the database cannot keep. Printed are the inputs tried, how many were accepted and refused, and each kind of
failure once, with the seed that makes its input again (`--only SEED`). --keep copies the inputs of the failures.
`tests/unit/test_fuzz.py` runs it for a few seconds and holds the inputs that it has found.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SLOW_S = 20.0  # for one input of some kilobytes
LONGEST = 20_000  # characters of a message

STUDY: dict[str, Any] = {
    "study": {
        "name": "waves",
        "metric": "auroc",
        "trials": 6,
        "timeout": "1h30m",
        "sampler": "tpe",
        "pruner": "hyperband",
        "seed": 3,
        "lease": 30,
        "attempts": 2,
    },
    "data": {"train": "waves.npz", "validation": {"folds": 3}, "label": "label", "group": "group"},
    "train": {"epochs": 4, "patience": 2, "precision": "float32", "keep_best": 2},
    "limits": {"latency_ms": 1e9, "size_mb": 0.5},
    "space": {
        "hidden_size": {"low": 4, "high": 12, "step": 4},
        "layers": [1, 2],
        "dropout": {"low": 0.0, "high": 0.5},
        "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "bidirectional": False,
        "pooling": ["last", "max"],
        "batch_size": 16,
    },
    "enqueue": [{"hidden_size": 8, "layers": 1}],
}
ODD: tuple[Any, ...] = (
    0, -1, 1, 2, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1.0, 0.5, -0.0, 1e-320, 1e-5, 1e308, 1e309,
    math.inf, -math.inf, math.nan, True, False, "", " ", "\0", "a\nb", "x" * 300, "é", "\ud7ff", "🙂", "../waves.npz",
    "waves.csv", "long.csv", "waves.ts", "waves.parquet", "/dev/null", "/dev/zero", "/proc/self/mem", ".", "nan",
    "1e3", "30m", "1d1d", "99999999999d", "1h30", "9" * 400 + "s", "tpe", "grid", "gp", "qmc", "cmaes", "random",
    "none", "median", "log_loss", "f1", "average_precision", "bfloat16", "x", "y", "id", "step", "label", "group", [],
    {}, [[]], [{}], [1, 1], [1, 2, 3], [1, 1.0], [True, 1], ["a", "a"], {"folds": 2}, {"folds": 10**9}, {"folds": 0},
    {"folds": True}, {"low": 1}, {"low": 2, "high": 1}, {"low": 1, "high": 2**62},
    {"low": 1, "high": 9, "step": 10**30}, {"low": 0, "high": 1, "log": True},
    {"low": 1e-300, "high": 1e300, "log": True}, {"low": 0.1, "high": 0.3, "step": 0.1},
    {"low": 0.0, "high": 1.0, "step": 1e-300}, {"low": 0.0, "high": 0.5, "step": math.nan},
    {"low": math.nan, "high": 1.0}, {"low": 1, "high": 9, "log": "yes"}, None,
)  # fmt: skip
TEXT = (
    "\0", "\r", "\n", '"', "'", '"""', "[", "]", "[[", "{", "}", "=", ".", ",", "#", "\\", "\\u0000", "\\uD800",
    "\ufeff", "é", "\u2028", "\x1b[31m", "1_000", "0x10", "0o7", "1979-05-27T07:32:00Z", "07:32:00", "+inf", "-nan",
    "e", "_", "[" * 500, "{a=" * 500, "9" * 5000, "a." * 500 + "a = 1", "[study]", "[study.name]", "[[space]]",
    "[enqueue]",
)  # fmt: skip
CELLS = (
    "", " ", "nan", "inf", "-inf", "1e999", "1e-999", "x", "0x1", "1,5", '"', '"a\nb"', "\0", "é", "🙂", "?", "1_0",
    "-", "True", "9" * 400, "2020-01-01", "=1+1", ";", "\t", ":", "@data", "#", "\ufeff", "NaN", "None", "١",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the valid inputs


def write_data(folder: Path) -> None:
    """The same 40 waves as npz, long and wide csv, .ts and, where pyarrow is there, parquet."""
    noise = np.random.default_rng(0)
    labels = np.arange(40) % 2
    X = np.sin(np.arange(6)[None, :] * (1 + labels[:, None])) + noise.normal(0, 0.4, (40, 6))
    words = np.array(["slow", "fast"])[labels]
    np.savez(
        folder / "waves.npz", X=X[:, :, None], y=words, lengths=noise.integers(4, 7, 40), groups=np.arange(40) // 2
    )
    rows = [f"{i},{t},{X[i, t]:.4f},{words[i]},{i // 2}" for i in range(40) for t in range(6)]
    (folder / "long.csv").write_text("\n".join(["id,step,value,label,group", *rows]) + "\n")
    rows = [",".join([*(f"{value:.4f}" for value in X[i]), words[i], str(i // 2)]) for i in range(40)]
    (folder / "waves.csv").write_text("\n".join(["t0,t1,t2,t3,t4,t5,label,group", *rows]) + "\n")
    head = "@problemName waves\n@univariate true\n@equalLength true\n@classLabel true slow fast\n@data\n"
    rows = [",".join(f"{value:.4f}" for value in X[i]) + f":{words[i]}" for i in range(40)]
    (folder / "waves.ts").write_text(head + "\n".join(rows) + "\n")
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        return
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(folder / "long.csv"), folder / "waves.parquet")


FILES = ("waves.npz", "long.csv", "waves.csv", "waves.ts", "waves.parquet")


def toml(tables: dict[str, Any]) -> str:
    """The tables as TOML, odd values included: what cannot be written is written as it prints."""
    return "\n".join(f"{_key(key)} = {_value(value)}" for key, value in tables.items()) + "\n"


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------------ the changes


def change_tables(rng: random.Random, tables: dict[str, Any]) -> None:
    """One change of the parsed file, in place."""
    table, parents = tables, [tables]
    while rng.random() < 0.75 and (inner := [each for each in _items(table) if isinstance(each, dict | list)]):
        table = rng.choice(inner)
        parents.append(table)
    if isinstance(table, list):
        place = rng.randrange(len(table) + 1)
        table[place : place + rng.randrange(2)] = [copy.deepcopy(rng.choice(ODD))]
        return
    keys = list(table)
    key = rng.choice([*keys, rng.choice(KEYS)])
    what = rng.random()
    if what < 0.65:
        table[key] = copy.deepcopy(rng.choice(ODD))
    elif what < 0.75 and keys:
        del table[rng.choice(keys)]
    elif what < 0.85 and keys:
        table[_damaged_text(rng, rng.choice(keys))] = table.pop(rng.choice(keys))
    elif isinstance(number := table.get(key), int | float) and abs(number) < 2**64:
        table[key] = number * rng.choice((-1, 0, 10, 10**6, 10**12, 0.1)) + rng.choice((0, 1, 0.5))
    else:
        table[key] = copy.deepcopy(rng.choice([*parents[:1], *_items(tables)]))


KEYS = (
    "name", "metric", "trials", "timeout", "warm_start", "train", "test", "holdout", "validation", "id", "step",
    "epochs", "head_size", "patch_length", "sequence_length", "normalization", "optimizer", "weight_decay",
    "gradient_clip", "threshold", "class_weight", "schedule", "low", "high", "step", "log", "folds", "nme", "", "a.b",
    "study", "space", "enqueue", "data",
)  # fmt: skip


def _items(table: Any) -> list[Any]:
    return list(table.values()) if isinstance(table, dict) else list(table)


def _damaged_text(rng: random.Random, text: str) -> str:
    """The text with a piece cut out, doubled, moved or put in."""
    i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    j = min(j, i + rng.choice((1, 1, 3, 30, 10**9)))
    what = rng.randrange(4)
    if what == 0:
        return text[:i] + text[j:]
    if what == 1:
        return text[:j] + text[i:j] * rng.choice((1, 2, 50)) + text[j:]
    if what == 2:
        return text[:i] + rng.choice(TEXT) + text[i:]
    return text[:i] + text[i:j][::-1] + text[j:]


def encode(rng: random.Random, text: str) -> bytes:
    """As UTF-8 nearly always."""
    kind = rng.choice(("utf-8",) * 30 + ("utf-8-sig", "utf-16", "latin-1", "utf-32"))
    return text.encode(kind, "replace")


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut, or doubled."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        i = rng.randrange(len(found) + 1)
        what = rng.randrange(4)
        if what == 0:
            del found[i : i + rng.choice((1, 4, 100, 10**9))]
        elif what == 1:
            found[i:i] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 20))))
        elif found and what == 2:
            found[i % len(found)] = rng.randrange(256)
        else:
            found[i:i] = found[i : i + 50]
    return bytes(found)


def damage_csv(rng: random.Random, text: str) -> str:
    """A few cells, columns or rows changed."""
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(rng.choice((1, 1, 2, 5))):
        row = rng.choice(rows) if rows else []
        place, what = rng.randrange(len(row) + 1), rng.randrange(7)
        if what < 3 and row:
            row[place % len(row)] = rng.choice(CELLS)
        elif what == 3:
            row[place : place + rng.randrange(2)] = [rng.choice(CELLS)]
        elif what == 4 and rows:
            column, cell = rng.randrange(8), rng.choice(CELLS)
            for each in rows[1:]:
                each[column : column + 1] = [cell]
        elif what == 5 and rows:
            del rows[rng.randrange(len(rows)) :: rng.choice((1, 2, 10**6))]
        elif row:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
    return rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(",".join(row) for row in rows)


def damage_npz(rng: random.Random, path: Path) -> None:
    """Arrays of another type, shape or name."""
    with np.load(path) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(arrays)) if arrays else "X"
        array, what = arrays.get(name, np.zeros(3)), rng.randrange(9)
        if what == 0:
            arrays.pop(name, None)
        elif what == 1:
            arrays[rng.choice(("X", "y", "lengths", "groups", "x", "labels", "é", "a/b"))] = array
        elif what == 2:
            arrays[name] = array[: rng.choice((0, 1, 2, 39))] if array.ndim else array
        elif what == 3:
            arrays[name] = array[..., None] if rng.random() < 0.5 else array.reshape(-1)
        elif what == 4:
            kinds = ("f2", "f4", "c16", "i1", "u8", "?", "U3", "S3", "M8[s]", "m8[ns]", "f8", ">f4", "V4", "i4,f4")
            arrays[name] = np.zeros(array.shape, rng.choice(kinds))
        elif what == 5 and array.size and array.dtype.kind in "fi":
            changed = array.astype(float)
            changed.flat[rng.randrange(changed.size)] = rng.choice(
                (math.nan, math.inf, 1e308, -1, 0, 1e-320, 2**40, 0.5)
            )
            arrays[name] = changed
        elif what == 6:
            arrays[name] = np.full(
                array.shape, rng.choice((0, math.nan, 1e300, 1, "a", "", "a\0b", "\ud7ff", b"x", True))
            )
        elif what == 7:
            arrays[name] = np.array(rng.choice((0, "a", 1.5, math.nan)))
        elif array.ndim:
            arrays[name] = np.concatenate([array] * rng.choice((2, 3)))
    np.savez(path, **arrays)


def damage_data(rng: random.Random, path: Path) -> None:
    """One change of a data file."""
    if rng.random() < 0.3:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    elif path.suffix == ".npz":
        damage_npz(rng, path)
    elif path.suffix == ".csv":
        path.write_text(damage_csv(rng, path.read_text()), encoding="utf-8", errors="replace")
    elif path.suffix == ".ts":
        text = path.read_text()
        for _ in range(rng.choice((1, 2, 4))):
            text = (
                _damaged_text(rng, text) if rng.random() < 0.5 else text.replace(rng.choice(TS), rng.choice(TS + CELLS))
            )
        path.write_text(text, encoding="utf-8", errors="replace")
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))


TS = (
    "true",
    "false",
    "@data",
    "@classLabel",
    "@univariate",
    "@equalLength",
    "@timeStamps",
    ":",
    ",",
    "slow",
    "fast",
    "\n",
    "0.",
    "-",
)


@dataclass
class Input:
    """One study file with what goes with it, in a folder of its own."""

    study: Path
    overrides: list[str] = field(default_factory=list)


def make_input(seed: int, folder: Path) -> Input:
    """The input of that seed. `folder` must hold the valid data."""
    rng = random.Random(seed)
    tables = copy.deepcopy(STUDY)
    there = [name for name in FILES if (folder / name).exists()]
    trained = tables["data"]["train"] = rng.choice(there)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        change_tables(rng, tables)
    text = toml(tables)
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        text = _damaged_text(rng, text)
    study = folder / "study.toml"
    study.write_bytes(damage_bytes(rng, encode(rng, text)) if rng.random() < 0.05 else encode(rng, text))
    if rng.random() < 0.4:
        damage_data(rng, folder / (trained if rng.random() < 0.7 else rng.choice(there)))
    overrides = []
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        section = rng.choice(("study", "data", "train", "space", "enqueue", "x"))
        key = rng.choice([*STUDY.get(section, {}), *KEYS]) if section != "enqueue" else ""
        override = f"{section}.{key}={_value(rng.choice(ODD))}" if key else f"{section}={_value(rng.choice(ODD))}"
        overrides.append(_damaged_text(rng, override) if rng.random() < 0.2 else override)
    return Input(rng.choice([study] * 9 + [folder / name for name in there]), overrides)


# ------------------------------------------------------------------------------------------------------- the way


def plan_of(given: Input) -> None:
    """What `hpo launch` does before it asks the database. Raises HpoError; anything else is a failure."""
    from hpo.study.config import load
    from hpo.study.plan import Plan, make_plan
    from hpo.study.pruning import make_pruner
    from hpo.study.sampling import make_sampler
    from hpo.study.space import cardinality, distributions, walk

    plan, _, _ = make_plan(load(given.study, given.overrides))
    text = json.dumps(plan.to_json(), allow_nan=False)
    assert "\\u0000" not in text, "PostgreSQL keeps no NUL"
    json.dumps(json.loads(text), ensure_ascii=False).encode()  # and no half of a surrogate pair
    assert Plan.from_json(json.loads(text)) == plan
    plan.note()
    make_pruner(plan)
    make_sampler(plan, 0, 0)
    distributions(plan.config.space)
    cardinality(plan.config.space)
    walk(plan.config.space, lambda _, item: item.to_external_repr(item.to_internal_repr(_first(item))))


def _first(item: Any) -> Any:
    return item.choices[0] if hasattr(item, "choices") else item.low


@dataclass
class Tally:
    """What came of the inputs."""

    accepted: int = 0
    refused: int = 0
    failures: dict[str, list[int]] = field(default_factory=dict)  # kind -> seeds
    slowest_s: float = 0.0

    @property
    def failed(self) -> int:
        return sum(map(len, self.failures.values()))

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + self.failed


def try_input(given: Input) -> str | None:
    """None for an accepted input, "" for one that is refused in order; else what is wrong."""
    from hpo.errors import HpoError

    began = time.monotonic()
    try:
        plan_of(given)
        outcome = None
    except HpoError as error:
        outcome = "" if 0 < len(str(error)) < LONGEST else f"a message of {len(str(error))} characters"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [each for each in traceback.extract_tb(error.__traceback__) if "site-packages" not in each.filename][-1]
        text = str(error).splitlines()[0][:80] if str(error) else ""
        return (
            f"{type(error).__name__} in {Path(ours.filename).name}:{ours.lineno} ({Path(last.filename).name}): {text}"
        )
    return f"it took {SLOW_S:g} s" if time.monotonic() - began > SLOW_S else outcome


def fuzz(
    seeds: Callable[[], int | None], keep: Path | None = None, report: Callable[[str, int], None] = lambda *_: None
) -> Tally:
    """Try inputs until there is no further seed."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as top:
        valid, folder = Path(top) / "valid", Path(top) / "input"
        valid.mkdir()
        write_data(valid)
        while (seed := seeds()) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(valid, folder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = make_input(seed, folder)
                began = time.monotonic()
                outcome = try_input(given)
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
            if outcome is None:
                tally.accepted += 1
            elif not outcome:
                tally.refused += 1
            else:
                known = tally.failures.setdefault(outcome, [])
                known.append(seed)
                if len(known) == 1:
                    report(outcome, seed)
                    if keep is not None:
                        shutil.copytree(folder, keep / str(seed))
                        (keep / str(seed) / "overrides").write_text("\n".join(given.overrides))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the others follow")
    parser.add_argument("--only", type=int, help="try the input of this seed alone, and show its traceback")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of the failures")
    given = parser.parse_args()
    os.environ.setdefault("HPO_HOME", tempfile.mkdtemp())
    if given.only is not None:
        folder = Path(tempfile.mkdtemp())
        write_data(folder)
        again = make_input(given.only, folder)
        print(again.study.read_bytes()[:3000].decode(errors="replace"), again.overrides, f"in {folder}", sep="\n")
        plan_of(again)
        return
    count, end = iter(range(given.seed, sys.maxsize)), time.monotonic() + 60 * given.minutes
    tally = fuzz(
        lambda: next(count) if time.monotonic() < end else None,
        given.keep,
        lambda outcome, seed: print(f"seed {seed}: {outcome}", flush=True),
    )
    print(
        f"{tally.tried} inputs: {tally.accepted} accepted, {tally.refused} refused, {tally.failed} failures of "
        f"{len(tally.failures)} kinds; slowest {tally.slowest_s:.1f} s"
    )
    for outcome, seeds in tally.failures.items():
        print(f"{len(seeds):5} x {outcome} (seed {seeds[0]})")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
