"""The main job on real data that ships with the project: tune, promote, export, predict."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hpo.errors import HpoError
from hpo.launcher.launch import launch
from hpo.models.bundle.bundle import load as load_bundle
from hpo.models.bundle.export import export
from hpo.models.data.readers import read
from hpo.storage.database import database_url
from hpo.storage.home import own_folder
from hpo.storage.trials import trial_storage
from hpo.study.config import load
from hpo.terminal import ProgressDisplay, show_predictions, show_summary

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


class DemoError(HpoError):
    """The demo's data did not come with this installation."""


def run(workers: int | None, trials: int) -> None:
    """Tune ItalyPowerDemand in a new study, then export its best model and predict with the exported folder."""
    study_file = EXAMPLES / "italy.toml"
    if not study_file.exists():
        raise DemoError(f"the demo needs {study_file}, which an installation from a source checkout has")
    console = Console(highlight=False, soft_wrap=True)
    console.print("ItalyPowerDemand: is a day's power demand, hour by hour, one of summer or of winter?")
    config = load(study_file)
    name = _new_name(config.study.name)
    config = replace(config, study=replace(config.study, name=name, trials=trials))
    with ProgressDisplay() as progress:
        summary = launch(config, workers=workers, show=progress.update)
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
    hpo = os.path.relpath(Path(shutil.which("hpo") or ".venv/bin/hpo"))
    return f"""
test AUROC {summary["test"]["auroc"]:.4f} (1,029 days that tuning never saw)
exported model   {folder}
logs             {summary["logs"]}

Try next:
  {hpo} dashboard                         # every trial, on http://127.0.0.1:8080
  {hpo} models
  {hpo} predict {folder} {data}
  {hpo} export {name} --out italy-onnx --format onnx   # needs the extra: pip install 'hpo[onnx]'
  {hpo} launch examples/vowels.toml       # nine speakers, sequences of 7 to 29 steps
  {hpo} launch your-data.npz              # your own file
"""
