"""How good promoted models are by default: whole studies through the command line, against published figures.

    python benchmarks/quality.py FOLDER [--sets NAME …] [--seeds 0 1 2] [--minutes 15] [--trials 60] [--workers 2]
                                 [--label after] [--code CHECKOUT] [--lines FILE] [--change study.parallel=4 …]
    python benchmarks/quality.py FOLDER --table [--lines FILE]

FOLDER holds NAME_train.npz, NAME_test.npz and scoreboard.json (by set: `lstm_hybrid`, an LSTM hybrid's published
accuracy, and `best_known`). Each study has the same file: metric accuracy, all defaults, that many trials and minutes.
Its promoted model is tested on the official test part, which tuning never sees. Each line is appended to FILE as it is
found, and what is there already is not run again. `--code` runs another version's checkout, `--change` other settings
of the study, each under another label; then `--table` sets them side by side, with the mean rank of each over the sets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
ROUNDED = 5e-4  # published figures have three digits
PUBLISHED = {"lstm_hybrid": "LSTM hybrid", "best_known": "best known"}


def study(given: argparse.Namespace, name: str, seed: int, scratch: Path) -> dict[str, Any]:
    """The summary of one study."""
    path, data = scratch / "study.toml", given.folder.resolve() / name
    path.write_text(
        f'[study]\nname = "{name}-{seed}"\nmetric = "accuracy"\ntrials = {given.trials}\n'
        f'timeout = "{given.minutes}m"\nseed = {seed}\n'
        f'[data]\ntrain = "{data}_train.npz"\ntest = "{data}_test.npz"\n'
    )
    changes = [part for each in given.change for part in ("--set", each)]
    done = run(given, scratch, "launch", str(path), *changes, "--workers", str(given.workers), "--json", "--quiet")
    found: dict[str, Any] = json.loads(done.splitlines()[-1])
    return found


def run(given: argparse.Namespace, scratch: Path, *arguments: str) -> str:
    """What a command of that version prints."""
    environment = os.environ | {"HPO_HOME": str(scratch / "home"), "PYTHONPATH": str(given.code.resolve())}
    command = [sys.executable, "-P", "-m", "hpo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def measure(given: argparse.Namespace, sets: list[str], lines: list[dict[str, Any]]) -> None:
    """Every study that is not among `lines` yet."""
    done = {(line["label"], line["set"], line["seed"]) for line in lines}
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o711)  # root's server runs as another user
        try:
            for seed, name in [(seed, name) for seed in given.seeds for name in sets]:
                if (given.label, name, seed) in done:
                    continue
                found = study(given, name, seed, scratch)
                line = {"label": given.label, "set": name, "seed": seed, "test": found["test"]["accuracy"]}
                line |= {"validation": found["best"]["value"], "trials": found["trials"], "seconds": found["seconds"]}
                line |= {"best": found["best"]["number"]}
                lines.append(line)
                print(json.dumps(line), flush=True)
                with given.lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        finally:
            run(given, scratch, "db", "stop")


def table(sets: list[str], lines: list[dict[str, Any]], published: Mapping[str, Mapping[str, float]]) -> None:
    """By set: the mean of the seeds of every label, and the published figures; then means, counts and mean ranks."""
    labels = list(dict.fromkeys(line["label"] for line in lines))
    columns: dict[str, dict[str, float]] = {label: {} for label in labels}
    for label, name in [(label, name) for label in labels for name in sets]:
        if own := [line["test"] for line in lines if (line["label"], line["set"]) == (label, name)]:
            columns[label][name] = statistics.mean(own)
    sets = [name for name in sets if all(name in column for column in columns.values())]
    columns |= {title: {name: published[name][key] for name in sets} for key, title in PUBLISHED.items()}
    print("| set | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
    for name in sets:
        print(f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns.values()) + " |")
    rows = {
        "mean": lambda own: f"{statistics.mean(own[name] for name in sets):.4f}",
        "mean rank": lambda own: f"{statistics.mean(_rank(own, columns, name) for name in sets):.2f}",
    }
    for key, title in PUBLISHED.items():
        rows[f"at or above the {title}"] = lambda own, key=key: str(
            sum(own[name] >= published[name][key] - ROUNDED for name in sets)
        )
    for title, of in rows.items():
        print(f"| {title} | " + " | ".join(of(column) for column in columns.values()) + " |")


def _rank(own: Mapping[str, float], columns: Mapping[str, Mapping[str, float]], name: str) -> float:
    """From 1, the best; those that are equal share the mean of their ranks."""
    better = sum(other[name] > own[name] for other in columns.values())
    equal = sum(other[name] == own[name] for other in columns.values())
    return better + (equal + 1) / 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--sets", nargs="+")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--minutes", type=int, default=15)
    options.add_argument("--trials", type=int, default=60)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--label", default="after")
    options.add_argument("--code", type=Path, default=HERE)
    options.add_argument("--lines", type=Path, default=Path("quality.jsonl"))
    options.add_argument("--change", nargs="+", default=[], help="settings, as `hpo launch` takes them")
    options.add_argument("--table", action="store_true")
    given = options.parse_args()
    published = json.loads((given.folder / "scoreboard.json").read_text())
    sets = given.sets or list(published)
    lines = [json.loads(line) for line in given.lines.read_text().splitlines()] if given.lines.exists() else []
    if not given.table:
        measure(given, sets, lines)
    table(sets, lines, published)


if __name__ == "__main__":
    main()
