"""The main job on real data that ships with the project: tune, promote, export, predict."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hpo.launcher.launch import launch
from hpo.models.bundle.bundle import load as load_bundle
from hpo.models.bundle.export import export
from hpo.models.data.readers import read
from hpo.storage.database import database_url
from hpo.storage.home import own_folder
from hpo.storage.trials import trial_storage
from hpo.study.config import load
from hpo.terminal import show_predictions, show_summary

EXAMPLES = (Path(__file__).parent / "examples").resolve()  # in a checkout, a link to the folder at its root


def run(workers: int | None, trials: int) -> None:
    """Tune ItalyPowerDemand in a new study, then export its best model and predict with the exported folder."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("ItalyPowerDemand: is a day's power demand, hour by hour, one of summer or of winter?")
    config = load(EXAMPLES / "italy.toml")
    name = _new_name(config.study.name)
    config = replace(config, study=replace(config.study, name=name, trials=trials))
    summary = launch(config, workers=workers)
    show_summary(summary)

    folder = own_folder("exports") / name
    export(summary["model"]["path"], folder, overwrite=True)
    bundle = load_bundle(folder)
    test = read(Path(str(config.data.test)), labeled=False)
    console.print(f"\nThe first of {test.n} days of the test part, predicted by the exported folder alone:")
    show_predictions(bundle.predict(test.take(range(5))), rows=5)
    console.print(_next_steps(name, folder, str(config.data.test), summary), markup=False)


def _new_name(name: str) -> str:
    """The name itself, or with the first number that makes it new."""
    storage = trial_storage(database_url())
    try:
        known = {study.study_name for study in storage.get_all_studies()}
    finally:
        storage.close()
    candidates = (name if number == 1 else f"{name}-{number}" for number in range(1, len(known) + 2))
    return next(candidate for candidate in candidates if candidate not in known)


def _next_steps(name: str, folder: Path, data: str, summary: Mapping[str, Any]) -> str:
    hpo = _command()
    vowels = _shown(EXAMPLES / "vowels.toml")
    return f"""
test AUROC {summary["test"]["auroc"]:.4f} (1,029 days that tuning never saw)
exported model   {folder}
logs             {summary["logs"]}

Try next:
  {hpo} dashboard                         # every trial, on http://127.0.0.1:8080
  {hpo} models
  {hpo} predict {folder} {_shown(Path(data))}
  {hpo} export {name} --out italy-onnx --format onnx   # needs the extra: pip install 'hpo[onnx]'
  {hpo} launch {vowels}       # nine speakers, sequences of 7 to 29 steps
  {hpo} launch your-data.npz              # your own file
"""


def _command() -> str:
    """What runs this hpo from here: the console script beside its Python, or its Python."""
    script = Path(sys.executable).with_name("hpo")
    if shutil.which("hpo") == str(script):
        return "hpo"
    return _shown(script) if script.exists() else f"{_shown(Path(sys.executable))} -m hpo"


def _shown(path: Path) -> str:
    """From the current folder where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)
