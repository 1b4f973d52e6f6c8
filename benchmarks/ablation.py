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
from hpo.models.data.gaps import inputs
from hpo.models.data.readers import read
from hpo.models.data.sequences import Sequences
from hpo.models.data.splits import split_folds, split_share
from hpo.models.fields import rules
from hpo.models.training.training import Training
from hpo.study.config import FOLDS, VALIDATION_LEAST, VALIDATION_SHARE
from hpo.trial.build import lstm_kernel

Params = dict[str, Any]
BASE: Params = {  # the second of the portfolio
    "normalization": "channel", "difference": True, "stem": "conv", "stem_layers": 3, "stem_width": 64,
    "stem_kernel": 5, "stem_stride": 2, "hidden_size": 64, "layers": 1, "bidirectional": True, "pooling": "max",
    "skip": True, "head_size": 0, "batch_size": 16, "learning_rate": 4e-3, "weight_decay": 1e-2, "schedule": "cosine",
    "label_smoothing": 0.1,
}  # fmt: skip
FOLDED: Params = {"stem": "patch", "patch_length": 4}
PLAIN: Params = {**BASE, **FOLDED, "difference": False, "skip": False, "label_smoothing": 0.0}  # before there was more
VARIANTS: dict[str, Params] = {
    "plain": PLAIN,
    "plain + stem": {**BASE, "difference": False, "skip": False, "label_smoothing": 0.0},
    "plain + difference": {**PLAIN, "difference": True},
    "plain + skip": {**PLAIN, "skip": True},
    "plain + smoothing": {**PLAIN, "label_smoothing": 0.1},
    "plain + concat": {**PLAIN, "pooling": "concat"},
    "plain + mixup": {**PLAIN, "mixup": 0.2},
    "plain + jitter": {**PLAIN, "jitter": 0.1},
    "base": BASE,
    "base - stem": {**BASE, **FOLDED},
    "base - stem, patches of 2": {**BASE, "stem": "patch", "patch_length": 2},
    "base - difference": {**BASE, "difference": False},
    "base - skip": {**BASE, "skip": False},
    "base - smoothing": {**BASE, "label_smoothing": 0.0},
    "one convolution of 8": {**BASE, "stem_layers": 1, "stem_kernel": 8},
    "two convolutions of 7": {**BASE, "stem_layers": 2, "stem_kernel": 7},
    "four convolutions of 3": {**BASE, "stem_layers": 4, "stem_kernel": 3},
    "kernels of 3": {**BASE, "stem_kernel": 3},
    "kernels of 7": {**BASE, "stem_kernel": 7},
    "32 channels": {**BASE, "stem_width": 32},
    "128 channels": {**BASE, "stem_width": 128},
    "stride 1": {**BASE, "stem_stride": 1},
    "stride 4": {**BASE, "stem_stride": 4},
    "concat": {**BASE, "pooling": "concat"},
    "mean": {**BASE, "pooling": "mean"},
    "last": {**BASE, "pooling": "last"},
    "attention": {**BASE, "pooling": "attention"},
    "mixup": {**BASE, "mixup": 0.2},
    "jitter of 0.05": {**BASE, "jitter": 0.05},
    "mixup, jitter of 0.05": {**BASE, "mixup": 0.2, "jitter": 0.05},
    "by sequence": {**BASE, "normalization": "sequence"},
    "one direction": {**BASE, "bidirectional": False},
    "two layers": {**BASE, "layers": 2, "dropout": 0.2},
    "hidden head": {**BASE, "head_size": 128, "dropout": 0.3},
    "32 units": {**BASE, "hidden_size": 32},
    "128 units": {**BASE, "hidden_size": 128},
    "rate / 2": {**BASE, "learning_rate": 2e-3},
    "rate * 2": {**BASE, "learning_rate": 8e-3},
    "decay / 100": {**BASE, "weight_decay": 1e-4},
    "decay * 10": {**BASE, "weight_decay": 0.1},
    "batches of 8": {**BASE, "batch_size": 8},
    "batches of 32": {**BASE, "batch_size": 32},
    "150 epochs, patience 30": {**BASE, "epochs": 150, "patience": 30},
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
            found = model.probabilities(torch.from_numpy(inputs(test, classifier)), torch.from_numpy(test.lengths))
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
