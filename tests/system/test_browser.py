"""The dashboard in a real headless browser, with a study that real workers have run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState
from playwright.sync_api import Browser, HttpCredentials, Page, expect

from hpo.storage.trials import trial_storage
from tests.browser import PATIENCE_S, Tab
from tests.conftest import fresh_database, wait_for

pytestmark = pytest.mark.xdist_group("browser")  # its tests share a study, a dashboard and a browser

PASSWORD = "käse & brot"
LOGIN = ("hpo", PASSWORD)
REFUSAL = "user name hpo and the dashboard's password are needed"
# Five good trials, one that learns nothing and is pruned, one that diverges.
STUDY = """
[study]
name = "waves"
metric = "log_loss"
trials = 7
pruner = "median"
[data]
train = "waves.npz"
validation = 0.25
[train]
epochs = 6
[space]
hidden_size = { low = 4, high = 8, step = 1 }
learning_rate = [0.05, 1e-9, 1e38]
batch_size = 16
layers = 1
head_size = 0
gradient_clip = 0.0
optimizer = "adamw"
pooling = "mean"
normalization = "none"
"""


class Site(NamedTuple):
    """A dashboard process, and what it shows."""

    url: str
    study: str  # address of the study's page
    trials: list[FrozenTrial]

    def trial(self, state: TrialState) -> FrozenTrial:
        return next(trial for trial in self.trials if trial.state == state)


@pytest.fixture(scope="module")
def site(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    _write_study(folder)
    with fresh_database(server, template) as url:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "PG"))} | {
            "HPO_HOME": str(folder / "home"),
            "HPO_DATABASE_URL": url,
            "HPO_ARTIFACTS": str(folder / "artifacts"),
            "HPO_DASHBOARD_PASSWORD": PASSWORD,
        }
        hpo = [sys.executable, "-P", "-m", "hpo"]
        launch = [*hpo, "launch", "waves.toml", "--workers", "1", "--quiet"]
        subprocess.run(launch, cwd=folder, env=environment, check=True, timeout=120)
        storage = trial_storage(url)
        study_id = storage.get_study_id_from_name("waves")
        trials = storage.get_all_trials(study_id)
        storage.close()
        command = [*hpo, "dashboard", "--port", "0"]
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as dashboard:
            assert dashboard.stdout is not None
            try:
                address = dashboard.stdout.readline().split()[2].rstrip("/")
                yield Site(address, f"{address}/dashboard/studies/{study_id}", trials)
            finally:
                dashboard.terminate()


def _write_study(folder: Path) -> None:
    """Sines of two frequencies that are easy to tell apart."""
    random = np.random.default_rng(0)
    y = np.arange(60) % 2
    X = np.sin(np.arange(12)[None, :, None] * (1 + y[:, None, None])) + random.normal(0, 0.2, (60, 12, 2))
    np.savez(folder / "waves.npz", X=X, y=np.array(["slow", "fast"])[y])
    queued = [(size, 0.05) for size in range(4, 9)] + [(4, 1e-9), (4, 1e38)]
    tables = (f"[[enqueue]]\nhidden_size = {size}\nlearning_rate = {rate}\n" for size, rate in queued)
    (folder / "waves.toml").write_text(STUDY + "".join(tables))


@contextmanager
def new_tab(browser: Browser, login: tuple[str, str] | None) -> Iterator[Tab]:
    """A tab in which a visitor gives this user and password, once, or cancels the dialog that asks for them."""
    credentials = HttpCredentials(username=login[0], password=login[1]) if login else None
    with browser.new_context(viewport={"width": 1400, "height": 1600}, http_credentials=credentials) as context:
        context.set_default_timeout(1000 * PATIENCE_S)
        page = context.new_page()
        if login is None:
            _cancel_logins(page)
        yield Tab(page)


def _cancel_logins(page: Page) -> None:
    """Playwright has no call for this: without credentials it fails where a visitor sees a dialog."""
    session = page.context.new_cdp_session(page)

    def answer(command: str, event: dict[str, Any], **parameters: object) -> None:
        session.send(command, {"requestId": event["requestId"], **parameters})

    cancel = {"response": "CancelAuth"}
    session.on("Fetch.requestPaused", lambda event: answer("Fetch.continueRequest", event))
    session.on(
        "Fetch.authRequired", lambda event: answer("Fetch.continueWithAuth", event, authChallengeResponse=cancel)
    )
    session.send("Fetch.enable", {"handleAuthRequests": True})


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab with the right password."""
    with new_tab(browser, LOGIN) as tab:
        yield tab


@pytest.mark.parametrize("login", [None, ("hpo", "wrong"), ("admin", PASSWORD)])
def test_without_the_right_password_nothing_is_shown(
    browser: Browser, site: Site, login: tuple[str, str] | None
) -> None:
    with new_tab(browser, login) as tab:
        for address in (f"{site.url}/", site.study, f"{site.url}/api/studies"):
            answer = tab.page.goto(address)
            tab.shows(REFUSAL)
            assert "waves" not in tab.page.content()
            assert answer is not None
            assert answer.status == 401


def test_the_list_leads_to_the_study_and_its_trials(tab: Tab, site: Site) -> None:
    assert [t.state.name for t in site.trials] == ["COMPLETE"] * 5 + ["PRUNED", "FAIL"]
    tab.page.goto(site.url)
    tab.shows("waves")
    tab.shows("Direction: MINIMIZE")
    tab.page.locator("a", has_text="waves").first.click()
    tab.shows("Hyperparameter Importance")
    expect(tab.page.locator(".js-plotly-plot .point").nth(4)).to_be_attached()
    assert tab.page.url == site.study
    tab.page.locator("a", has_text="Trials (List)").first.click()
    tab.shows("7 Trials")
    for number in range(7):
        tab.shows(re.compile(rf"\bTrial {number}\b"))
    for state in ("Complete", "Pruned", "Fail", "Best Trial"):
        tab.shows(state)
    tab.page.locator("a", has_text="Note").first.click()
    tab.shows("Promoted: model waves version 1 is trial")
    tab.shows('"metric": "log_loss"')
    assert tab.errors == []


def test_the_page_of_the_best_trial_shows_its_curve_its_log_and_its_model(tab: Tab, site: Site) -> None:
    best = min((t for t in site.trials if t.state == TrialState.COMPLETE), key=lambda t: t.value or 0.0)
    tab.page.goto(f"{site.study}/trials?numbers={best.number}")
    tab.shows(f"Trial {best.number} (trial_id=")
    shown = "[...document.images].some(i => i.alt == 'curve.svg' && i.naturalWidth > 0)"
    wait_for(lambda: tab.page.evaluate(shown))
    for name in ("model.safetensors", "config.json", "confusion.svg", "log.csv"):
        tab.shows(name)
    tab.page.get_by_label("show artifact table").first.click()
    tab.shows("epoch 1: log_loss")
    tab.shows("'learning_rate': 0.05")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert tab.errors == []


def test_the_page_of_a_failed_trial_shows_why(tab: Tab, site: Site) -> None:
    failed = site.trial(TrialState.FAIL)
    tab.page.goto(f"{site.study}/trials?numbers={failed.number}")
    tab.shows(f"failure {failed.user_attrs['failure']}")
    tab.page.get_by_label("show artifact table").first.click()
    tab.shows("Traceback (most recent call last)")
    assert tab.errors == []


def test_what_was_not_allowed_cannot_be_deleted(tab: Tab, site: Site) -> None:
    tab.page.goto(site.url)
    tab.shows("waves")
    api = site.study.replace("/dashboard/", "/api/")
    statuses = f"fetch({api!r}, {{method: 'DELETE'}}).then(a => fetch({api!r}).then(b => [a.status, b.status]))"
    assert tab.page.evaluate(statuses) == [403, 200]
