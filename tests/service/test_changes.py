"""Changing one's mind through the service: trials that are not to count, a wider space; by routes, client, commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hpo
from hpo.client import snapshot_of
from tests.service.conftest import Service
from tests.service.test_page import Browser

pytestmark = pytest.mark.xdist_group("service-changes")


@pytest.fixture(scope="module")
def winner(service: Service, waves: Path, task: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> int:
    """A study of three trials, over and promoted; the number of its best trial."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "waves.npz").write_bytes(waves.read_bytes())
    (folder / "waves.toml").write_text(task("waves", "waves.npz", 3))
    with hpo.connect(service.url, service.token()) as client:
        client.submit(folder / "waves.toml")
        service.work("waves")
        best = client.study("waves").best
    assert best is not None
    return best.number


def test_a_trial_is_dropped_shown_so_and_restored(service: Service, winner: int) -> None:
    with hpo.connect(service.url, service.token()) as client:
        for _ in range(2):  # as a client repeats it
            gone = client.drop("waves", winner, "another sensor").dropped
        assert gone is not None
        assert (gone.number, gone.reason, gone.by) == (winner, "another sensor", "ada")
        study = client.study("waves")
        assert study.best is not None
        assert study.best.number != winner
        assert ([each.number for each in study.dropped], study.dropped_winner) == ([winner], winner)
        assert [trial.dropped is not None for trial in client.trials("waves")] == [n == winner for n in range(3)]
        assert client.trial("waves", winner).dropped == gone
        assert client.summary("waves")["winner_dropped"] is True
        with pytest.raises(hpo.ServiceError, match=rf"trial {winner} was dropped by ada: another sensor; `hpo trials"):
            client.promote("waves", winner)
        again = client.promote("waves")
        assert (again.trial, again.version, "latest" in again.aliases) == (study.best.number, 2, True)
        study = client.study("waves")
        assert (study.version, study.dropped_winner) == (2, None)
        assert client.summary("waves")["model"]["default"] == 2
        for _ in range(2):
            assert client.restore("waves", winner).dropped is None
        best = client.study("waves").best
        assert best is not None
        assert best.number == winner
        assert client.model("waves", 1).trial == winner  # nothing was lost


def test_what_is_no_trial_no_reason_or_anothers_is_refused(service: Service, winner: int) -> None:
    path = f"/v1/studies/waves/trials/{winner}"
    with service.client() as ada, service.client(owner="eve") as eve, service.client("read") as reader:
        refused = [
            (ada.post("/v1/studies/waves/trials/17/drop", json={"reason": "x"}), 404, "trials 0 to 2, not 17"),
            (ada.post("/v1/studies/none/trials/0/drop", json={"reason": "x"}), 404, "there is no study named 'none'"),
            (ada.post(f"{path}/drop"), 422, "body"),
            (ada.post(f"{path}/drop", json={"reason": ""}), 422, "reason"),
            (ada.post(f"{path}/drop", json={"reason": " \t"}), 422, "say why in 1 to 500 characters"),
            (ada.post(f"{path}/drop", json={"reason": "a\0b"}), 422, "say why in 1 to 500 characters"),
            (eve.post(f"{path}/drop", json={"reason": "x"}), 403, "is ada's"),
            (eve.post(f"{path}/restore"), 403, "is ada's"),
            (reader.post(f"{path}/restore"), 403, "this needs the role 'submit'"),
        ]
        for answer, status, text in refused:
            assert (answer.status_code, text in answer.json()["detail"]) == (status, True), answer.text
        assert ada.get("/v1/studies/waves").json()["dropped"] == []


def test_the_commands_from_another_machine(service: Service, winner: int, tmp_path: Path) -> None:
    hidden = ("HPO_DATABASE_URL", "HPO_ARTIFACTS")
    kept = {name: value for name, value in service.environment.items() if name not in hidden}
    own = {"HPO_HOME": str(tmp_path), "HPO_SERVER": service.url, "HPO_TOKEN": service.token()}

    def run(*arguments: object) -> str:
        command = [sys.executable, "-P", "-m", "hpo", *map(str, arguments)]
        done = subprocess.run(command, env={**kept, **own}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("trials", "drop", "waves", winner, "--reason", "another sensor")
    assert f"trial {winner} of waves does not count: dropped " in said
    assert "by ada, another sensor" in said
    rows = json.loads(run("trials", "list", "waves", "--json"))
    assert [row["number"] for row in rows if row["dropped"]] == [winner]
    (line,) = [each for each in json.loads(run("trials", "list", "waves", "--format", "json")) if each["dropped"]]
    assert (line["number"], line["dropped_reason"], line["dropped_by"]) == (winner, "another sensor", "ada")
    assert (line["state"], line["epochs"], line["worker"] is None) == ("complete", rows[winner]["epochs"], False)
    assert f"waves: trial {winner} does not count" in run("status", "waves")
    said = run("trials", "restore", "waves", winner)
    assert f"trial {winner} of waves counts; the best is" in said
    assert "does not count" not in run("trials", "list", "waves")


def test_a_wider_space_is_submitted_and_a_narrower_one_is_a_conflict(
    service: Service, waves: Path, task: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "waves.npz").write_bytes(waves.read_bytes())
    (tmp_path / "waves.toml").write_text(task("wide", "waves.npz", 3))
    wider = ["space.hidden_size={ low = 4, high = 20, step = 4 }", "study.trials=5"]
    with hpo.connect(service.url, service.token()) as client:
        client.submit(tmp_path / "waves.toml")
        assert client.submit(tmp_path / "waves.toml", wider).budget == 5
        (change,) = client.changes("wide")
        entries = {"from": {"low": 4, "high": 12, "step": 4}, "to": {"low": 4, "high": 20, "step": 4}}
        assert (change.by, change.what, change.detail["space"]) == ("ada", "widen", {"hidden_size": entries})
        with pytest.raises(hpo.ServiceError, match="a range may be widened, not narrowed") as conflict:
            client.submit(tmp_path / "waves.toml", ["space.hidden_size=8"])
        assert conflict.value.status == 409
        assert len(client.changes("wide")) == 1


def test_a_study_that_its_patience_ended_says_so_and_goes_on_with_more(
    service: Service, waves: Path, task: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "waves.npz").write_bytes(waves.read_bytes())
    (tmp_path / "waves.toml").write_text(task("patient", "waves.npz", 40))
    with hpo.connect(service.url, service.token()) as client:
        wanted = ["study.patience=1", "study.parallel=2", 'study.metric="accuracy"']
        begun = client.submit(tmp_path / "waves.toml", wanted)
        assert (begun.patience, begun.standstill) == (1, None)
        service.work("patient")
        found = client.study("patient")
        assert found.standstill is not None
        assert (found.status, found.standstill.trials, sum(found.trials.values()) < 40) == ("finished", 1, True)
        assert found.in_order is not None
        assert (found.in_order.parallel, found.in_order.trained_s > 0) == (2, True)
        shown = snapshot_of(found).in_order  # as `hpo status` has it
        assert shown is not None
        assert shown.said.startswith("workers waited ")
        summary = client.summary("patient")
        assert (summary["ended_by"], summary["standstill"]) == ("patience", found.standstill.model_dump())
        for more in ({}, {"trials": 50}, {"patience": 1}):
            with pytest.raises(
                hpo.ServiceError, match=r"1 trial brought nothing better .*; a larger study.pat"
            ) as raised:
                client.resume("patient", **more)
            assert raised.value.status == 409
        assert client.study("patient") == found  # nothing was changed
        ended = sum(found.trials.values())
        with Browser(service.url, service.token()) as browser:
            text = " ".join(browser.get("/studies/patient").text.split())
            said = f"Its patience ended it: 1 trial brought nothing better than trial {found.standstill.since}."
            assert (said in text, 'name="patience"' in text) == (True, True)
            assert "Its trials start in order, at most 2 at a time" in text
            given = {"trials": str(ended + 1), "patience": "1"}
            refused = browser.send_form("/studies/patient/resume", "/studies/patient", **given)
            assert (refused.status_code, "a larger study.patience, or 0 for none" in refused.text) == (409, True)
            sent = browser.send_form("/studies/patient/resume", "/studies/patient", **{**given, "patience": "0"})
            assert sent.headers["location"] == "/studies/patient?done=resumed"
            assert "Its patience ended it" not in browser.get("/studies/patient").text
        gone_on = client.study("patient")
        assert (gone_on.status, gone_on.patience, gone_on.standstill) == ("open", None, None)
        service.work("patient")
        assert sum(client.study("patient").trials.values()) == ended + 1
    with service.client() as raw:
        refused = raw.post("/v1/studies/patient/resume", json={"patience": -1})
        assert (refused.status_code, "greater than or equal to 0" in refused.text) == (422, True)
