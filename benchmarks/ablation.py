"""What each part of the network and of its training is worth: fixed configurations on the development sets.

    python benchmarks/ablation.py FOLDER [--sets …] [--seeds 0 1 2] [--only NAME …] [--lines FILE]

FOLDER holds NAME_train.npz, NAME_test.npz and scoreboard.json. Each configuration is trained as a trial is (the folds
and the best epochs of a default study) and tested as a promoted model is, without a search: test accuracy of the
folds' average, and seconds of the trial on one thread. Each line is appended to FILE as it is found, and what is
there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.readers import read
from hpo.models.data.sequences import Sequences
from hpo.models.data.splits import split_folds, split_share
from hpo.models.fields import rules
from hpo.models.training.training import Training
from hpo.study.config import FOLDS, VALIDATION_LEAST, VALIDATION_SHARE
from hpo.trial.build import lstm_kernel

Params = dict[str, Any]
PLAIN: Params = {  # a good configuration of the plain network
    "hidden_size": 64, "layers": 1, "bidirectional": True, "pooling": "max", "normalization": "channel",
    "patch_length": 1, "batch_size": 16, "learning_rate": 4e-3, "weight_decay": 1e-2, "schedule": "cosine",
}  # fmt: skip
FOLDED = {**PLAIN, "patch_length": 4}
CONV1 = {"stem": "conv", "stem_layers": 1, "stem_kernel": 8, "stem_stride": 4, "patch_length": 1}
CONV2 = {"stem": "conv", "stem_layers": 2, "stem_kernel": 7, "stem_stride": 2, "patch_length": 1}
FULL = {**PLAIN, **CONV2, "pooling": "concat", "difference": True, "label_smoothing": 0.1}
VARIANTS: dict[str, Params] = {
    "plain": PLAIN,
    "plain, folded": FOLDED,
    "folded + concat": {**FOLDED, "pooling": "concat"},
    "folded + difference": {**FOLDED, "difference": True},
    "folded + smoothing": {**FOLDED, "label_smoothing": 0.1},
    "folded + mixup": {**FOLDED, "mixup": 0.2},
    "folded + jitter": {**FOLDED, "jitter": 0.1},
    "plain + conv 8/4": {**PLAIN, **CONV1},
    "plain + conv 7, 7/2": {**PLAIN, **CONV2},
    "full": FULL,
    "full - stem": {**FULL, "stem": "none"},
    "full - stem, folded": {**FULL, "stem": "patch", "patch_length": 4},
    "full - concat (max)": {**FULL, "pooling": "max"},
    "full - concat (mean)": {**FULL, "pooling": "mean"},
    "full - concat (attention)": {**FULL, "pooling": "attention"},
    "full - concat (last)": {**FULL, "pooling": "last"},
    "full - difference": {**FULL, "difference": False},
    "full - smoothing": {**FULL, "label_smoothing": 0.0},
    "full + mixup": {**FULL, "mixup": 0.2},
    "full + jitter": {**FULL, "jitter": 0.05},
    "full + mixup, jitter": {**FULL, "mixup": 0.2, "jitter": 0.1},
    "full, conv 8/4": {**FULL, **CONV1},
    "full, conv 5, 5/2": {**FULL, "stem_kernel": 5},
    "full, conv 9, 9/2": {**FULL, "stem_kernel": 9},
    "full, conv 7, 7/4": {**FULL, "stem_stride": 4},
    "full, conv of 32": {**FULL, "stem_width": 32},
    "full, conv of 128": {**FULL, "stem_width": 128},
    "full, by sequence": {**FULL, "normalization": "sequence"},
    "full, one direction": {**FULL, "bidirectional": False},
    "full, two layers": {**FULL, "layers": 2, "dropout": 0.2},
    "full, hidden head": {**FULL, "head_size": 128, "dropout": 0.3},
    "full, 32 units": {**FULL, "hidden_size": 32},
    "full, 128 units": {**FULL, "hidden_size": 128},
    "full, rate / 2": {**FULL, "learning_rate": 2e-3},
    "full, rate * 2": {**FULL, "learning_rate": 8e-3},
    "full, decay / 100": {**FULL, "weight_decay": 1e-4},
    "full, decay * 10": {**FULL, "weight_decay": 0.1},
    "full, batches of 8": {**FULL, "batch_size": 8},
    "full, batches of 32": {**FULL, "batch_size": 32},
}


def measured(train: Sequences, test: Sequences, params: Params, seed: int) -> dict[str, float]:
    """One trial and its test."""
    own = rules(ClassifierConfig)
    shape: Params = {"features": train.n_features, "classes": len(train.classes), "steps": train.steps}
    classifier = ClassifierConfig(**shape, **{name: value for name, value in params.items() if name in own})
    config = TrainingConfig(
        metric="accuracy", seed=seed, **{name: value for name, value in params.items() if name not in own}
    )
    few = train.n * VALIDATION_SHARE < VALIDATION_LEAST
    parts = split_folds(train, FOLDS, seed) if few else split_share(train, VALIDATION_SHARE, seed)
    started = time.perf_counter()
    with Training(train, parts, classifier, config, kernel=lstm_kernel()) as training:
        while not training.finished:
            training.advance()
    seconds = time.perf_counter() - started
    assert training.best is not None
    members = []
    for weights in training.best_weights:
        model = Classifier(classifier).eval()
        model.load_state_dict(weights)
        with torch.inference_mode():
            found = model.probabilities(torch.from_numpy(test.values), torch.from_numpy(test.lengths))
        members.append(found.numpy())
    accuracy = float((np.mean(members, 0).argmax(1) == test.labels).mean())
    return {"test": accuracy, "validation": training.best.value, "seconds": seconds}


def table(lines: list[dict[str, Any]], sets: list[str], chosen: list[str]) -> None:
    """Mean over sets of the mean over seeds, the deviation over seeds of the mean over sets, and each set."""
    print("| configuration | mean | spread | seconds | " + " | ".join(sets) + " |\n|" + "---|" * (4 + len(sets)))
    for variant in chosen:
        own = [line for line in lines if line["variant"] == variant and line["set"] in sets]
        by_set = {name: [line for line in own if line["set"] == name] for name in sets}
        if not all(by_set.values()):
            continue
        means = [statistics.mean(line["test"] for line in found) for found in by_set.values()]
        seeds = {line["seed"] for line in own}
        by_seed = [statistics.mean(line["test"] for line in own if line["seed"] == seed) for seed in seeds]
        spread = f"{statistics.stdev(by_seed):.3f}" if len(by_seed) > 1 else ""
        seconds = statistics.mean(line["seconds"] for line in own)
        shown = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {variant} | {statistics.mean(means):.4f} | {spread} | {seconds:.1f} | {shown} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--sets", nargs="+")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options.add_argument("--lines", type=Path, default=Path("ablation.jsonl"))
    given = options.parse_args()
    torch.set_num_threads(1)
    sets = given.sets or list(json.loads((given.folder / "scoreboard.json").read_text()))
    lines = [json.loads(line) for line in given.lines.read_text().splitlines()] if given.lines.exists() else []
    done = {(line["set"], line["variant"], line["seed"]) for line in lines}
    for seed in given.seeds:
        for variant in given.only:
            for name in sets:
                if (name, variant, seed) in done:
                    continue
                train = read(given.folder / f"{name}_train.npz", labeled=True)
                test = read(given.folder / f"{name}_test.npz", labeled=True, classes=train.classes)
                found = measured(train, test, VARIANTS[variant], seed)
                lines.append({"set": name, "variant": variant, "seed": seed, **found})
                with given.lines.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    table(lines, sets, given.only)


if __name__ == "__main__":
    main()
