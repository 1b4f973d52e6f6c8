"""A study's finals at the service: with their study in lists, by routes of their own, on its pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hpo
from tests.service.conftest import Service
from tests.service.test_page import Browser

pytestmark = pytest.mark.xdist_group("service-finals")


@pytest.fixture(scope="module")
def over(service: Service, waves: Path, task: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A study of two trials and finals of four, over and promoted."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "waves.npz").write_bytes(waves.read_bytes())
    (folder / "waves.toml").write_text(task("waves", "waves.npz", 2))
    with hpo.connect(service.url, service.token()) as client:
        assert client.submit(folder / "waves.toml", ["study.finalists=2", "study.repeats=2"]).finals is None
        with pytest.raises(hpo.ServiceError, match="there is no study named 'waves/finals'"):
            client.study("waves/finals")
    service.work("waves")


@pytest.mark.usefixtures("over")
def test_they_are_shown_with_their_study_and_by_themselves(service: Service) -> None:
    with hpo.connect(service.url, service.token("read")) as client:
        (listed,) = client.studies()
        assert listed.finals is not None
        assert (listed.name, listed.status) == ("waves", "finished")
        assert listed.finals.model_dump() == {"name": "waves/finals", "ended": 4, "budget": 4}
        finals = client.study("waves/finals")
        assert (finals.name, finals.status, finals.budget, finals.owner) == ("waves/finals", "finished", 4, "ada")
        trainings = list(client.trials("waves/finals"))
        assert [each.state for each in trainings] == ["complete"] * 4
        assert client.trial("waves/finals", 3).value == trainings[3].value
        summary = client.summary("waves")
        winner = client.trial("waves", summary["best"]["number"])
        mine = [each.value for each in trainings if each.params == winner.params]
        assert summary["estimate"]["values"] == mine
        assert summary["estimate"]["selected"] == winner.value
        scores = client.model("waves").scores
        assert scores["estimate"] == summary["estimate"]
        found = scores["calibration"]["validation"]
        assert found.keys() == {"before", "after"}
        assert all(0 <= each["ece"] <= 1 and 0 <= each["brier"] <= 2 for each in found.values())


@pytest.mark.usefixtures("over")
def test_nobody_stops_resumes_or_deletes_them_by_their_own(service: Service) -> None:
    with hpo.connect(service.url, service.token()) as client:
        for change in (client.stop, client.resume, client.delete, client.promote):
            with pytest.raises(hpo.ServiceError, match=r"is not served here|Not Found"):
                change("waves/finals")
        assert client.study("waves/finals").status == "finished"


@pytest.mark.usefixtures("over")
def test_the_pages_tell_of_them(service: Service) -> None:
    with Browser(service.url, service.token()) as browser:
        study, model = browser.get("/studies/waves").text, browser.get("/models/waves/1").text
        overview = browser.get("/").text
    assert "Finals: 4 of 4 trainings of the best configurations" in study
    assert "Expect accuracy" in model or "Expect auroc" in model
    assert "the mean of 2 trainings on fresh seeds and splits" in model
    assert "on the test part (ECE;" in model
    assert "waves/finals" not in overview
