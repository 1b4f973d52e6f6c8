"""The pages and the dashboard beside them: who comes in, from where, what they may do, and what they are told."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import optuna
import pytest
from fastapi import FastAPI
from starlette.routing import Mount, Route

from hpo.dashboard.routes import READS
from hpo.service.access import COOKIE
from hpo.service.app import make_app
from hpo.service.backend import Backend
from hpo.service.dashboard import PATHS
from hpo.service.hosts import Hosts
from hpo.service.pages.rendering import HEADERS
from hpo.service.pages.visitor import FORM_TOKEN
from hpo.storage.access import ROLES, Access
from hpo.storage.artifacts import FolderStore
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.terms import Terms
from hpo.storage.trials import trial_storage
from hpo.study.lifecycle import open_study
from tests.service.conftest import Service, serving, upload
from tests.service.test_access import NEAR, OPEN, leaves

pytestmark = pytest.mark.xdist_group("service-page")
LOGIN = "/login"


class Browser(httpx.Client):
    """What a browser does of itself: keeps cookies, says which page a form is of; follows nothing."""

    def __init__(self, url: str, token: str | None = None) -> None:
        super().__init__(base_url=url, headers={"Origin": url}, timeout=60, trust_env=False)
        self._token = token

    def __enter__(self) -> Self:
        super().__enter__()
        if self._token is not None:
            answer = self.post(LOGIN, data={"token": self._token})
            assert (answer.status_code, answer.headers["location"]) == (303, "/"), answer.text
        return self

    def send_form(self, path: str, page: str = "/", files: Any = None, **fields: str) -> httpx.Response:
        """Send a form with the token that the forms of `page` have."""
        found = re.search(rf'name="{FORM_TOKEN}" value="([0-9a-f]+)"', self.get(page).text)
        assert found is not None
        return self.post(path, data={FORM_TOKEN: found[1], **fields}, files=files)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return make_app(Backend("postgresql://nowhere", FolderStore(tmp_path_factory.mktemp("store"))))


def pages(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route of the pages, but for the log-in and what is told from this machine."""
    return [
        (method, re.sub(r"\{[^}]*\}", "1", route.path))
        for route in leaves(app.routes)
        if not route.include_in_schema and route.path not in NEAR | {LOGIN}
        for method in sorted(route.methods or ())
    ]


@pytest.fixture(scope="module")
def ada(service: Service) -> Iterator[Browser]:
    with Browser(service.url, service.token("submit", "ada")) as browser:
        yield browser


@pytest.fixture(scope="module")
def finished(ada: Browser, service: Service, waves: Path, task: Callable[..., str]) -> str:
    """A study that is over and has a model; ada's."""
    with service.client("submit", "ada") as client:
        key = upload(client, waves)
        assert client.post("/v1/studies", content=task("waves", key, 3)).status_code == 201
    service.work("waves")
    return "waves"


def said(answer: httpx.Response) -> str:
    """The fault that a page shows."""
    found = re.search(r'<p class="note bad"[^>]*>([^<]*)</p>', answer.text)
    assert found is not None, answer.text
    return found[1].replace("&#39;", "'").replace("&#34;", '"')


# ------------------------------------------------------------------------------------------------------------ coming in


def test_every_route_of_the_app_is_known(app: FastAPI) -> None:
    """What is neither a route of the API, nor a page, nor the dashboard's would be checked by no test."""
    others = [route for route in app.routes if isinstance(route, Route | Mount) and not list(leaves([route]))]
    assert {route.path for route in others} == {"/assets"} | {
        f"{path}{rest}" for path in PATHS for rest in ("", "/{rest:path}")
    }
    assert len(pages(app)) > 15
    for route in leaves(app.routes):
        assert route.path.startswith("/v1/") == (route.include_in_schema and route.path not in OPEN | NEAR)


def test_every_page_without_a_session_leads_to_the_log_in(app: FastAPI, service: Service) -> None:
    revoked = service.token()
    with Browser(service.url) as nobody, Browser(service.url, revoked) as gone, Browser(service.url) as forger:
        access = Access(service.database_url)
        access.revoke(access.holder(revoked).token_id)  # type: ignore[union-attr]
        forger.cookies.set(COOKIE, 43 * "a")
        for browser in (nobody, gone, forger):
            for method, path in pages(app):
                answer = browser.request(method, path)
                if method == "GET":
                    assert (answer.status_code, answer.headers["location"]) == (303, f"{LOGIN}?next={path}"), path
                else:
                    assert answer.status_code == 401, (method, path)
                    assert "sign in first" in said(answer)


def test_a_bearer_token_opens_no_page_and_a_cookie_no_route_of_the_api(app: FastAPI, service: Service) -> None:
    token = service.token("admin")
    with service.with_token(token) as program, Browser(service.url, token) as browser:
        assert all(program.request(method, path).status_code in (303, 401) for method, path in pages(app))
        for route in leaves(app.routes):
            if route.path.startswith("/v1/"):
                for method in route.methods or ():
                    assert browser.request(method, re.sub(r"\{[^}]*\}", "1", route.path)).status_code == 401


def test_a_wrong_token_is_told_and_slowed(service: Service, tmp_path: Path) -> None:
    with Browser(service.url) as browser:
        answer = browser.post(LOGIN, data={"token": "hpo_nonsense"})
        assert answer.status_code == 401
        assert said(answer) == "this token is not known, has expired or was revoked; `hpo token create` makes one"
        assert COOKIE not in answer.cookies
    app = make_app(Backend(service.database_url, FolderStore(tmp_path)))
    right = service.token()

    async def guess() -> list[httpx.Response]:
        headers = {"Origin": "http://localhost"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as c:
            return [await c.post(LOGIN, data={"token": text}) for text in [*["x"] * 22, right]]

    answers = asyncio.run(guess())
    app.state.backend.close()
    assert [answer.status_code for answer in answers] == [401] * 21 + [429, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert "too many wrong tokens; try again in" in said(answers[-1])


@pytest.mark.parametrize(
    "where", ["https://evil.example", "//evil.example", "/\\evil.example", "evil", "javascript:x", "/a\nb"]
)
def test_the_log_in_leads_nowhere_else(service: Service, where: str) -> None:
    with Browser(service.url) as browser:
        answer = browser.post(LOGIN, data={"token": service.token(), "next": where})
        assert answer.headers["location"] == "/"
        assert browser.get(LOGIN, params={"next": where}).headers["location"] == "/"
        assert browser.get(LOGIN, params={"next": "/new"}).headers["location"] == "/new"


def test_the_cookie_is_for_this_server_alone_and_goes_with_the_session(service: Service) -> None:
    token = service.token()
    with Browser(service.url) as browser:
        plain = browser.post(LOGIN, data={"token": token})
        behind_tls = browser.post(LOGIN, data={"token": token}, headers={"X-Forwarded-Proto": "https"})
        for answer, secure in ((plain, False), (behind_tls, True)):
            given = answer.headers["set-cookie"].lower()
            assert given.startswith(f"{COOKIE}=")
            assert all(part in given for part in ("httponly", "path=/", "samesite=lax"))
            assert 0 < int(re.search(r"max-age=(\d+)", given)[1]) <= 12 * 3600  # type: ignore[index]
            assert ("secure" in given) == secure
        browser.cookies.clear()
        browser.cookies.set(COOKIE, plain.cookies[COOKIE])
        assert browser.get("/").status_code == 200
        kept = browser.cookies[COOKIE]
        assert browser.send_form("/logout").headers["location"] == LOGIN
        browser.cookies.set(COOKIE, kept)
        assert browser.get("/").status_code == 303


def test_any_server_process_knows_the_session(ada: Browser, service: Service) -> None:
    with serving(service.environment) as other, Browser(other) as elsewhere:
        elsewhere.cookies.set(COOKIE, ada.cookies[COOKIE])
        assert elsewhere.get("/").status_code == 200


def test_without_any_token_both_the_server_and_the_page_say_how_to_make_one(
    database_url: str, service: Service
) -> None:
    environment = {**service.environment, "HPO_DATABASE_URL": database_url}
    command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018
        url = process.stdout.readline().split()[2].rstrip("/,")
        try:
            line = process.stderr.readline()
            assert line.endswith("nobody has a token yet: hpo token create --role admin --owner NAME\n")
            with Browser(url) as browser:
                assert "hpo token create --role admin --owner NAME" in browser.get(LOGIN).text
                Access(database_url).create("read", "ada")
                assert "--role admin" not in browser.get(LOGIN).text
        finally:
            process.terminate()


# -------------------------------------------------------------------------------------------------- where it comes from


def test_a_form_of_another_page_is_refused(app: FastAPI, ada: Browser) -> None:
    elsewhere = [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": str(ada.base_url).replace("http://", "http://x.")},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": ""},
    ]
    for path in [path for method, path in pages(app) if method == "POST"]:
        for headers in elsewhere:
            answer = ada.post(path, headers=headers)
            assert answer.status_code == 403, (path, headers)
            assert "a page of another site may not do this" in said(answer)
        for token in ({}, {FORM_TOKEN: ""}, {FORM_TOKEN: 64 * "0"}, {FORM_TOKEN: "ü"}):
            answer = ada.post(path, data=token)
            assert (answer.status_code, "earlier session" in said(answer)) == (403, True), path
    assert ada.post(LOGIN, headers={"Origin": "https://evil.example"}).status_code == 403
    assert ada.get("/").status_code == 200


def test_a_page_is_served_by_its_own_names_alone(app: FastAPI, service: Service, ada: Browser) -> None:
    paths = [path for method, path in pages(app) if method == "GET"]
    for path in [*paths, LOGIN, "/dashboard", "/api/studies"]:
        answer = ada.get(path, headers={"Host": "evil.example:8000"})
        assert answer.status_code == 403, path
        assert "--allowed-host evil.example" in answer.text
    environment = {**service.environment, "HPO_SERVE_HOSTS": "hpo.example, *.lan"}
    with serving(environment, "--allowed-host", "other.example") as url, Browser(url) as browser:
        for host, status in {
            "hpo.example": 200,
            "a.lan": 200,
            "other.example:443": 200,
            "lan": 403,
            "x.example": 403,
        }.items():
            assert browser.get(LOGIN, headers={"Host": host}).status_code == status, host


def test_off_loopback_addresses_are_names_too() -> None:
    near, far = Hosts(), Hosts(reachable=True)
    for name in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert near.admits(name)
        assert far.admits(name)
    for name in ("192.0.2.7:8000", "[2001:db8::1]"):
        assert not near.admits(name)
        assert far.admits(name)
    for name in ("evil.example", "", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert not near.admits(name)
        assert not far.admits(name)
    assert Hosts(("*",)).admits("anything.example")
    assert Hosts(("A.example",)).admits("a.EXAMPLE")


def test_every_page_lets_no_other_site_in(app: FastAPI, ada: Browser, finished: str) -> None:
    paths = [
        LOGIN,
        "/",
        "/new",
        "/docs",
        "/studies/waves",
        "/models/waves",
        "/models/waves/1/card",
        "/studies/nothing",
        "/studies/waves/trials/0",
    ]
    for path in paths:
        answer = ada.get(path)
        for name, value in HEADERS.items():
            if path != LOGIN:
                assert answer.headers[name] == value, (path, name)
        assert not re.search(r"<[^>]+ (style|on\w+)=|<script(?![^>]* src=)|<style", answer.text), path


# ---------------------------------------------------------------------------------------------------------------- roles


def test_a_role_sees_what_it_may_do_and_is_refused_the_rest(service: Service, finished: str) -> None:
    with ExitStack() as stack:
        reader = stack.enter_context(Browser(service.url, service.token("read", "bob")))
        other = stack.enter_context(Browser(service.url, service.token("submit", "eve")))
        admin = stack.enter_context(Browser(service.url, service.token("admin", "root")))
        owner = stack.enter_context(Browser(service.url, service.token("submit", "ada")))
        assert reader.get("/new").status_code == 403
        assert 'href="/new"' not in reader.get("/").text
        for browser, may in ((reader, False), (other, False), (owner, True), (admin, True)):
            for page, actions in (
                ("/studies/waves", ("resume", "promote", "delete")),
                ("/models/waves/1", ("alias", "delete")),
            ):
                shown = re.findall(rf'action="{page}/(\w+)"', browser.get(page).text)
                assert set(actions) <= set(shown) if may else not set(actions) & set(shown)
        for browser, reason in (
            (reader, "this needs the role 'submit'"),
            (other, "is ada's: only its owner or an admin"),
        ):
            for path in ("studies/waves/stop", "studies/waves/resume", "studies/waves/promote", "studies/waves/delete"):
                answer = browser.send_form(f"/{path}")
                assert (answer.status_code, reason in said(answer)) == (403, True), path
            for action in ("alias", "delete"):
                answer = browser.send_form(f"/models/waves/1/{action}", alias="production")
                assert (answer.status_code, reason in said(answer)) == (403, True), action
        assert reader.send_form("/new/start").status_code == 403
        assert "waves" in reader.get("/").text


# ------------------------------------------------------------------------------------------------------- what they show


def test_from_a_file_to_a_study(ada: Browser, waves: Path) -> None:
    with waves.open("rb") as file:
        answer = ada.send_form("/new", "/new", files={"train": ("my waves.npz", file), "test": ("", b"")})
    shown = re.sub(r"<[^>]+>|\s+", " ", answer.text)
    assert answer.status_code == 200
    for text in ("Sequences 60", "Steps 12", "Features 1", "Classes 2", "fast · 30", "slow · 30"):
        assert text in re.sub(" +", " ", shown)
    form = dict(re.findall(r'name="(\w+)"[^>]* value="([^"]*)"', answer.text))
    assert (form["name"], form["trials"]) == ("my-waves", "60")
    wrong = ada.send_form("/new/start", "/new", **{**form, "trials": "none", "name": "typed"})
    assert (wrong.status_code, said(wrong)) == (422, 'study.trials must be a whole number, got "none"')
    assert 'value="typed"' in wrong.text
    assert 'value="none"' in wrong.text
    started = ada.send_form("/new/start", "/new", **{**form, "trials": "1", "timeout": "2h"})
    assert started.headers["location"] == "/studies/my-waves?done=started"
    study = ada.get(started.headers["location"]).text
    assert "The study has started." in study
    assert "No worker is alive" in study
    again = ada.send_form("/new/start", "/new", **{**form, "trials": "1", "timeout": "2h"})
    assert again.headers["location"] == "/studies/my-waves?done=known"
    assert ada.send_form("/studies/my-waves/stop").headers["location"] == "/studies/my-waves?done=stopped"
    assert "stopped" in ada.get("/studies/my-waves").text
    assert ada.send_form("/studies/my-waves/resume", trials="4").headers["location"].endswith("resumed")
    assert "of 4 trials" in ada.get("/studies/my-waves").text
    much = ada.send_form("/studies/my-waves/resume", trials="many")
    assert (much.status_code, said(much)) == (422, "trials must be a whole number, got 'many'")
    assert ada.send_form("/studies/my-waves/delete").headers["location"] == "/?done=deleted"
    assert ada.get("/studies/my-waves").status_code == 404


def test_columns_of_time_and_weight_go_from_the_form_into_the_study(ada: Browser, service: Service) -> None:
    rows = (f"{i % 7},{i % 5},2024-{1 + i // 28:02}-{1 + i % 28:02},{1 + i % 3},{'ab'[i % 2]}" for i in range(60))
    files = {"train": ("days.csv", "\n".join(["t0,t1,day,trust,label", *rows]).encode())}
    columns = {"time": "day", "weight": "trust"}
    text = ada.send_form("/new", "/new", files=files, **columns).text
    assert 'placeholder="none"' in ada.get("/new").text
    form = dict(re.findall(r'name="(\w+)"[^>]* value="([^"]*)"', text))
    assert form.items() >= columns.items()
    started = ada.send_form("/new/start", "/new", **form)
    assert started.headers["location"] == "/studies/days?done=started"
    with closing(trial_storage(service.database_url)) as storage:
        config = open_study("days", storage).plan.config.data
    assert (config.time, config.weight, config.gap) == ("day", "trust", None)


def test_a_file_that_cannot_be_read_is_said_beside_the_form(ada: Browser) -> None:
    files = {"train": ("a.csv", b"t0,label\nx,a\n")}
    answer = ada.send_form("/new", "/new", files=files, group="place")
    assert answer.status_code == 422
    assert said(answer).startswith("a.csv, row 2, column 't0': 'x' is not a number; if these are labels, ids")
    assert 'value="place"' in answer.text
    assert said(ada.send_form("/new", "/new", files={"test": ("a.csv", b"x")})) == "choose a file with training data"


def test_names_of_the_data_are_text(ada: Browser, service: Service) -> None:
    rows = "".join(f"{i},{i % 3},{'<b>x</b>' if i % 2 else '&amp;'}\n" for i in range(20))
    content = f"<i>t</i>0,<i>t</i>1,label\n{rows}".encode()
    answer = ada.send_form("/new", "/new", files={"train": ("<u>a.csv", content)})
    assert answer.status_code == 200, said(answer)
    assert not re.search(r"<(b|i|u)>", answer.text)
    assert "&lt;b&gt;x&lt;/b&gt;" in answer.text


def test_a_models_page_has_scores_with_intervals_its_files_and_predicts(
    ada: Browser, service: Service, finished: str, waves: Path, tmp_path: Path
) -> None:
    with service.client("read") as client:
        model = client.get("/v1/models/waves/1").json()
        archive = client.get("/v1/models/waves/1/bundle").content
        with waves.open("rb") as file:
            expected = client.post("/v1/models/waves/1/predict", files={"file": ("waves.npz", file)}).json()
    page = ada.get("/models/waves").text
    low, high = model["scores"]["intervals"]["auroc"]
    for number in (model["scores"]["test"]["auroc"], low, high, model["scores"]["validation"]["accuracy"]):
        assert f"{number:.4f}" in page
    bundle = ada.get("/models/waves/latest/bundle")
    assert bundle.headers["content-disposition"] == 'attachment; filename="waves-v1.zip"'
    assert len(bundle.content) == len(archive)
    card = ada.get("/models/waves/1/card").text
    assert "<h1>waves</h1>" in card
    assert "<table>" in card
    picture = ada.get("/models/waves/1/curves.svg")
    assert picture.content.startswith(b'<svg xmlns="http://www.w3.org/2000/svg"')
    assert picture.headers["content-type"] == "image/svg+xml"
    assert "sandbox" in picture.headers["content-security-policy"]
    assert ada.get("/models/waves/1/nothing.png").status_code == 404
    assert ada.get("/models/waves/1/card.md").text.startswith("# waves")
    with waves.open("rb") as file:
        table = ada.send_form("/models/waves/1/predict", files={"file": ("waves.npz", file)}, **{"as": "table"})
    assert "60 predictions" in table.text
    with waves.open("rb") as file:
        csv = ada.send_form("/models/waves/1/predict", files={"file": ("waves.npz", file)}, **{"as": "csv"})
    lines = csv.text.splitlines()
    assert lines[0] == "id,predicted,probability_fast,probability_slow"
    assert [line.split(",")[1] for line in lines[1:]] == expected["labels"]
    np.testing.assert_allclose(
        [float(line.split(",")[2]) for line in lines[1:]], np.array(expected["probabilities"])[:, 0], atol=1e-6
    )
    wrong = ada.send_form("/models/waves/1/predict", files={"file": ("a.csv", b"t0\nx\n")})
    assert (wrong.status_code, "a.csv, row 2, column 't0': 'x' is not a number" in said(wrong)) == (422, True)


def test_aliases_and_versions(ada: Browser, finished: str) -> None:
    assert ada.send_form("/studies/waves/promote", trial="0").headers["location"] == "/studies/waves?done=promoted"
    assert ada.send_form("/studies/waves/promote", trial="1", default="on").headers["location"].endswith("promoted")
    wrong = ada.send_form("/studies/waves/promote", trial="99")
    assert (wrong.status_code, "has not trial 99" in said(wrong)) == (409, True)
    assert (
        ada.send_form("/models/waves/2/alias", alias="production").headers["location"] == "/models/waves/2?done=named"
    )
    assert "production → 2" in ada.get("/").text
    named = ada.send_form("/models/waves/2/delete")
    assert (named.status_code, "is what production names" in said(named)) == (409, True)
    number = ada.send_form("/models/waves/2/alias", alias="7")
    assert (number.status_code, "an alias is neither a number" in said(number)) == (422, True)
    assert ada.send_form("/models/waves/2/unalias", alias="production").headers["location"].endswith("unnamed")
    assert ada.send_form("/models/waves/2/delete").headers["location"] == "/models/waves?done=removed"
    assert ada.get("/models/waves/2").status_code == 404


def test_a_trials_page_has_its_curve_its_parameters_and_its_log(ada: Browser, service: Service, finished: str) -> None:
    with service.client("read") as client:
        trial = client.get("/v1/studies/waves/trials/0").json()
    page = ada.get("/studies/waves/trials/0").text
    assert f"{trial['value']:.4f}" in page
    assert page.count('class="line line') == 3
    assert all(name.replace("_", " ").capitalize() in page for name in trial["params"])
    assert trial["log"].splitlines()[-1].split(",", 2)[2][:20].strip('"') in page
    assert ada.get("/studies/waves/trials/9").status_code == 404


def test_many_studies_and_models_are_shown_by_page(database_url: str, tmp_path: Path) -> None:
    """What was made last comes first; each list goes on by itself."""
    with closing(trial_storage(database_url)) as storage:
        leases, registry = Leases(storage), Registry(storage.connection)
        for number in range(25):
            study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], f"s{number:02}")
            leases.open_study(study_id, Terms(budget=9), {"config": {"study": {"metric": "auroc"}}})
            scores = {"metric": "auroc", "value": 0.5, "validation": {"auroc": 0.5}}
            found: dict[str, Any] = {"trial_number": 0, "scores": scores, "config": {"params": {}}, "artifacts": {}}
            registry.promote(f"m{number:02}", study_id=study_id, study_name=f"s{number:02}", **found)
    app = make_app(Backend(database_url, FolderStore(tmp_path)))
    token = Access(database_url).create("read", "ada")[1]

    async def shown() -> list[list[str]]:
        headers = {"Origin": "http://localhost"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            await client.post(LOGIN, data={"token": token})
            pages = [(await client.get(path)).text for path in ("/", "/?page=2", "/?models=2", "/?page=2&models=2")]
            return [re.findall(r'href="/(?:studies|models)/([sm]\d\d)"', each) for each in pages]

    names = [[f"{kind}{number:02}" for number in reversed(range(25))] for kind in "sm"]
    (s1, s2), (m1, m2) = ((each[:20], each[20:]) for each in names)
    assert asyncio.run(shown()) == [s1 + m1, s2 + m1, s1 + m2, s2 + m2]
    app.state.backend.close()


def test_a_model_of_an_earlier_release_has_its_page(ada: Browser, service: Service) -> None:
    """Which said neither how many sequences its scores are of nor how often the test part was looked at."""
    found = {"auroc": 0.5677, "log_loss": 0.6888}
    scores = {
        "metric": "auroc",
        "value": 0.5677,
        "validation": found,
        "test": found,
        "intervals": {"auroc": [0.4, 0.7]},
    }
    with closing(trial_storage(service.database_url)) as storage:
        study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "earlier")
        given: dict[str, Any] = {"trial_number": 0, "config": {"params": {"layers": 1}}, "artifacts": {}}
        for name, known in {"earlier": scores, "no-test": {**scores, "test": None, "intervals": None}}.items():
            Registry(storage.connection).promote(name, study_id=study_id, study_name="earlier", scores=known, **given)
    assert "0.4000 to 0.7000" in ada.get("/models/earlier").text
    assert "no test part" in ada.get("/models/no-test").text
    assert 'href="/models/earlier"' in ada.get("/").text


def test_what_is_not_there_is_a_page_that_says_so(ada: Browser) -> None:
    for path, reason in {
        "/studies/none": "there is no study named 'none'",
        "/models/none": "no model is named 'none'",
    }.items():
        answer = ada.get(path)
        assert (answer.status_code, reason in said(answer)) == (404, True)
        assert "Sign out" in answer.text
    assert ada.get("/?page=0").status_code == 422
    nowhere = ada.get("/nowhere", headers={"Accept": "text/html"})
    assert (nowhere.status_code, said(nowhere)) == (404, "there is no such page")
    for path, kind in {"/nowhere": "*/*", "/v1/nowhere": "text/html"}.items():
        assert ada.get(path, headers={"Accept": kind}).headers["content-type"] == "application/problem+json"


def test_writes_are_in_the_audit(ada: Browser, service: Service, finished: str) -> None:
    ada.send_form("/studies/waves/resume", trials="3")
    (last,) = Access(service.database_url).actions("waves", most=1)
    assert (last.action, last.owner) == ("study.resume", "ada")


# ------------------------------------------------------------------------------------------------------------ dashboard


def test_the_dashboard_asks_for_a_session(service: Service, ada: Browser) -> None:
    with Browser(service.url) as nobody:
        answer = nobody.get("/dashboard/studies/1")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/dashboard/studies/1")
        for path in ("/api/studies", "/api/meta", "/csv/1", "/artifacts/1/ab", "/static/bundle.js", "/favicon.ico"):
            assert nobody.get(path).status_code == 401, path
        assert nobody.get("/api/studies", headers={"Authorization": "Basic aHBvOng="}).status_code == 401
    assert "Optuna Dashboard" in ada.get("/dashboard").text
    assert ada.get("/static/bundle.js").status_code == 200
    assert ada.get("/api/studies").json()["study_summaries"]
    assert ada.get("/api/studies?x=\xff").status_code == 200
    assert "default-src 'none'" in ada.get("/api/studies").headers["content-security-policy"]


def dashboard_writes() -> list[tuple[str, str]]:
    """Every writing route of the installed dashboard."""
    from optuna_dashboard import wsgi

    bottle: Any = wsgi(optuna.storages.InMemoryStorage())
    return [(route.method, route.rule) for route in bottle.routes if route.method not in READS]


def test_no_route_of_the_dashboard_harms_a_study(service: Service, finished: str) -> None:
    """Each of them with everything that its view asks for, by an admin: only notes and attributes get in."""
    body = {
        "study_name": "other", "directions": ["minimize"], "state": "Complete", "values": [1.0], "version": 1,
        "body": "seen", "user_attrs": {"seen": True}, "file": "data:text/plain;base64,aGk=", "filename": "a.txt",
        "mode": "ChooseWorst", "clicked": 0, "candidates": [0, 1], "output_type": "note", "user_query": "all",
    }  # fmt: skip
    with closing(trial_storage(service.database_url)) as storage:
        study_id = storage.get_study_id_from_name(finished)

        def state() -> list[Any]:
            trials = storage.get_all_trials(study_id)
            return [
                [(study._study_id, study.study_name, study.directions) for study in storage.get_all_studies()],
                [
                    (trial.number, trial.state, trial.values, trial.params, trial.intermediate_values)
                    for trial in trials
                ],
                storage.get_study_user_attrs(study_id),
                {key for key in storage.get_study_system_attrs(study_id) if "note" not in key},
            ]

        before, files = state(), sorted(FolderStore(Path(service.environment["HPO_ARTIFACTS"])).keys())
        trial_id = storage.get_all_trials(study_id)[0]._trial_id
        numbers = {"study_id": study_id, "trial_id": trial_id, "artifact_id": "ab", "history_id": "1"}
        routes = dashboard_writes()
        assert len(routes) > 12
        opened = 0
        with Browser(service.url, service.token("admin", "root")) as admin:
            for method, rule in routes:
                path = re.sub(r"<(\w+)[^>]*>", lambda match: str(numbers[match[1]]), rule)
                answer = admin.request(method, path, json=body)
                if rule.endswith(("/note", "/user-attrs")):  # 409: another note is there, or the trial has ended
                    assert answer.status_code in (204, 409), (path, answer.text)
                    opened += 1
                else:
                    assert answer.status_code == 403, (method, path, answer.text)
                    assert re.search("use|closed|launch|script|page", answer.json()["reason"]), answer.text
        assert opened == 3
        assert state() == before
        assert sorted(FolderStore(Path(service.environment["HPO_ARTIFACTS"])).keys()) == files


def test_notes_in_the_dashboard_are_their_owners(service: Service, finished: str) -> None:
    with closing(trial_storage(service.database_url)) as storage:
        study_id = storage.get_study_id_from_name(finished)
        attributes = storage.get_study_system_attrs(study_id)
        version = int(attributes.get("dashboard:note_ver", 0))
        trial_id = storage.get_all_trials(study_id)[0]._trial_id
    note, attribute = f"/api/studies/{study_id}/note", f"/api/trials/{trial_id}/user-attrs"
    for role, owner, status in (
        ("read", "ada", 403),
        ("submit", "eve", 403),
        ("submit", "ada", 204),
        ("admin", "root", 204),
    ):
        with Browser(service.url, service.token(role, owner)) as browser:
            version += status == 204
            written = browser.put(note, json={"version": version, "body": f"by {owner}"})
            assert written.status_code == status, written.text
            ended = 409 if status == 204 else status  # a trial that has ended changes no more
            assert browser.post(attribute, json={"user_attrs": {"seen by": owner}}).status_code == ended
            assert browser.put(note, json={}, headers={"Origin": "https://evil.example"}).status_code == 403
            browser.headers.pop("Origin")
            assert browser.put(note, json={"version": version + 1, "body": "x"}).status_code == 403
    (last,) = Access(service.database_url).actions(finished, most=1)
    assert (last.action, last.owner, last.detail) == ("study.annotate", "root", {"path": attribute})


def test_the_description_of_the_api_opens_with_the_session_too(service: Service, tmp_path: Path) -> None:
    app = make_app(Backend(service.database_url, FolderStore(tmp_path)), Hosts(reachable=True))
    with Browser(service.url, service.token("read")) as browser:
        cookies = {COOKIE: browser.cookies[COOKIE]}

    async def ask(path: str, cookies: dict[str, str]) -> int:
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://192.0.2.1", cookies=cookies) as client:
            return (await client.get(path)).status_code

    for path in ("/docs", "/openapi.json"):
        assert asyncio.run(ask(path, {})) in (303, 401)
        assert asyncio.run(ask(path, cookies)) == 200
    app.state.backend.close()


def test_the_events_of_a_study_are_for_whoever_is_signed_in(ada: Browser, finished: str) -> None:
    with ada.stream("GET", "/studies/waves/events") as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[1] == "event: end"
    assert json.loads(lines[2].removeprefix("data: "))["status"] == "finished"


def test_roles_are_those_of_the_tokens() -> None:
    assert ROLES == ("read", "submit", "admin")  # what pages ask for by name


def test_a_trial_is_dropped_and_restored_on_its_page(ada: Browser, finished: str) -> None:
    page = "/studies/waves/trials/0"
    without = ada.send_form(f"{page}/drop", page, reason=" ")
    assert (without.status_code, "say why in 1 to 500 characters" in said(without)) == (422, True)
    assert ada.send_form(f"{page}/drop", page, reason="<b>wrong</b> file").headers["location"] == f"{page}?done=dropped"
    shown = ada.get(f"{page}?done=dropped").text
    assert "The trial does not count any more." in shown
    assert "dropped by ada" in shown
    assert "&lt;b&gt;wrong&lt;/b&gt; file" in shown
    study = ada.get("/studies/waves").text
    assert 'tag dropped">dropped</span>' in study
    assert ", 1 dropped" in study
    assert ada.send_form(f"{page}/restore", page).headers["location"] == f"{page}?done=restored"
    assert "dropped" not in ada.get("/studies/waves").text
    assert ada.send_form(f"{page}/forget", page).status_code == 404
    assert ada.send_form("/studies/waves/trials/99/drop", page, reason="x").status_code == 404
