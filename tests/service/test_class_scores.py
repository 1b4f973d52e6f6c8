"""Scores by class and by group over the service: the JSON, the pages, and who is told what the groups are called."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import hpo
from hpo.models.bundle.bundle import load
from hpo.models.class_scores import ModelScores, model_scores, worst_first
from hpo.storage.artifacts import FolderStore
from hpo.storage.registry import Registry, publish
from tests.service.conftest import Service, upload
from tests.service.test_page import Browser

pytestmark = pytest.mark.xdist_group("service-class-scores")
EARLIER = Path(__file__).parents[1] / "fixtures" / "before_the_redesign"


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 noisy sines of three frequencies, of which two cannot be told apart, of 16 patients."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 3, 480)
    steps = np.arange(12)
    X = np.sin(steps * np.array([0.4, 1.2, 1.2])[kind][:, None] + random.uniform(0, 6, (480, 1)))
    y = np.array(["sit", "walk", "limp"])[kind]
    path = tmp_path_factory.mktemp("data") / "gait.npz"
    groups = np.array([f"Patient {i % 16:02}" for i in range(480)])
    np.savez(path, X=X[:, :, None] + 0.1 * random.normal(size=(480, 12, 1)), y=y, groups=groups)
    return path


@pytest.fixture(scope="module", autouse=True)
def gait(service: Service, patients: Path, task: Callable[..., str]) -> None:
    """A study of ada's that is over."""
    with service.client("submit", "ada") as client:
        answer = client.post("/v1/studies", content=task("gait", upload(client, patients), 2))
        assert answer.status_code == 201, answer.text
    service.work("gait")


def scores_for(service: Service, role: str, owner: str) -> dict[str, Any]:
    with service.client(role, owner) as client:
        answer = client.get("/v1/models/gait/latest/scores")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def named(found: dict[str, Any]) -> list[str | None]:
    return [group["name"] for part in ("validation", "test") for group in found[part]["by_group"]]


def test_the_json_is_what_follows_from_the_models_folder(service: Service) -> None:
    found = scores_for(service, "read", "bob")
    with service.client() as client:
        archive = zipfile.ZipFile(io.BytesIO(client.get("/v1/models/gait/1/bundle").content))
        scores = client.get("/v1/models/gait/1").json()["scores"]
    content = json.loads(archive.read("gait/config.json"))
    assert [each["name"] for each in found["test"]["by_class"]] == ["limp", "sit", "walk"]
    for part in ("validation", "test"):
        assert found[part]["accuracy"] == pytest.approx(scores[part]["accuracy"])
        assert found[part]["sequences"] == scores["sequences"][part]
        counts = [[each["sequences"], each["right"]] for each in found[part]["by_group"]]
        assert counts == content[part]["groups"]["counts"]
        assert sum(n for n, _ in counts) == found[part]["sequences"]
        assert sum(right for _, right in counts) / found[part]["sequences"] == pytest.approx(found[part]["accuracy"])
    assert (found["validation"]["groups"], found["test"]["groups"]) == (3, 3)


def test_only_the_owner_and_admins_are_told_what_the_groups_are_called(service: Service) -> None:
    for role, owner in (("read", "ada"), ("submit", "ada"), ("admin", "root")):
        names = named(scores_for(service, role, owner))
        assert len(set(names)) == 6
        assert all(re.fullmatch(r"Patient \d\d", name or "") for name in names)
    for role in ("read", "submit"):
        assert named(scores_for(service, role, "bob")) == [None] * 6


def test_nobody_else_is_told_by_anything_that_the_service_has_of_the_model(service: Service) -> None:
    with service.client("submit", "bob") as client:
        paths = ["", "/scores", "/card", "/report"]
        told = [client.get(f"/v1/models/gait/1{path}").text for path in paths]
        told += [client.get(path).text for path in ("/v1/models", "/v1/studies/gait", "/v1/studies/gait/summary")]
        archive = zipfile.ZipFile(io.BytesIO(client.get("/v1/models/gait/1/bundle").content))
    assert not any("Patient" in text for text in told)
    assert not any(b"Patient" in archive.read(name) for name in archive.namelist())
    with Browser(service.url, service.token("submit", "bob")) as browser:
        for path in (
            "/models/gait",
            "/models/gait/1/card",
            "/models/gait/1/report",
            "/studies/gait/report",
            "/studies/gait",
            "/",
        ):
            assert "Patient" not in browser.get(path).text


def test_the_models_page_shows_classes_and_groups(service: Service) -> None:
    found = scores_for(service, "submit", "ada")
    with Browser(service.url, service.token("submit", "ada")) as browser:
        shown = browser.get("/models/gait/1").text
    table = shown[shown.index('<table class="weakest classes">') :]
    order = re.findall(r'<tr><th scope="row">(\w+)<span class="muted nowrap">(\d+ sequences?)</span>', table)
    with hpo.connect(service.url, service.token("read", "ada")) as client:
        parts = client.scores("gait")
    assert parts.test is not None
    assert [name for name, _ in order[:3]] == [each.name for each in worst_first(parts.test.by_class)]
    assert f"{found['test']['by_class'][1]['recall']:.4f}" in table
    assert set(re.findall(r"Patient \d\d", shown)) == set(named(found))
    with Browser(service.url, service.token("read", "bob")) as browser:
        other = browser.get("/models/gait/1").text
    assert "What they are called, only the study’s owner and admins are told." in other
    assert '<th scope="row"><span class="muted nowrap">' in other


def test_a_client_reads_the_same(service: Service) -> None:
    with hpo.connect(service.url, service.token("submit", "ada")) as client:
        found = client.scores("gait", 1)
        assert isinstance(found, ModelScores)
        assert json.loads(json.dumps(asdict(found))) == scores_for(service, "submit", "ada")
        folder = client.download("gait", Path(service.environment["HPO_HOME"]) / "downloaded")
    config = load(folder).config
    assert config.test is not None
    again = model_scores(config.classes, config.validation, config.test)
    assert again.test is not None
    assert found.test is not None
    assert again.test.by_class == found.test.by_class


def status(service: Service, tmp_path: Path, *options: str, owner: str = "ada", there: bool = True) -> str:
    """What `hpo status gait` says through the service, or on its database."""
    environment = {**service.environment, "HPO_HOME": str(tmp_path / "home")}
    if there:
        environment = {**environment, "HPO_SERVER": service.url, "HPO_TOKEN": service.token("read", owner)}
    command = [sys.executable, "-P", "-m", "hpo", "status", "gait", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_is_alike_there_and_here(service: Service, tmp_path: Path) -> None:
    weak = r"version 1 on the test part: accuracy 0\.\d+ of \d+ sequences, weaker on\n  class '\w+': recall 0\.\d"
    for there in (True, False):
        assert re.search(weak, status(service, tmp_path, there=there))
        (row,) = json.loads(status(service, tmp_path, "--json", there=there))
        assert row["scores"] == scores_for(service, "submit", "ada")
    (row,) = json.loads(status(service, tmp_path, "--json", owner="bob"))
    assert named(row["scores"]) == [None] * 6


def test_models_of_earlier_releases_have_what_can_be_counted_and_a_page(service: Service, tmp_path: Path) -> None:
    """One with its files, one whose config.json is gone since, and one that never had any."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("# nothing")
    folders = {"bare": tmp_path / "model", "earlier": EARLIER / "model", "lost": EARLIER / "model"}
    store, registry = FolderStore(Path(service.environment["HPO_ARTIFACTS"])), Registry(service.database_url)
    for name, folder in folders.items():
        registry.promote(
            name,
            study_id=1000,
            study_name=name,
            trial_number=0,
            scores={"metric": "auroc", "value": 0.75, "validation": {"auroc": 0.75, "log_loss": 0.5}, "test": None},
            config={"params": {}},
            artifacts=publish(store, folder, f"model-{name}"),
        )
    store.delete(registry.get("lost").artifacts["config.json"])
    with service.client("read", "bob") as client:
        found = {name: client.get(f"/v1/models/{name}/1/scores") for name in folders}
        assert found["bare"].json() == {"validation": None, "test": None}
        earlier = found["earlier"].json()["validation"]
        assert [each["name"] for each in earlier["by_class"]] == ["fast", "slow"]
        assert (earlier["groups"], earlier["by_group"]) == (None, [])
        assert found["lost"].status_code == 404
        assert "config.json" in found["lost"].json()["detail"]
        assert client.get("/v1/models/nothing/1/scores").status_code == 404
    with Browser(service.url, service.token("read", "bob")) as browser:
        for name, shown in (("bare", False), ("earlier", True), ("lost", False)):
            page = browser.get(f"/models/{name}/1")
            assert page.status_code == 200
            assert ('<table class="weakest classes">' in page.text) == shown
            assert "0.7500" in page.text


@pytest.fixture
def nobody(service: Service) -> Iterator[httpx.Client]:
    with service.with_token(None) as client:
        yield client


def test_without_a_token_nothing_is_told(nobody: httpx.Client) -> None:
    assert nobody.get("/v1/models/gait/1/scores").status_code == 401
