"""Stored files are checked before they are used: a damaged one is named and made again, and no result changes."""

from __future__ import annotations

import io
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hpo.datasets import fetch_sequences
from hpo.models.bundle.bundle import load as load_bundle
from hpo.models.bundle.config import BundleError
from hpo.promote.promotion import promote_trial
from hpo.promote.versions import materialise_model, model_folder
from hpo.storage.artifacts import ArtifactError, ArtifactStore, artifact_store
from hpo.storage.registry import Registry, RegistryError
from hpo.storage.trials import trial_storage
from hpo.study.config import StudyConfig, load
from hpo.study.lifecycle import create_or_open, delete_study
from hpo.trial.context import TrialContext
from hpo.worker.worker import Worker
from tests.conftest import execute, fresh_database
from tests.postgres.test_file_faults import SPACE, Faults, Outcome, PowerLossError, faults, home, run

__all__ = ["faults"]


def flipped(content: bytes) -> bytes:
    """With another bit in the middle, of a zip archive in that of its largest entry: what lies between is not read."""
    at = len(content) // 2
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entry = archive.read(max(archive.infolist(), key=lambda each: each.file_size))
        at = content.index(entry) + len(entry) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flipped,
    "torn": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "missing": lambda _: None,
}  # fmt: skip


def damage(path: Path, kind: str) -> None:
    content = DAMAGE[kind](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.fixture
def config(study_file: Callable[..., Path], faults: Faults) -> StudyConfig:
    return load(study_file(trials=1, epochs=5, space=SPACE, study='sampler = "random"'))


@pytest.fixture
def folder(config: StudyConfig, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with home(tmp_path, "damaged", database_url, monkeypatch) as made:
        yield made


@pytest.fixture
def expected(
    config: StudyConfig, server: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """What the study comes to where nothing is damaged."""
    with fresh_database(server, template) as url, home(tmp_path, "whole", url, monkeypatch):
        return run(config, url)[0]


def stored(folder: Path, kind: str) -> list[Path]:
    """Artifacts of that kind, oldest first."""
    return sorted(folder.glob(f"artifacts/{kind}-*"), key=lambda path: path.stat().st_mtime_ns)


def without_hash(url: str, paths: list[Path]) -> list[Path]:
    """Give artifacts the keys that earlier versions gave them."""
    renamed = []
    for path in paths:
        name = re.sub(r"-[0-9a-f]{64}", "", path.name)
        for table, column in (
            ("hpo.leases", "checkpoint_key"),
            ("hpo.leases", "replaced_key"),
            ("trial_user_attributes", "value_json"),
        ):
            execute(url, f"UPDATE {table} SET {column} = replace({column}, '{path.name}', '{name}')")
        renamed.append(path.rename(path.with_name(name)))
    return renamed


def interrupted_after(checkpoints: int, config: StudyConfig, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the study until its trial has made so many checkpoints."""
    made = TrialContext.checkpoint
    left = [checkpoints]

    def checkpoint(context: TrialContext, training: object) -> None:
        made(context, training)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            raise PowerLossError

    with closing(trial_storage(url)) as storage:
        create_or_open(config, storage, artifact_store())
    worker = Worker(config.study.name, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(TrialContext, "checkpoint", checkpoint)
        with pytest.raises(PowerLossError):
            worker.run()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(("how_many", "goes_on"), [(1, "goes on after epoch 2"), (2, "starts again from its first")])
@pytest.mark.parametrize("earlier", [False, True], ids=["", "earlier version"])
def test_a_bad_checkpoint_is_dropped_by_name_and_the_trial_ends_as_without(
    kind: str, how_many: int, goes_on: str, earlier: bool, config: StudyConfig, database_url: str, folder: Path,
    expected: Outcome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A full disk left half a checkpoint, and "PytorchStreamReader failed reading zip archive" was all that one learnt
    of it (sml2h3/dddd_trainer, issue 36). One flipped bit gave another curve and other weights."""
    interrupted_after(3, config, database_url, monkeypatch)
    checkpoints = stored(folder, "checkpoint")
    assert len(checkpoints) == 2  # the last one and the one before
    if earlier:
        checkpoints = without_hash(database_url, checkpoints)
    for path in checkpoints[-how_many:]:
        damage(path, kind)
    with caplog.at_level(logging.WARNING, "hpo"):
        found, errors = run(config, database_url)
    assert (found, errors) == (expected, [])
    warnings = [record.getMessage() for record in caplog.records if "without its checkpoint" in record.getMessage()]
    assert [path.name in warning for path, warning in zip(checkpoints[::-1], warnings, strict=False)] == [
        True
    ] * how_many
    assert goes_on in warnings[-1]
    assert not any("\n" in warning or "PytorchStreamReader" in warning for warning in warnings)
    assert stored(folder, "checkpoint") == []


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("earlier", [False, True], ids=["", "earlier version"])
def test_damaged_weights_are_trained_again(
    kind: str, earlier: bool, config: StudyConfig, database_url: str, folder: Path, expected: Outcome,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run(config, database_url)
    (weights,) = stored(folder, "weights")
    if earlier:
        (weights,) = without_hash(database_url, [weights])
    with closing(trial_storage(database_url)) as storage, caplog.at_level(logging.INFO, "hpo"):
        promote_trial(storage, "waves", None)
    assert "training again" not in caplog.text
    damage(weights, kind)
    with closing(trial_storage(database_url)) as storage, caplog.at_level(logging.INFO, "hpo"):
        model = promote_trial(storage, "waves", None)
    assert (materialise_model(model) / "model.safetensors").read_bytes() == expected.weights
    assert f"the weights {weights.name}" in caplog.text


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_data_set_is_named_and_stored_again_by_its_study_file(
    kind: str, config: StudyConfig, database_url: str, folder: Path, expected: Outcome
) -> None:
    with closing(trial_storage(database_url)) as storage:
        data = folder / "artifacts" / create_or_open(config, storage, artifact_store()).plan.train
    damage(data, kind)
    with pytest.raises(ArtifactError, match=rf"{data.name}.*; launch the study file again"):
        Worker("waves", "cpu").run()
    assert run(config, database_url) == (expected, [])


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_one_line_and_stored_again_by_its_promotion(
    kind: str, config: StudyConfig, database_url: str, folder: Path, expected: Outcome
) -> None:
    """That a file exists says nothing of its content (tracel-ai/burn-central, issue 158)."""
    run(config, database_url)
    shutil.rmtree(folder / "home" / "models")
    (weights,) = [path for path in stored(folder, "model") if path.name.endswith("model.safetensors")]
    damage(weights, kind)
    with pytest.raises((RegistryError, ArtifactError), match=weights.name) as caught:
        model_folder("waves", None)
    assert "\n" not in str(caught.value)
    with closing(trial_storage(database_url)) as storage:
        model = promote_trial(storage, "waves", None)
    assert model.version == 1
    assert (materialise_model(model) / "model.safetensors").read_bytes() == expected.weights


def test_a_store_that_another_shell_names_otherwise_is_said_by_its_setting(
    config: StudyConfig, database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of a missing file said nothing to somebody who had never seen one."""
    run(config, database_url)
    shutil.rmtree(folder / "home" / "models")
    shutil.rmtree(folder / "home" / "cache")
    for given, place in [(None, "the default, as HPO_ARTIFACTS is not set"), (folder / "another", "by HPO_ARTIFACTS")]:
        monkeypatch.delenv("HPO_ARTIFACTS") if given is None else monkeypatch.setenv("HPO_ARTIFACTS", str(given))
        expected = rf" is not in \S+ \({place}\); set HPO_ARTIFACTS to the store that it was written to \(no artifact '"
        with pytest.raises(
            ArtifactError, match=rf"^waves version 1: the file \S+ of a promoted model{expected}"
        ) as caught:
            model_folder("waves", None)
        assert re.search(r"; or, `hpo promote waves --trial \d` stores it anew$", str(caught.value))
        with (
            closing(trial_storage(database_url)) as storage,
            pytest.raises(ArtifactError, match=rf"^a data set{expected}"),
        ):
            promote_trial(storage, "waves", 0)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_local_copy_of_a_model_is_fetched_again(
    kind: str, config: StudyConfig, database_url: str, folder: Path, expected: Outcome
) -> None:
    run(config, database_url)
    fetched = model_folder("waves", None)
    (fetched / "predictions.csv").write_text("mine")
    damage(fetched / "model.safetensors", kind)
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        load_bundle(fetched)
    assert model_folder("waves", None) == fetched
    load_bundle(fetched)
    assert (fetched / "model.safetensors").read_bytes() == expected.weights
    assert (fetched / "predictions.csv").read_text() == "mine"


def test_versions_of_one_name_in_two_databases_have_folders_of_their_own(
    config: StudyConfig, database_url: str, server: str, template: str, folder: Path, study_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A version's number is given by each database anew, so that it names no content."""
    mine = run(config, database_url)[0]
    first = model_folder("waves", None)
    short = first.with_name("v1")
    assert short.readlink() == Path(first.name)
    short.unlink()
    old = first.rename(first.with_name("v1"))  # as an earlier version named it
    assert model_folder("waves", None) == old
    other_config = load(study_file(trials=1, epochs=2, space=SPACE, study='sampler = "random"'))
    with fresh_database(server, template) as other:
        monkeypatch.setenv("HPO_DATABASE_URL", other)  # one home and one store
        theirs = run(other_config, other)[0]
        assert theirs.weights != mine.weights
        assert model_folder("waves", None) != old
        assert (model_folder("waves", None) / "model.safetensors").read_bytes() == theirs.weights
        assert not short.is_symlink()  # what an earlier version has fetched stays in use
    monkeypatch.setenv("HPO_DATABASE_URL", database_url)
    assert (model_folder("waves", None) / "model.safetensors").read_bytes() == mine.weights
    old.rename(first)
    assert model_folder("waves", None) == first
    assert short.resolve() == first.resolve()  # the one that was asked for last


def names(store: ArtifactStore) -> set[str]:
    return set(store.keys())


def test_studies_of_two_databases_with_one_id_share_a_store_and_deleting_one_leaves_the_other(
    config: StudyConfig, database_url: str, server: str, template: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_database(server, template) as other:
        interrupted_after(2, config, database_url, monkeypatch)
        store = artifact_store()
        mine = names(store)
        monkeypatch.setenv("HPO_DATABASE_URL", other)
        interrupted_after(2, config, other, monkeypatch)
        theirs = names(store) - mine
        assert len(theirs) == 2  # the checkpoints; the data are the same
        execute(other, "UPDATE hpo.terms SET store_key = study_id")  # as of an earlier version
        old = "weights-1-0-1.safetensors"
        store.put(old, b"of the earlier version")
        with closing(trial_storage(other)) as storage:
            delete_study(storage, store, "waves")
        assert names(store) == mine | theirs
        with closing(trial_storage(database_url)) as storage:
            delete_study(storage, store, "waves")
        assert names(store) == theirs | {name for name in mine if name.startswith("data-")}


def test_a_home_that_was_removed_is_made_again(
    config: StudyConfig, database_url: str, folder: Path, expected: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch file systems of clusters are swept while jobs run."""
    reported = TrialContext.report
    gone: list[bool] = []

    def report(context: TrialContext, epoch: object) -> None:
        reported(context, epoch)  # type: ignore[arg-type]
        if not gone:
            gone.append(True)
            shutil.rmtree(folder)

    monkeypatch.setattr(TrialContext, "report", report)
    found, errors = run(config, database_url)
    assert found == expected
    assert all("\n" not in str(error) for error in errors)
    assert gone


def test_a_data_set_in_the_cache_is_checked_when_it_was_changed(
    config: StudyConfig, database_url: str, folder: Path
) -> None:
    with closing(trial_storage(database_url)) as storage:
        study = create_or_open(config, storage, artifact_store())
    whole = fetch_sequences(artifact_store(), study.plan.train).values.copy()
    for kind in DAMAGE:
        damage(folder / "home" / "cache" / study.plan.train, kind)
        assert (fetch_sequences(artifact_store(), study.plan.train).values == whole).all()


def test_a_version_keeps_the_files_of_its_own_study(config: StudyConfig, database_url: str, folder: Path) -> None:
    run(config, database_url)
    with closing(trial_storage(database_url)) as storage:
        delete_study(storage, artifact_store(), "waves")
    (model,) = Registry(database_url).models()
    assert sorted(model.artifacts.values()) == artifact_store().keys("model-")
    load_bundle(materialise_model(model))
