"""The dashboard over a real Postgres and real HTTP: what it shows, what it refuses, how it ends."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from hpo.dashboard.server import DashboardError, dashboard_password, serve, wsgi_app
from hpo.storage.artifacts import ArtifactStore, artifact_store
from hpo.storage.leases import Leases
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.notes import announce_model, attach_artifact, describe_study
from tests.conftest import execute

PASSWORD = "käse & brot"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    url: str, method: str = "GET", *, query: str = "", headers: dict[str, str] | None = None, body: Any = None
) -> Answer:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    sent = None if body is None else json.dumps(body)
    connection.request(method, parts.path + query, sent, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    got = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    connection.close()
    return got


def authorization(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@contextmanager
def serving(application: Any) -> Iterator[str]:
    """The application under waitress in a thread, on a free port of loopback."""
    from waitress import create_server, wasyncore

    server = create_server(application, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        with suppress(OSError):  # a request's thread pulled it first, so that all is closed already
            server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map))
        thread.join()
        server.task_dispatcher.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return artifact_store(str(tmp_path / "artifacts"))


@pytest.fixture
def study(storage: TrialStorage) -> optuna.Study:
    """One finished and one running trial."""
    study = optuna.create_study(storage=storage, study_name="power", direction="maximize")
    finished = study.ask()
    finished.suggest_float("dropout", 0.0, 0.5)
    study.tell(finished, 0.75)
    study.ask()
    return study


@pytest.fixture
def open_site(database_url: str, study: optuna.Study, store: ArtifactStore) -> Iterator[str]:
    with serving(wsgi_app(database_url, store)) as url:
        yield url


def test_the_page_and_its_studies_are_shown(open_site: str, study: optuna.Study) -> None:
    page = ask(f"{open_site}/dashboard")
    assert page.status == 200
    assert b'<div id="dashboard">' in page.body
    assert ask(f"{open_site}/static/bundle.js").status == 200
    assert [found["study_name"] for found in ask(f"{open_site}/api/studies").json["study_summaries"]] == ["power"]
    trials = ask(f"{open_site}/api/studies/{study._study_id}").json["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Running"]
    assert trials[0]["values"] == [0.75]


@pytest.mark.parametrize("number", [0, 1])
def test_an_artifact_attached_to_a_finished_or_running_trial_is_listed_and_served(
    open_site: str, study: optuna.Study, storage: TrialStorage, store: ArtifactStore, number: int
) -> None:
    trial = study.trials[number]
    assert trial.state.is_finished() is (number == 0)
    keys = ["0b1c0f3e-3a0c-4a52-9a83-7a0a1b2c3d4e", "7_curve.png"]
    for key in keys + keys:  # attaching twice shows it once
        store.put(key, key.encode())
        attach_artifact(storage, study._study_id, trial._trial_id, key, f"name of {key}", "image/png")
    storage.session.flush()
    assert store.keys() == keys  # nothing is copied
    shown = ask(f"{open_site}/api/studies/{study._study_id}").json["trials"]
    assert shown[1 - number]["artifacts"] == []
    listed = {artifact["filename"]: artifact for artifact in shown[number]["artifacts"]}
    assert len(listed) == len(shown[number]["artifacts"]) == 2
    for key in keys:
        artifact_id = listed[f"name of {key}"]["artifact_id"]
        served = ask(f"{open_site}/artifacts/{study._study_id}/{trial._trial_id}/{artifact_id}")
        assert (served.status, served.body, served.headers["content-type"]) == (200, key.encode(), "image/png")


def test_a_stored_web_page_runs_no_script_and_is_for_no_other_site(
    open_site: str, study: optuna.Study, storage: TrialStorage, store: ArtifactStore
) -> None:
    store.put("page.html", b"<script>alert(1)</script>")
    trial_id = study.trials[0]._trial_id
    attach_artifact(storage, study._study_id, trial_id, "page.html", "page.html", "text/html")
    served = ask(f"{open_site}/artifacts/{study._study_id}/{trial_id}/{b'page.html'.hex()}")
    assert served.status == 200
    assert served.headers["content-security-policy"].startswith("default-src 'none';")
    assert "script-src" not in served.headers["content-security-policy"]
    assert "access-control-allow-origin" not in served.headers


def test_a_study_gets_a_readable_metric_and_a_note_that_can_shrink(
    open_site: str, study: optuna.Study, storage: TrialStorage
) -> None:
    long = "# power\n" + "x" * 5000
    for note in (long, long, "short ä", ""):
        describe_study(storage, study._study_id, "auroc", note)
        shown = ask(f"{open_site}/api/studies/{study._study_id}").json
        assert shown["objective_names"] == ["auroc"]
        assert shown["note"]["body"] == note
    assert shown["note"]["version"] == 3  # the same note twice is one version
    assert study.metric_names == ["auroc"]


def test_a_promotion_tells_its_model_and_keeps_what_visitors_wrote(
    open_site: str, study: optuna.Study, storage: TrialStorage
) -> None:
    def note() -> str:
        body: str = ask(f"{open_site}/api/studies/{study._study_id}").json["note"]["body"]
        return body

    described = "**auroc** over 9 sequences\n\n```json\n" + "x" * 5000 + "\n```"
    describe_study(storage, study._study_id, "auroc", described)
    announce_model(storage, study._study_id, "model `power` version 1 is trial 0")
    assert note() == f"**Promoted:** model `power` version 1 is trial 0\n\n{described}"
    edited = {"version": 3, "body": note() + "\n\nlooks good"}
    assert ask(f"{open_site}/api/studies/{study._study_id}/note", "PUT", body=edited).status == 204
    announce_model(storage, study._study_id, "model `power` version 2 is trial 7")
    assert note() == f"**Promoted:** model `power` version 2 is trial 7\n\n{described}\n\nlooks good"


@pytest.fixture
def varied(storage: TrialStorage) -> optuna.Study:
    """A study with trials of every state but WAITING, odd values, notes and artifacts."""
    study = optuna.create_study(storage=storage, study_name="varied", direction="minimize")
    space = {
        "x": FloatDistribution(0, 1),
        "kind": CategoricalDistribution(("a", "b", None)),
        "n": IntDistribution(1, 9),
    }
    for number, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE)):
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params={"x": number / 4, "kind": ("a", "b", None)[number % 3], "n": number + 1},
                distributions=space,
                values=[2.5 - number] if state == TrialState.COMPLETE else None,
                intermediate_values={2: float("nan"), 1: 0.5, 3: float("inf"), 4: float("-inf")},
                user_attrs={"curve": list(range(500)), "worker": 'w "1" ä', "flag": number % 2 == 0},
            )
        )
    running = study.ask(space)
    running.report(0.25, 1)
    storage.session.flush()
    ids = [trial._trial_id for trial in study.trials]
    for trial_id in (ids[0], ids[-1]):
        attach_artifact(storage, study._study_id, trial_id, "curve.svg", "curve.svg", "image/svg+xml")
    storage.set_study_system_attr(study._study_id, f"dashboard:{ids[1]}:note_ver", 1)
    storage.set_study_system_attr(study._study_id, f"dashboard:{ids[1]}:note_str:0", "a note")
    describe_study(storage, study._study_id, "log_loss", "what it is")
    storage.session.flush()
    return study


def test_a_study_is_answered_as_optuna_dashboard_does(
    varied: optuna.Study, storage: TrialStorage, store: ArtifactStore
) -> None:
    path = f"/api/studies/{varied._study_id}"
    with serving(wsgi_app(storage, store)) as ours, serving(optuna_dashboard.wsgi(storage)) as theirs:
        for query in ("", "?after=0", "?after=3", "?after=5", "?after=99"):
            for _ in range(2):  # encoded, and kept
                mine, wanted = (ask(f"{site}{path}", query=query) for site in (ours, theirs))
                assert mine.json == wanted.json
        assert mine.headers["content-type"] == wanted.headers["content-type"]
        assert ask(f"{ours}/api/studies/999").status == 404


def test_what_changed_since_the_last_look_is_shown(
    varied: optuna.Study, storage: TrialStorage, store: ArtifactStore, database_url: str
) -> None:
    url_of = f"/api/studies/{varied._study_id}"
    with serving(wsgi_app(database_url, store)) as url:  # with connections and memory of its own
        assert [trial["state"] for trial in ask(url + url_of).json["trials"]][-1] == "Running"
        varied.tell(4, -9.0)
        newest = varied.ask({"x": FloatDistribution(0, 1)})
        newest.report(7.0, 1)
        first = varied.trials[0]._trial_id
        storage.set_study_system_attr(varied._study_id, f"dashboard:{first}:note_ver", 1)
        storage.set_study_system_attr(varied._study_id, f"dashboard:{first}:note_str:0", "seen")
        storage.session.flush()
        shown = ask(url + url_of).json
    assert [trial["state"] for trial in shown["trials"]][-2:] == ["Complete", "Running"]
    assert shown["trials"][-1]["intermediate_values"] == [{"step": 1, "value": 7.0}]
    assert shown["trials"][0]["note"]["body"] == "seen"
    assert [trial["number"] for trial in shown["best_trials"]] == [4]


def test_the_packed_answer_is_the_plain_one(open_site: str, varied: optuna.Study) -> None:
    url = f"{open_site}/api/studies/{varied._study_id}"
    for query in ("", "?after=99"):
        plain, packed = ask(url, query=query), ask(url, query=query, headers={"Accept-Encoding": "gzip, br"})
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(packed.body) == plain.body


def test_a_waiting_trial_hides_no_parameter(open_site: str, varied: optuna.Study) -> None:
    varied.enqueue_trial({"x": 0.5})
    shown = ask(f"{open_site}/api/studies/{varied._study_id}").json
    assert [trial["state"] for trial in shown["trials"]][-1] == "Waiting"
    assert [space["name"] for space in shown["intersection_search_space"]] == ["kind", "n", "x"]


def test_constraints_are_shown(open_site: str, study: optuna.Study, storage: TrialStorage) -> None:
    trial = study.ask()
    trial.set_constraint("memory", 0.5)
    study.tell(trial, 1.0)
    assert ask(f"{open_site}/api/studies/{study._study_id}").json["trials"][2]["constraints"] == [0.5]


def test_importances_need_no_scikit_learn(
    open_site: str, varied: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed: it is no dependency of ours
    (importances,) = ask(f"{open_site}/api/studies/{varied._study_id}/param_importances").json["param_importances"]
    assert {found["name"] for found in importances} == {"kind", "n", "x"}
    assert sum(found["importance"] for found in importances) == pytest.approx(1.0)


def test_the_best_trial_is_the_one_to_be_promoted_and_the_study_says_why(
    open_site: str, study: optuna.Study, storage: TrialStorage
) -> None:
    """An acceptance run: displays called trial 6 the best (0.9769), summary and model trial 0 (0.9747)."""
    for value, attributes in (
        (0.9747, {"seed": 0, "log_loss": 0.21}),
        (0.9769, {"seed": 0, "log_loss": 0.25}),
        (0.99, {"copied_from": "other/1", "log_loss": 0.1}),
    ):
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs=attributes))
    shown = ask(f"{open_site}/api/studies/{study._study_id}").json
    assert [trial["number"] for trial in shown["best_trials"]] == [4]  # a plain script's study: Optuna's own rule
    Leases(storage).open_study(study._study_id, Terms(budget=9, resolution=0.5 / 67), {})
    shown = ask(f"{open_site}/api/studies/{study._study_id}").json
    assert [trial["number"] for trial in shown["best_trials"]] == [2]
    why = "trial 2 0.9747, equal to trial 3's 0.9769 within half a validation sequence, lower log-loss"
    assert shown["user_attrs"] == [{"key": "best trial", "value": why}]


def test_numbers_that_json_lacks_are_shown_all_the_same(
    open_site: str, study: optuna.Study, storage: TrialStorage, database_url: str
) -> None:
    study.tell(study.ask(), 0.5)
    execute(database_url, "UPDATE trial_values SET value = 'NaN'")  # as stock Optuna's storage writes it
    trial = study.ask()
    for name, value in (("a", float("inf")), ("b", float("-inf"))):
        trial.set_constraint(name, value)
    storage.session.flush()
    answer = ask(f"{open_site}/api/studies/{study._study_id}")
    assert answer.status == 200
    shown = json.loads(answer.body, parse_constant=pytest.fail)["trials"]
    assert "values" not in shown[0]
    assert [abs(value) > 1e300 for value in shown[-1]["constraints"]] == [True, True]


def test_a_study_of_two_objectives_shows_its_front(open_site: str, storage: TrialStorage) -> None:
    study = optuna.create_study(storage=storage, directions=["minimize", "maximize"])
    for values in ([1.0, 1.0], [2.0, 2.0], [3.0, 1.0]):
        study.tell(study.ask(), values)
    best = ask(f"{open_site}/api/studies/{study._study_id}").json["best_trials"]
    assert sorted(trial["number"] for trial in best) == [0, 1]


def test_pages_carry_security_headers(open_site: str) -> None:
    for path in ("/dashboard", "/api/studies", "/static/bundle.js", "/nothing"):
        headers = ask(open_site + path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert headers["referrer-policy"] == "same-origin"
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert "script-src 'self'" in ask(f"{open_site}/dashboard").headers["content-security-policy"]


def test_without_a_password_only_requests_to_a_loopback_name_are_answered(open_site: str) -> None:
    for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", ""):
        refused = ask(f"{open_site}/api/studies", headers={"Host": host})
        assert refused.status == 403
        assert "localhost" in refused.json["reason"]
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:8080", "127.1.2.3"):
        assert ask(f"{open_site}/api/studies", headers={"Host": host}).status == 200


def test_a_page_of_another_site_cannot_write(open_site: str, study: optuna.Study) -> None:
    note = f"{open_site}/api/studies/{study._study_id}/note"
    malformed, foreign = {"Origin": "http://["}, {"Origin": "http://evil.example"}
    for headers in (foreign, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}, malformed):
        assert ask(note, "PUT", headers=headers, body={"version": 1, "body": "planted"}).status == 403
        assert ask(f"{open_site}/api/studies", headers=headers).status == 200
    for version, own in enumerate(({"Origin": open_site}, {"Sec-Fetch-Site": "same-origin"}), 1):
        assert ask(note, "PUT", headers=own, body={"version": version, "body": "seen"}).status == 204


def test_deletion_and_renaming_are_refused(
    open_site: str, study: optuna.Study, storage: TrialStorage, store: ArtifactStore
) -> None:
    one = f"{open_site}/api/studies/{study._study_id}"
    for path in (one, f"{one}/", f"{open_site}/api/artifacts/{study._study_id}/{'ab' * 8}"):
        refused = ask(path, "DELETE", body={})
        assert refused.status == 403
        assert "--allow-delete" in refused.json["reason"]
    for path in (f"{one}/rename", f"{one}/rename/", f"{one}/%72ename"):  # renaming deletes the original
        assert ask(path, "POST", body={"study_name": "other"}).status == 403
    assert [found.study_name for found in storage.get_all_studies()] == ["power"]


def test_allowed_deletion_removes_the_study_and_uploads_but_no_attached_artifact(
    study: optuna.Study, storage: TrialStorage, store: ArtifactStore
) -> None:
    store.put("model.safetensors", b"promoted elsewhere")
    attach_artifact(storage, study._study_id, study.trials[0]._trial_id, "model.safetensors", "m", "x/y")
    with serving(wsgi_app(storage, store, allow_delete=True)) as url:
        upload = {"file": "data:text/plain;base64,aGk=", "filename": "note.txt"}
        assert ask(f"{url}/api/artifacts/{study._study_id}", "POST", body=upload).status == 201
        assert len(store.keys()) == 2
        assert ask(f"{url}/api/studies/{study._study_id}", "DELETE", body={}).status == 204
    assert storage.get_all_studies() == []
    assert store.keys() == ["model.safetensors"]


def test_with_a_password_every_path_needs_it(study: optuna.Study, storage: TrialStorage, store: ArtifactStore) -> None:
    right = authorization("hpo", PASSWORD)
    wrong: list[dict[str, str]] = [
        {},
        authorization("hpo", "wrong"),
        authorization("admin", PASSWORD),
        authorization("hpo", ""),
        {"Authorization": "Basic ???"},
        {"Authorization": right["Authorization"].replace("Basic", "Bearer")},
    ]
    with serving(wsgi_app(storage, store, PASSWORD)) as url:
        for path in ("/", "/dashboard", "/api/studies", "/static/bundle.js", "/artifacts/1/ab", "/csv/1"):
            for headers in wrong:
                refused = ask(url + path, headers=headers)
                assert refused.status == 401
                assert refused.headers["www-authenticate"].startswith("Basic realm=")
        assert ask(f"{url}/api/studies", headers=right).status == 200
        assert ask(f"{url}/api/studies", headers={**right, "Host": "dashboard.example"}).status == 200


OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"


def test_it_outlives_its_database_connections(
    open_site: str, study: optuna.Study, database_url: str, store: ArtifactStore
) -> None:
    pages = ("/api/studies", f"/api/studies/{study._study_id}")
    with serving(wsgi_app(database_url, store)) as url:
        assert [ask(url + page).status for page in pages] == [200, 200]
        for page in pages:
            execute(database_url, f"SELECT pg_terminate_backend(pid) {OTHERS}")
            assert ask(url + page).status == 200


def test_a_database_out_of_reach_is_named_and_found_again(
    study: optuna.Study, storage: TrialStorage, server: str, database_url: str, store: ArtifactStore
) -> None:
    page, name = f"/api/studies/{study._study_id}", database_url.rsplit("/", 1)[-1].partition("?")[0]
    impatient = trial_storage(database_url, retry_s=0.0)
    with serving(wsgi_app(impatient, store)) as url:
        assert ask(url + page).status == 200
        others = OTHERS.replace("current_database()", f"'{name}'")
        execute(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", f"SELECT pg_terminate_backend(pid) {others}")
        gone = ask(url + page)
        assert (gone.status, gone.json["reason"]) == (503, "the database is out of reach")
        execute(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert ask(url + page).status == 200
    impatient.close()


def test_the_password_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPO_DASHBOARD_PASSWORD", raising=False)
    monkeypatch.delenv("HPO_DASHBOARD_PASSWORD_FILE", raising=False)
    assert dashboard_password() is None
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD_FILE", str(tmp_path / "password"))
    with pytest.raises(DashboardError, match=r"HPO_DASHBOARD_PASSWORD_FILE names .*password: No such file"):
        dashboard_password()
    (tmp_path / "password").write_text(f"{PASSWORD}\n", encoding="utf-8")
    assert dashboard_password() == PASSWORD
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", "first")
    assert dashboard_password() == "first"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_off_loopback_a_password_is_required(host: str, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPO_DASHBOARD_PASSWORD", raising=False)
    with pytest.raises(DashboardError, match=r"needs a password; set HPO_DASHBOARD_PASSWORD"):
        serve("postgresql://nobody@127.0.0.1:1/none", store, host, 0)


def test_an_empty_password_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(DashboardError, match="must not be empty"):
        serve("postgresql://nobody@127.0.0.1:1/none", store, "0.0.0.0", 0, password="")


def test_a_port_in_use_is_named_with_the_way_out(store: ArtifactStore) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(DashboardError, match=r"127.0.0.1 port \d+: another program .* has it; choose another --port"),
    ):
        serve("postgresql://nobody@127.0.0.1:1/none", store, port=taken.getsockname()[1])


_SERVE = """
import sys
from hpo.dashboard.server import serve
from hpo.storage.artifacts import artifact_store
serve(sys.argv[1], artifact_store(sys.argv[2]), port=0, ready=lambda url: print(url, flush=True))
print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_on_loopback_and_a_signal_ends_it_cleanly(
    number: signal.Signals, database_url: str, study: optuna.Study, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _SERVE, database_url, str(tmp_path)]
    environment = {**os.environ, "HPO_DASHBOARD_PASSWORD": PASSWORD}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            assert ask(f"{url}api/studies").status == 401
            studies = ask(f"{url}api/studies", headers=authorization("hpo", PASSWORD)).json["study_summaries"]
            assert [found["study_name"] for found in studies] == ["power"]
            server.send_signal(number)
            assert server.stdout.read() == "ended\n"
            assert server.wait(30) == 0
        finally:
            server.kill()
