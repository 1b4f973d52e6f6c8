"""Whether models are as good as they are said to be: what finals and the best trial's value promise, and what comes.

    python benchmarks/finals.py FOLDER [--sets NAME …] [--seeds 0 1 2] [--trials 40] [--minutes 15] [--finalists 3]
                                [--repeats 3] [--workers 2] [--code CHECKOUT] [--lines FILE] [--redraw]
    python benchmarks/finals.py FOLDER --table [--lines FILE]

FOLDER holds NAME_train.npz and NAME_test.npz. Each study has the same file: metric accuracy, all defaults, finals. The
promoted model is tested on the official test part, which tuning never sees. By study: the value by which it was
selected, the mean of its fresh values with their 95 % interval, the test score, and the seconds that search and finals
took; the test score of the default configuration alone, which is the study's first trial, as a study of one trial; and
that of the same finals promoted as a greedy ensemble. Then, over all: how often the interval holds the test score, by
how much what was promised is too good, for the fresh mean and for the selected value, how often the promoted model is
worse than the default one beyond noise (two standard errors of the difference of two shares of the test part), and the
expected calibration error on the test part before and after calibration. Each line is appended to FILE; what is there
already is not run again.

Official parts may differ in kind, as when others recorded them, and no interval knows of that. With --redraw each study
has parts of the same sizes, drawn by its seed from both together, class by class.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import quality


def study(given: argparse.Namespace, name: str, seed: int, scratch: Path) -> dict[str, Any] | None:
    """The line of one study; None where the time was over before its finals were."""
    if given.redraw:
        redraw(given.folder / name, scratch / name, seed)
    whole = f"trials = {given.trials}\nfinalists = {given.finalists}\nrepeats = {given.repeats}"
    found = _launched(given, scratch, name, f"{name}-{seed}", seed, whole)
    if found["estimate"] is None:
        return None
    trials = [_trials(given, scratch, each) for each in (f"{name}-{seed}", f"{name}-{seed}/finals")]
    first = {key.removeprefix("params."): value for key, value in trials[0][0].items() if key.startswith("params.")}
    enqueue = [f"{key} = {json.dumps(value)}" for key, value in first.items() if value is not None]
    asked = "trials = 1\nfinalists = 0\n[[enqueue]]\n" + "\n".join(enqueue)
    default = _launched(given, scratch, name, f"{name}-{seed}-default", seed, asked)
    # the study is over: its finals are promoted anew
    together = _launched(given, scratch, name, f"{name}-{seed}", seed, f'{whole}\n[promote]\nensemble = "greedy"')
    model = json.loads((Path(found["model"]["path"]) / "config.json").read_text())
    return {
        "set": name,
        "seed": seed,
        "test": found["test"]["accuracy"],
        "validation": found["validation"]["accuracy"],
        "validated": len(np.load(given.folder / f"{name}_train.npz", allow_pickle=False)["y"]),
        "default": default["test"]["accuracy"],
        "greedy": together["test"]["accuracy"],
        "greedy_mb": together["footprint"]["size_mb"] / found["footprint"]["size_mb"],
        "tested": len(np.load(given.folder / f"{name}_test.npz", allow_pickle=False)["y"]),
        "selected": found["estimate"]["selected"],
        "fresh": found["estimate"]["value"],
        "interval": found["estimate"]["interval"],
        "values": found["estimate"]["values"],
        "ece": [model["calibration"]["test"][when]["ece"] for when in ("before", "after")],
        "best": found["best"]["number"],
        "seconds": found["seconds"],
        "trained": [round(sum(trial["training_seconds"] or 0.0 for trial in each), 1) for each in trials],
    }


def _launched(given: argparse.Namespace, scratch: Path, name: str, study: str, seed: int, asked: str) -> dict[str, Any]:
    """The summary of a study over that set."""
    path, data = scratch / "study.toml", (scratch if given.redraw else given.folder.resolve()) / name
    path.write_text(
        f'[data]\ntrain = "{data}_train.npz"\ntest = "{data}_test.npz"\n'
        f'[study]\nname = "{study}"\nmetric = "accuracy"\nseed = {seed}\ntimeout = "{given.minutes}m"\n{asked}\n'
    )
    done = quality.run(given, scratch, "launch", str(path), "--workers", str(given.workers), "--json", "--quiet")
    found: dict[str, Any] = json.loads(done.splitlines()[-1])
    return found


def redraw(source: Path, target: Path, seed: int) -> None:
    """Write NAME_train.npz and NAME_test.npz with as many sequences of each class, drawn from both parts together."""
    parts = [np.load(f"{source}_{part}.npz", allow_pickle=False) for part in ("train", "test")]
    steps = max(each["X"].shape[1] for each in parts)
    together = {name: np.concatenate([each[name] for each in parts]) for name in ("y", "lengths")}
    padded = [np.pad(each["X"], ((0, 0), (0, steps - each["X"].shape[1]), (0, 0))) for each in parts]
    classes, random = together["y"], np.random.default_rng(seed)
    is_train = np.zeros(len(classes), bool)
    for each in np.unique(classes):
        wanted = np.count_nonzero(parts[0]["y"] == each)
        is_train[random.permutation(np.flatnonzero(classes == each))[:wanted]] = True
    for part, rows in (("train", is_train), ("test", ~is_train)):
        kept = {name: values[rows] for name, values in together.items()}
        np.savez(f"{target}_{part}.npz", X=np.concatenate(padded)[rows], **kept)  # type: ignore[arg-type]


def _trials(given: argparse.Namespace, scratch: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(quality.run(given, scratch, "trials", "list", name, "--format", "json"))
    return found


def measure(given: argparse.Namespace, sets: list[str], lines: list[dict[str, Any]]) -> None:
    """Every study that is not among `lines` yet."""
    done = {(line["set"], line["seed"]) for line in lines}
    with tempfile.TemporaryDirectory(prefix="finals-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o711)  # root's server runs as another user
        try:
            for seed, name in [(seed, name) for seed in given.seeds for name in sets if (name, seed) not in done]:
                line = study(given, name, seed, scratch)
                if line is None:
                    print(f"{name} {seed}: no estimate, as no finals ended in {given.minutes} minutes", flush=True)
                    continue
                lines.append(line)
                print(json.dumps(line), flush=True)
                with given.lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        finally:
            quality.run(given, scratch, "db", "stop")


def table(lines: list[dict[str, Any]]) -> None:
    """A row a study; then what was promised against what came."""
    print(
        "| set | seed | selected | fresh mean | 95 % interval | test | holds it | default | search, finals (s) |\n"
        + "|---" * 9
        + "|"
    )
    for line in sorted(lines, key=lambda each: (each["set"], each["seed"])):
        low, high = line["interval"]
        search_s, finals_s = line["trained"]
        held = "yes" if _holds(line) else "no"
        print(
            f"| {line['set']} | {line['seed']} | {line['selected']:.3f} | {line['fresh']:.3f} "
            f"| {low:.3f} to {high:.3f} | {line['test']:.3f} | {held} | {line['default']:.3f} "
            f"| {search_s:.0f}, {finals_s:.0f} |"
        )
    print(f"\nThe interval holds the test score in {sum(map(_holds, lines))} of {len(lines)} studies.")
    for what in ("fresh", "selected"):
        excess = [line[what] - line["test"] for line in lines]
        mean, absolute = statistics.mean(excess), statistics.mean(map(abs, excess))
        print(
            f"{what}: {100 * mean:+.2f} points from the test score on average, {100 * absolute:.2f} in absolute terms"
        )
    errors = [line["ece"] for line in lines if "ece" in line]  # earlier lines have none
    if errors:
        before, after = (100 * statistics.mean(column) for column in zip(*errors, strict=True))
        print(f"ECE on the test part of {len(errors)} studies: {before:.1f} % before calibration, {after:.1f} % after.")
    if greedy := [line for line in lines if "greedy" in line]:
        gain = 100 * statistics.mean(line["greedy"] - line["test"] for line in greedy)
        size = statistics.mean(line["greedy_mb"] for line in greedy)
        print(f"A greedy ensemble: {gain:+.2f} points on test, {size:.1f} times as large ({len(greedy)} studies).")
    worse = [f"{line['set']} {line['seed']}" for line in lines if _is_worse(line)]
    print(f"Worse than the default configuration beyond noise: {len(worse)} ({', '.join(worse) or 'none'}).")


def _is_worse(line: dict[str, Any]) -> bool:
    variance = sum(share * (1 - share) for share in (line["test"], line["default"])) / line["tested"]
    return bool(line["default"] - line["test"] > 2 * math.sqrt(variance))


def _holds(line: dict[str, Any]) -> bool:
    low, high = line["interval"]
    return bool(low <= line["test"] <= high)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--sets", nargs="+")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--trials", type=int, default=40)
    options.add_argument("--minutes", type=int, default=15)
    options.add_argument("--finalists", type=int, default=3)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--code", type=Path, default=quality.HERE)
    options.add_argument("--lines", type=Path, default=Path("finals.jsonl"))
    options.add_argument("--redraw", action="store_true")
    options.add_argument("--table", action="store_true")
    given = options.parse_args()
    sets = given.sets or sorted(path.name.removesuffix("_train.npz") for path in given.folder.glob("*_train.npz"))
    lines = [json.loads(line) for line in given.lines.read_text().splitlines()] if given.lines.exists() else []
    if not given.table:
        measure(given, sets, lines)
    table(lines)


if __name__ == "__main__":
    main()
