"""Every write of a file fails, is torn or is cut short by a loss of power, one after the other, in a study from its
creation to its promoted model: going on as the error says gives the same parameters, values and weights.

ALICE (Pillai et al., OSDI 2014) tests applications in this way: each one's order of writes had a state that it did not
survive.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import HpoError
from hpo.models.bundle.bundle import load as load_bundle
from hpo.promote.promotion import promote_trial
from hpo.promote.versions import model_folder
from hpo.storage.artifacts import artifact_store
from hpo.storage.registry import RegistryError
from hpo.storage.trials import trial_storage
from hpo.study.config import StudyConfig, load
from hpo.study.lifecycle import create_or_open
from hpo.trial import checkpoints
from hpo.worker.worker import Worker

SPACE = 'hidden_size = [4, 8]\nlayers = 1\nhead_size = 0\nbatch_size = 16\nstem = "patch"\ndifference = false'
TRIES = 5


class PowerLossError(BaseException):
    """What no clause catches."""


@dataclass
class Faults:
    """Counts the files and folders that take their names, and spoils one of them."""

    kind: str = ""
    at: int = 0  # which one, from 1; 0: none
    count: int = 0

    def rename(self, real: Callable[..., Any], source: Path, target: Path) -> Any:
        if not source.name.startswith(".hpo-"):
            return real(source, target)
        with _LOCK:
            self.count += 1
            number = self.count
        if number == self.at and self.kind == "fails":
            code = (errno.ENOSPC, errno.EIO, errno.EROFS)[number % 3]
            raise OSError(code, os.strerror(code), str(target))
        if number == self.at and self.kind == "cut short":
            self.leave(source)
            raise PowerLossError
        if number == self.at and self.kind == "torn":
            self.tear(source, empty=number % 2 == 0)
        if number == self.at + 1 and self.at and self.kind == "torn":
            raise PowerLossError  # so that what was torn is read
        return real(source, target)

    def tear(self, path: Path, *, empty: bool) -> None:
        """A file, or of a folder the largest one: half of it, or nothing."""
        file = max(path.iterdir(), key=lambda found: found.stat().st_size) if path.is_dir() else path
        os.truncate(file, 0 if empty else file.stat().st_size // 2)

    def leave(self, source: Path) -> None:
        """As a process that is gone leaves it: half, with a lock that nobody holds."""
        left = source.with_name(f"{source.name[: -len(source.name.rpartition('-')[2])]}{'0' * 32}.part")
        if source.is_dir():
            left.mkdir()
            (left / "half").touch()
        else:
            left.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        left.with_name(f"{left.name}.lock").touch()


_LOCK = threading.Lock()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    made = Faults()
    for name in ("replace", "rename"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda source, target, real=real: made.rename(real, source, Path(target)))
    monkeypatch.setattr(checkpoints, "FIRST_CHECKPOINT_S", 0.0)  # after every epoch
    monkeypatch.setattr(checkpoints, "CHECKPOINT_S", 0.0)
    monkeypatch.setenv("HPO_NATIVE", "0")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return made


@dataclass(frozen=True)
class Outcome:
    params: list[dict[str, Any]]
    reports: list[dict[int, float]]
    values: list[float | None]
    best: int | None
    weights: bytes


@contextmanager
def home(tmp_path: Path, name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a store of its own for the study of that name."""
    folder = tmp_path / name
    with monkeypatch.context() as patch:
        patch.setenv("HPO_DATABASE_URL", url)
        patch.setenv("HPO_HOME", str(folder / "home"))
        patch.setenv("HPO_ARTIFACTS", str(folder / "artifacts"))
        yield folder


def go_on(config: StudyConfig, url: str) -> Path:
    """What `hpo launch` does, in this process; the folder of the promoted model."""
    with closing(trial_storage(url)) as storage:
        create_or_open(config, storage, artifact_store())
    Worker(config.study.name, "cpu").run()
    folder = model_folder(config.study.name, None)
    load_bundle(folder)
    return folder


def follow(error: BaseException, config: StudyConfig, url: str) -> None:
    """Do what the error says, where that is not the same command again."""
    if isinstance(error, RegistryError) and "promote the trial again" in str(error):
        with closing(trial_storage(url)) as storage:
            promote_trial(storage, config.study.name, None)


def run(config: StudyConfig, url: str) -> tuple[Outcome, list[BaseException]]:
    """To the promoted model, whatever is in the way; the errors on it."""
    errors: list[BaseException] = []
    for _ in range(TRIES):
        try:
            folder = go_on(config, url)
            break
        except (HpoError, OSError, PowerLossError) as error:
            errors.append(error)
            follow(error, config, url)
    else:
        raise AssertionError(f"it does not come to an end: {errors}")
    with closing(trial_storage(url)) as storage:
        trials = storage.get_all_trials(storage.get_study_id_from_name(config.study.name))
        best = storage.get_best_trial(storage.get_study_id_from_name(config.study.name)).number
    weights = (folder / "model.safetensors").read_bytes()
    reports = [trial.intermediate_values for trial in trials]
    return Outcome(
        [trial.params for trial in trials], reports, [trial.value for trial in trials], best, weights
    ), errors


@pytest.mark.parametrize("kind", ["fails", "torn", "cut short"])
def test_a_fault_at_any_write_changes_neither_parameters_nor_values_nor_weights(
    kind: str,
    faults: Faults,
    study_file: Callable[..., Path],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(study_file(trials=1, epochs=3, space=SPACE, study='sampler = "random"\npruner = "none"'))

    def named(name: str) -> StudyConfig:
        return replace(config, study=replace(config.study, name=name))

    with home(tmp_path, "undisturbed", database_url, monkeypatch):
        expected, errors = run(named("undisturbed"), database_url)
    assert errors == []
    writes = faults.count
    assert writes > 15
    for at in range(1, writes + 1):
        faults.kind, faults.at, faults.count = kind, at, 0
        with home(tmp_path, f"write-{at}", database_url, monkeypatch) as folder:
            found, errors = run(named(f"write-{at}"), database_url)
            assert found == expected, (at, errors)
            assert all("\n" not in str(error) for error in errors)
            assert not list(folder.glob("artifacts/checkpoint-*")), (at, errors)
            assert not list(folder.rglob(".hpo-*")), (at, errors)
