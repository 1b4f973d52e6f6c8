"""What telling a network of gaps is worth where these say nothing by themselves: missing at random.

    python benchmarks/gaps.py FOLDER [--sets …] [--seeds 0 1 2] [--share 0.3] [--lines FILE]

FOLDER holds NAME_train.npz, NAME_test.npz and scoreboard.json. Of each set a share of the values, or of the steps, is
removed at random, from training and test part alike; the rest is as in `ablation.py`. Steps that are gone leave others
at unequal distances, whose times are known.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ablation import BASE, measured

from hpo.models.data.gaps import usual_interval
from hpo.models.data.readers import read
from hpo.models.data.sequences import Raw, Sequences, to_sequences


def without_values(data: Sequences, share: float, seed: int) -> Sequences:
    """The same with so many of its values missing, and filled."""
    values = data.values.copy()
    inside = np.arange(data.steps) < data.lengths[:, None]
    values[~inside] = np.nan
    values[np.random.default_rng(seed).random(values.shape) < share] = np.nan
    values[:, 0, 0], ends = data.values[:, 0, 0], (np.arange(data.n), data.lengths - 1)
    values[ends] = data.values[ends]  # so that each is as long as it was
    return _read(data, values, None)


def without_steps(data: Sequences, share: float, seed: int) -> Sequences:
    """The same without so many of its steps, but with the times of the others."""
    random, values = np.random.default_rng(seed), np.full(data.values.shape, np.nan, np.float32)
    times = np.full(values.shape[:2], np.nan)
    for i, length in enumerate(data.lengths.tolist()):
        kept = np.flatnonzero((random.random(length) >= share) | (np.arange(length) == length - 1))
        values[i, : len(kept)], times[i, : len(kept)] = data.values[i, kept], kept
    return _read(data, values, times)


def _read(data: Sequences, values: np.ndarray, times: np.ndarray | None) -> Sequences:
    raw = Raw("gaps", values, None, None, "sequence", range(data.n), data.ids, data.features, times=times)
    found = to_sequences(raw, data.classes, False, data.features)
    return replace(found, labels=data.labels)


GAPS = {"values": without_values, "steps": without_steps}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--sets", nargs="+")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--share", type=float, default=0.3)
    options.add_argument("--lines", type=Path, default=Path("gaps.jsonl"))
    given = options.parse_args()
    torch.set_num_threads(1)
    sets = given.sets or list(json.loads((given.folder / "scoreboard.json").read_text()))
    print("| removed | missing | mean | " + " | ".join(sets) + " |\n|" + "---|" * (3 + len(sets)))
    for kind, remove in GAPS.items():
        for missing in ("interpolate", "mask"):
            means = []
            for name in sets:
                found = []
                for seed in given.seeds:
                    train = read(given.folder / f"{name}_train.npz", labeled=True)
                    test = read(given.folder / f"{name}_test.npz", labeled=True, classes=train.classes)
                    train, test = (remove(part, given.share, 10 * seed + i) for i, part in enumerate((train, test)))
                    params = {**BASE, "missing": missing, "interval": usual_interval(train) or 0.0}
                    found.append(measured(train, test, params, seed))
                    with given.lines.open("a") as file:
                        line = {"removed": kind, "missing": missing, "set": name, "seed": seed, **found[-1]}
                        file.write(json.dumps(line) + "\n")
                means.append(statistics.mean(each["test"] for each in found))
            shown = " | ".join(f"{mean:.3f}" for mean in means)
            print(f"| {kind} | {missing} | {statistics.mean(means):.4f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
