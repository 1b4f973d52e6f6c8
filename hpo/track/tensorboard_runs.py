"""Trials as runs of TensorBoard: a folder each with one file, whose name is the trial's and which is there whole or not
at all. So it does not matter how many write it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from hpo.storage.files import part_file
from hpo.storage.scratch import scratch_folder
from hpo.temporary import remove_abandoned
from hpo.track.ended import Ended, EndedTrial
from hpo.track.settings import TrackError

EVENTS = "events.out.tfevents.hpo-"  # begins the name of a file of ours; TensorBoard goes by its first part


def write_runs(root: Path, ended: Ended) -> Iterator[EndedTrial]:
    """Write what is not there yet below ROOT/STUDY; yields each trial before its run is written.

    Raises TrackError where the folder is not on this machine, and OSError.
    """
    if not root.is_dir():
        raise TrackError(f"there is no folder {root} on this machine: make it, or mount what the launch has written to")
    for trial in ended.trials:
        path = file_of(root, ended.study, trial)
        if not path.exists():
            yield trial
            _write(path, trial)


def file_of(root: Path, study: str, trial: EndedTrial) -> Path:
    """The one file of a trial's run."""
    folder = root / study / "finals" if trial.finals else root / study
    return folder / trial.name / f"{EVENTS}{trial.store_key}"


def _write(path: Path, trial: EndedTrial) -> None:
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    with scratch_folder() as scratch:
        _write_events(scratch, trial)
        (events,) = scratch.iterdir()
        with part_file(path) as part:
            shutil.copyfile(events, part)
    for other in folder.glob(f"{EVENTS}*"):
        if other != path:  # of an earlier study of this name
            other.unlink(missing_ok=True)


def _write_events(folder: Path, trial: EndedTrial) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    params = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in trial.params.items()
    }
    with SummaryWriter(str(folder)) as writer:
        for summary in hparams(params, dict(trial.figures)):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary, walltime=trial.started)
        for name, by_epoch in trial.series.items():
            for epoch, value in by_epoch.items():
                writer.add_scalar(name, value, epoch, walltime=trial.ended)
        for name, value in trial.figures.items():
            writer.add_scalar(name, value, walltime=trial.ended)
        writer.add_text("state", trial.tags["hpo.state"], walltime=trial.ended)
