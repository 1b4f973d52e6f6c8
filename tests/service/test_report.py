"""Reports at the service: who is told what, what a browser may do with them, and how they look."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import expect

import hpo
from hpo.storage.registry import Registry
from tests.reports import check_report
from tests.service.conftest import Service, upload
from tests.service.test_browser import CONTRAST, NAMELESS, sign_in, tab_of
from tests.service.test_page import Browser

pytestmark = pytest.mark.xdist_group("service-report")
FINALS = '[study]\nfinalists = 2\nrepeats = 2\nname = "'
LONG = "a class with quite a long name"


@pytest.fixture(scope="module")
def gait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 noisy sines of three frequencies, of 18 patients, two features; a table with names."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 3, 180)
    names = np.array(["sit", "walk", f"{LONG} <b>&"])[kind]
    X = np.sin(np.arange(12) * np.array([0.4, 1.2, 1.5])[kind][:, None] + random.uniform(0, 6, (180, 1)))
    rows = ["id,step,label,group,x,y"]
    for i in range(180):
        rows += [f"Ada {i},{t},{names[i]},Patient {i % 18},{v},{v * v}" for t, v in enumerate(X[i])]
    path = tmp_path_factory.mktemp("data") / "gait.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def studies(service: Service, gait: Path, task: Callable[..., str]) -> None:
    """Of ada's: one that is over, with finals, and one that nobody works on."""
    with service.client("submit", "ada") as client:
        key = upload(client, gait)
        for name, text in (("gait", FINALS), ("idle", '[study]\nname = "')):
            content = task(name, key, 24).replace('[study]\nname = "', text)
            answer = client.post("/v1/studies", content=content)
            assert answer.status_code == 201, answer.text
    service.work("gait")


def report(service: Service, path: str, role: str = "submit", owner: str = "ada") -> str:
    with service.client(role, owner) as client:
        answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    check_report(answer.text)
    return answer.text


def test_a_models_report_is_the_file_in_its_folder(service: Service) -> None:
    text = report(service, "/v1/models/gait/latest/report", "read", "bob")
    with service.client("read", "bob") as client:
        archive = zipfile.ZipFile(io.BytesIO(client.get("/v1/models/gait/1/bundle").content))
        assert client.get("/v1/models/gait/1/card").text.startswith("# gait")
    assert archive.read("gait/report.html").decode() == text
    assert not re.search(r"Ada \d|Patient", text)


def test_a_studys_report_tells_its_owner_and_admins_more(service: Service) -> None:
    for role, owner in (("read", "ada"), ("admin", "root")):
        text = report(service, "/v1/studies/gait/report", role, owner)
        assert re.search(r"Ada \d", text)
        assert "Patient" in text
    shared = report(service, "/v1/studies/gait/report", "submit", "bob")
    assert not re.search(r"Ada \d|Patient", shared)
    assert "Model gait, version 1" in shared
    assert "<b>&amp;" not in shared
    assert "&lt;b&gt;&amp;" in shared


def test_a_study_that_has_not_begun(service: Service) -> None:
    assert "No trial has begun of 24 trials" in report(service, "/v1/studies/idle/report")


def test_nobody_gets_one_without_a_token_and_nothing_is_404(service: Service) -> None:
    with service.with_token(None) as client:
        for path in ("/v1/studies/gait/report", "/v1/models/gait/1/report"):
            assert client.get(path).status_code == 401
        assert client.get("/studies/gait/report", follow_redirects=False).status_code == 303
    with service.client() as client:
        assert client.get("/v1/studies/nothing/report").status_code == 404
        assert client.get("/v1/studies/gait/finals/report").status_code == 404
        registry = Registry(service.database_url)
        gait = registry.get("gait")
        assert gait.study_id is not None
        registry.promote(  # as an earlier version did
            "earlier",
            study_id=gait.study_id,
            study_name="gait",
            trial_number=0,
            scores=gait.scores,
            config=gait.config,
            artifacts={name: key for name, key in gait.artifacts.items() if name != "report.html"},
        )
        answer = client.get("/v1/models/earlier/1/report")
        assert answer.status_code == 404
        assert "was promoted without a report" in answer.json()["detail"]
    with Browser(service.url, service.token("submit", "ada")) as browser:
        assert "/models/gait/1/report" in browser.get("/models/gait/1").text
        assert "/studies/gait/report" in browser.get("/studies/gait").text
        page = browser.get("/models/earlier/1").text
        assert "/models/earlier/1/report" not in page
        assert "/models/earlier/1/card" in page


def test_the_client_has_it(service: Service) -> None:
    with hpo.connect(service.url, service.token()) as client:
        check_report(client.report("gait"))


VISIBLE = """() => [...document.querySelectorAll("svg")].filter((svg) => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("path, circle, rect")].filter((e) => e.getBBox().width + e.getBBox().height);
  return !(box.width > 40 && box.height > 8 && marks.length);
}).map((svg) => svg.outerHTML.slice(0, 200))"""
# What lies outside the page and not within a box that scrolls, in which only captions have to lie within the page.
OUTSIDE = """() => [...document.querySelectorAll("main *")].filter((e) => {
  const box = e.getBoundingClientRect();
  const scrolled = e.closest(".scroll, pre, svg") && !e.matches("caption");
  return box.right > document.documentElement.clientWidth + 1 && !scrolled;
}).map((e) => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_can_be_read_by_everybody(browser: Chromium, service: Service, width: int, scheme: Any) -> None:
    with tab_of(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as tab:
        sign_in(tab, service, service.token())
        for path in ("/studies/gait/report", "/models/gait/1/report", "/studies/idle/report"):
            tab.page.goto(service.url + path)
            for details in tab.page.locator("details").all():
                details.evaluate("element => { element.open = true; }")
            wide = tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0
            assert tab.page.evaluate(OUTSIDE) == []
            assert tab.page.evaluate(VISIBLE) == []
            assert tab.page.evaluate(NAMELESS) == []
            poor = [each for each in tab.page.evaluate(CONTRAST) if "rgb(0, 0, 0)" not in each[1]]  # of SVG: its fill
            assert poor == []
        assert tab.errors == []


def test_it_works_as_a_file_offline_and_prints(browser: Chromium, service: Service, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report(service, "/v1/studies/gait/report"))
    with tab_of(browser, offline=True, color_scheme="dark") as tab:
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url))
        tab.page.goto(path.as_uri())
        expect(tab.page.get_by_role("heading", name="The answer")).to_be_visible()
        tab.page.get_by_role("link", name="Time and cost").click()
        expect(tab.page.get_by_role("heading", name="Time and cost")).to_be_in_viewport()
        assert tab.page.evaluate(VISIBLE) == []
        tab.page.emulate_media(media="print")
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.page.locator("nav").is_hidden()
        tab.page.set_viewport_size({"width": 700, "height": 1000})  # of A4
        assert tab.page.evaluate(VISIBLE) == []
        pdf = tab.page.pdf(format="A4")
        assert pdf.startswith(b"%PDF-")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 3
        assert {url.partition("#")[0] for url in asked} == {path.as_uri()}
        assert tab.errors == []
