"""The registry of promoted models on a real Postgres, and the way of a model's files through the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hpo.storage.artifacts import ArtifactStore, MissingArtifactError, artifact_store
from hpo.storage.registry import ModelVersion, Registry, RegistryError, materialise, publish


@pytest.fixture
def registry(database_url: str) -> Registry:
    return Registry(database_url)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return artifact_store(str(tmp_path / "store"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


def promote(registry: Registry, name: str = "power", trial: int = 3, **changes: Any) -> ModelVersion:
    given: dict[str, Any] = {
        "study_id": 7,
        "study_name": "power",
        "trial_number": trial,
        "scores": {"validation": {"auroc": 0.1 + 0.2}},
        "config": {"params": {"layers": 2}},
        "artifacts": {"model.safetensors": f"key-{trial}"},
    }
    return registry.promote(name, **(given | changes))


def test_versions_count_up_within_a_name_and_the_newest_is_the_latest(registry: Registry) -> None:
    assert [promote(registry, trial=trial).version for trial in (3, 9)] == [1, 2]
    assert promote(registry, "other").version == 1
    model = registry.get("power")
    assert (model.version, model.trial_number, model.aliases) == (2, 9, ("latest",))
    assert [(model.name, model.version) for model in registry.models()] == [
        ("other", 1),
        ("power", 1),
        ("power", 2),
    ]


def test_a_version_reads_back_as_it_was_promoted(registry: Registry) -> None:
    promoted = promote(registry)
    read = registry.get("power", 1)
    assert read == promoted
    assert read.scores == {"validation": {"auroc": 0.1 + 0.2}}  # to the bit
    assert read.artifacts == {"model.safetensors": "key-3"}
    assert abs(read.created_at - datetime.now(UTC)) < timedelta(minutes=5)
    with pytest.raises(FrozenInstanceError):
        read.version = 2  # type: ignore[misc]


def test_a_report_that_says_something_else_by_now_makes_no_version(registry: Registry) -> None:
    weights = {"model.safetensors": "key-3"}
    first = promote(registry, artifacts={**weights, "report.html": "a", "SHA256SUMS": "of a"})
    newest = {**weights, "report.html": "b", "SHA256SUMS": "of b"}  # the earlier one may be damaged
    assert promote(registry, artifacts=newest) == replace(first, artifacts=newest)
    assert promote(registry, artifacts=weights) == replace(first, artifacts=newest)
    assert promote(registry, artifacts={"model.safetensors": "key-4", "report.html": "a"}).version == 2


def test_a_diagnosis_is_told_by_one_question_alone(registry: Registry) -> None:
    model = promote(registry, diagnosis={"hardest": ["Ada"]})
    assert registry.diagnosis(model) == {"hardest": ["Ada"]}
    assert "Ada" not in repr(registry.models())
    assert registry.diagnosis(promote(registry, trial=4)) is None
    registry.delete("power", 1)
    assert registry.diagnosis(model) is None


def test_promoting_the_same_trial_with_the_same_files_again_keeps_its_version(registry: Registry) -> None:
    first = promote(registry)
    promote(registry, trial=4)
    assert promote(registry, scores={"validation": {"auroc": 0.9}}) == first
    assert registry.get("power").version == 2
    assert promote(registry, artifacts={"model.safetensors": "other weights"}).version == 3


def test_promoters_at_once_get_numbers_without_gap_and_one_version_for_one_trial(database_url: str) -> None:
    registries = [Registry(database_url) for _ in range(6)]
    barrier = threading.Barrier(len(registries))

    def work(index: int) -> None:
        for round_ in range(5):
            barrier.wait(60)
            promote(registries[index], trial=100 * index + round_)
            promote(registries[index], trial=1000 + round_)  # everybody's

    with ThreadPoolExecutor(len(registries)) as pool:
        list(pool.map(work, range(len(registries))))
    found = registries[0].models()
    trials = [100 * index + round_ for index in range(6) for round_ in range(5)] + [1000 + i for i in range(5)]
    assert [model.version for model in found] == list(range(1, 36))
    assert sorted(model.trial_number or 0 for model in found) == trials
    assert found[-1].aliases == ("latest",)


def test_an_alias_names_one_version_at_a_time(registry: Registry) -> None:
    for trial in (1, 2, 3):
        promote(registry, trial=trial)
    assert registry.set_alias("power", "champion", 2).version == 2
    assert registry.get("power", "champion").aliases == ("champion",)
    assert registry.set_alias("power", "champion").version == 3
    assert registry.get("power", 2).aliases == ()
    assert registry.get("power", "3").aliases == ("champion", "latest")
    assert registry.set_alias("power", "previous", "champion").version == 3


def test_an_unknown_model_or_version_is_told_with_those_that_exist(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"no model is named 'power'; there are: none yet"):
        registry.get("power")
    promote(registry)
    promote(registry, trial=4)
    with pytest.raises(RegistryError, match=r"no model is named 'gas'; there are: power"):
        registry.get("gas", 1)
    for version in (3, "champion"):
        with pytest.raises(RegistryError, match=rf"no version or alias '{version}'; there are: 1, 2 = latest"):
            registry.get("power", version)
        with pytest.raises(RegistryError, match="no version or alias"):
            registry.set_alias("power", "best", version)


def test_what_breaks_a_rule_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"a model name is 1 to 100 of .*got '../up'"):
        promote(registry, "../up")
    with pytest.raises(RegistryError, match="scores must be JSON with finite numbers"):
        promote(registry, scores={"auroc": float("nan")})
    promote(registry)
    with pytest.raises(RegistryError, match="an alias is 1 to 100"):
        registry.set_alias("power", "the best", 1)
    for alias in ("latest", "7"):
        with pytest.raises(RegistryError, match=f'an alias is neither a number nor "latest".*{alias}'):
            registry.set_alias("power", alias, 1)
    assert len(registry.models()) == 1


def test_deleting_a_version_moves_latest_and_returns_the_keys_that_nobody_needs(registry: Registry) -> None:
    for trial in (1, 2, 3):
        promote(registry, trial=trial, artifacts={"model": f"key-{trial}", "data": "shared"})
    assert registry.delete("power", 3) == ["key-3"]
    assert registry.get("power").version == 2
    with pytest.raises(RegistryError, match="no version or alias '3'"):
        registry.get("power", 3)
    assert registry.delete("power") == ["key-1", "key-2", "shared"]
    assert registry.models() == []
    with pytest.raises(RegistryError, match="no model is named 'power'"):
        registry.delete("power")


def test_a_version_that_an_alias_names_cannot_be_deleted(registry: Registry) -> None:
    for trial in (1, 2, 3):
        promote(registry, trial=trial)
    registry.set_alias("power", "champion", 1)
    for version in (1, "champion", None):
        with pytest.raises(RegistryError, match="version 1 of 'power' is what champion names: let that name another"):
            registry.delete("power", version)
    assert len(registry.models()) == 3
    registry.drop_alias("power", "champion")
    with pytest.raises(RegistryError, match="no version or alias 'champion'"):
        registry.drop_alias("power", "champion")
    with pytest.raises(RegistryError, match='"latest" names the version that the name alone means, and stays'):
        registry.drop_alias("power", "latest")
    assert registry.delete("power", 1) == ["key-1"]


def test_an_alias_that_is_set_while_its_version_is_deleted_keeps_it(
    registry: Registry, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (1, 2):
        promote(registry, trial=trial)
    looked = registry._chosen

    def then_named(*given: Any) -> ModelVersion:
        found = looked(*given)
        Registry(database_url).set_alias("power", "champion", 1)
        return found

    monkeypatch.setattr(registry, "_chosen", then_named)
    with pytest.raises(RegistryError, match="is what champion names"):
        registry.delete("power", 1)
    assert [model.version for model in registry.models()] == [1, 2]


def test_the_history_of_aliases_is_kept(registry: Registry) -> None:
    for trial in (1, 2):
        promote(registry, trial=trial)
    registry.set_alias("power", "champion", 1)
    registry.set_alias("power", "champion", 1)
    registry.set_alias("power", "champion", 2)
    registry.drop_alias("power", "champion")
    registry.delete("power")
    found = [(change.alias, change.version) for change in registry.alias_changes("power")]
    assert found == [
        ("latest", None),
        ("champion", None),
        ("champion", 2),
        ("champion", 1),
        ("latest", 2),
        ("latest", 1),
    ]


def test_a_published_folder_comes_back_whole(store: ArtifactStore, bundle: Path, tmp_path: Path) -> None:
    artifacts = publish(store, bundle, "model-7-3")
    assert sorted(artifacts) == ["config.json", "model.safetensors"]
    assert sorted(artifacts.values()) == store.keys()
    assert publish(store, bundle, "model-7-3") == artifacts
    folder = tmp_path / "deep" / "v1"
    materialise(store, artifacts, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]


def test_other_content_has_another_key(store: ArtifactStore, bundle: Path) -> None:
    before = publish(store, bundle, "model-7-3")
    (bundle / "config.json").write_text('{"a": 1}')
    after = publish(store, bundle, "model-7-3")
    assert before["model.safetensors"] == after["model.safetensors"]
    assert before["config.json"] != after["config.json"]
    assert store.get(before["config.json"]) == b"{}"


def test_a_folder_that_has_the_files_is_used_as_it_is(store: ArtifactStore, bundle: Path) -> None:
    artifacts = publish(store, bundle, "m")
    for key in artifacts.values():
        store.delete(key)
    (bundle / "predictions.csv").write_text("mine")
    materialise(store, artifacts, bundle)  # nothing is fetched: nothing is there to fetch
    assert (bundle / "predictions.csv").read_text() == "mine"


def test_a_folder_with_other_files_is_left_alone(store: ArtifactStore, bundle: Path) -> None:
    artifacts = publish(store, bundle, "m")
    (bundle / "config.json").write_text("edited")
    with pytest.raises(RegistryError, match=r"bundle is in the way: it holds other files; remove it"):
        materialise(store, artifacts, bundle)
    assert (bundle / "config.json").read_text() == "edited"
    assert [path.name for path in bundle.parent.glob(".*")] == []


def test_a_missing_or_changed_artifact_leaves_no_folder(store: ArtifactStore, bundle: Path, tmp_path: Path) -> None:
    artifacts = publish(store, bundle, "m")
    store.put(artifacts["config.json"], b"tampered")
    with pytest.raises(RegistryError, match="not what its key says"):
        materialise(store, artifacts, tmp_path / "out")
    store.delete(artifacts["config.json"])
    with pytest.raises(MissingArtifactError):
        materialise(store, artifacts, tmp_path / "out")
    with pytest.raises(RegistryError, match="plain names"):
        materialise(store, {"../out": artifacts["model.safetensors"]}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "store"]


def test_readers_at_once_share_one_folder(store: ArtifactStore, bundle: Path, tmp_path: Path) -> None:
    artifacts = publish(store, bundle, "m")
    failures: list[Exception] = []

    def fetch() -> None:
        try:
            materialise(store, artifacts, tmp_path / "out")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out", "store"]


def test_a_folder_in_a_folder_is_not_published(store: ArtifactStore, bundle: Path) -> None:
    (bundle / "nested").mkdir()
    with pytest.raises(RegistryError, match="a model folder holds files only"):
        publish(store, bundle, "m")


class TestTheDefaultVersion:
    """A launch with more trials made a second version, and the name silently went from test score 1.00 to 0.84."""

    def test_a_version_that_is_not_to_be_the_latest_leaves_the_name_as_it_is(self, registry: Registry) -> None:
        assert promote(registry, latest=False).default  # the only one
        second = promote(registry, trial=9, latest=False)
        assert not second.default
        assert registry.get("power").version == 1
        assert registry.make_default("power", second.version).default
        assert registry.get("power").version == 2

    def test_looks_at_a_test_part_are_counted_over_all_names(self, registry: Registry) -> None:
        def scores(part: str | None) -> dict[str, Any]:
            return {"test": None if part is None else {"auroc": 0.5}} | ({} if part is None else {"test_part": part})

        found = [
            promote(registry, name, trial=trial, study_id=study, scores=scores(part)).scores.get("test_looks")
            for name, trial, study, part in (
                ("one", 1, 1, "data-a"),
                ("one", 2, 1, "data-a"),
                ("two", 1, 2, "data-a"),
                ("two", 2, 2, "data-b"),
                ("none", 1, 3, None),
            )
        ]
        assert found == [1, 2, 3, 1, None]

    def test_versions_of_earlier_builds_count_by_their_study(self, registry: Registry) -> None:
        promote(registry, trial=1, scores={"test": {"auroc": 0.5}})
        promote(registry, trial=2, scores={"test": None})
        promote(registry, "other", trial=1, study_id=8, scores={"test": {"auroc": 0.5}})
        new = promote(registry, trial=3, scores={"test": {"auroc": 0.5}, "test_part": "data-a"})
        assert new.scores["test_looks"] == 2
