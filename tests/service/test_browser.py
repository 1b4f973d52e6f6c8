"""The pages in a real headless browser: the whole way by mouse, by the keys alone, and what everybody can read."""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, FileChooser, Locator, expect

from tests.browser import PATIENCE_S, Tab
from tests.conftest import wait_for
from tests.service.conftest import Service

pytestmark = pytest.mark.xdist_group("service-browser")

# Of every text that is seen: its colour over what lies behind it, by WCAG 2.2. Answers what contrasts less than AA.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const colour = (text) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(colour(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, [r, g, b, a]) =>
      [r, g, b].map((v, i) => v * a / 255 + under[i] * (1 - a / 255)), [255, 255, 255]);
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || style.clipPath !== "none") continue;
    const [one, two] = [light(colour(style.color)), light(behind(element))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push([walker.currentNode.data.trim(), style.color, ratio]);
  }
  return poor;
}"""
# What has no name for somebody who does not see it, or is twice there.
NAMELESS = """() => {
  const poor = [];
  for (const e of document.querySelectorAll("input:not([type=hidden]), select, textarea"))
    if (!e.labels.length && !e.ariaLabel) poor.push(e.outerHTML);
  for (const e of document.querySelectorAll("a, button, summary, h1, h2, h3, th:not(.report th)"))
    if (!e.textContent.trim() && !e.ariaLabel && !e.querySelector("img[alt]:not([alt=''])")) poor.push(e.outerHTML);
  const pictures = "img:not([alt]), svg:not([role=img]):not([aria-hidden]), [role=img]:not([aria-label])";
  for (const e of document.querySelectorAll(pictures)) poor.push(e.outerHTML);
  for (const e of document.querySelectorAll("nav, [role=region], section"))
    if (!e.ariaLabel && !document.getElementById(e.getAttribute("aria-labelledby"))?.textContent.trim())
      poor.push(e.outerHTML);
  for (const e of document.querySelectorAll("[aria-describedby]"))
    for (const id of e.getAttribute("aria-describedby").split(" ")) if (!document.getElementById(id)) poor.push(id);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  poor.push(...ids.filter((id, i) => ids.indexOf(id) !== i));
  for (const once of ["main", "h1"]) if (document.querySelectorAll(once).length !== 1) poor.push(once);
  if (!document.documentElement.lang || !document.title) poor.push("lang, title");
  return poor;
}"""


@contextmanager
def tab_of(browser: Browser, **options: Any) -> Iterator[Tab]:
    options = {"viewport": {"width": 1280, "height": 900}, **options}
    with browser.new_context(**options) as context:
        context.set_default_timeout(1000 * PATIENCE_S)
        yield Tab(context.new_page())


def sign_in(tab: Tab, service: Service, token: str) -> None:
    tab.page.goto(service.url)
    tab.page.get_by_label("Token").fill(token)
    tab.page.get_by_role("button", name="Sign in").click()
    expect(tab.page.get_by_role("heading", name="Studies", exact=True)).to_be_visible()


def start(tab: Tab, service: Service, data: Path, name: str, trials: int) -> None:
    tab.page.goto(f"{service.url}/new")
    tab.page.get_by_label("Training data").set_input_files(data)
    tab.page.get_by_role("button", name="Check the data").click()
    tab.shows("fast · 30")
    tab.page.get_by_label("Name").fill(name)
    tab.page.get_by_label("Trials").fill(str(trials))
    tab.page.get_by_role("button", name="Start the study").click()
    tab.shows("The study has started.")


def downloaded(tab: Tab, click: Locator) -> bytes:
    with tab.page.expect_download() as download:
        click.click()
    return Path(download.value.path()).read_bytes()


def test_from_a_file_to_predictions(browser: Browser, service: Service, waves: Path) -> None:
    """Nothing is reloaded by hand from the start of the study to its model."""
    with tab_of(browser) as tab:
        page = tab.page
        sign_in(tab, service, service.token())
        start(tab, service, waves, "seen", 4)
        tab.shows("No worker is alive")
        page.evaluate("window.before = true")
        worker = threading.Thread(target=service.work, args=("seen",))
        worker.start()
        try:
            tab.shows(re.compile("[1-4] of 4 trials"))
            tab.shows("Model seen, version 1")
        finally:
            worker.join(120)
        expect(page.locator("#status")).to_have_text("finished")
        tab.shows("4 of 4 trials")
        assert page.evaluate("window.before") is True
        archive = downloaded(tab, page.get_by_role("link", name="Download"))
        assert "seen/model.safetensors" in zipfile.ZipFile(io.BytesIO(archive)).namelist()
        page.get_by_role("link", name="Predict and more").click()
        page.get_by_label("Sequences").set_input_files(waves)
        page.get_by_role("button", name="Predict", exact=True).click()
        tab.shows("60 predictions for waves.npz")
        page.get_by_label("The same file as CSV").set_input_files(waves)
        csv = downloaded(tab, page.get_by_role("button", name="Predict to CSV"))
        assert csv.startswith(b"id,predicted,probability_fast,probability_slow\r\n")
        page.get_by_role("link", name="seen version 1").click()
        page.get_by_role("link", name="Model card").click()
        expect(page.get_by_role("img", name="confusion")).to_be_visible()
        wait_for(lambda: page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)"))
        page.get_by_role("link", name="Dashboard").click()
        expect(page.locator("a", has_text="seen").first).to_be_visible()
        page.goto(f"{service.url}/studies/seen")
        page.get_by_role("link", name="Open in the dashboard").click()
        tab.shows("Hyperparameter Importance")
        page.goto(service.url)
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        page.go_back()
        expect(page.get_by_label("Token")).to_be_visible()
        assert tab.errors == []


def test_without_javascript_everything_but_the_live_update_works(
    browser: Browser, service: Service, waves: Path
) -> None:
    with tab_of(browser, java_script_enabled=False) as tab:
        page = tab.page
        sign_in(tab, service, service.token())
        start(tab, service, waves, "plain", 1)
        page.locator("summary", has_text="Stop").click()
        page.get_by_role("button", name="Stop plain").click()
        tab.shows("The study is stopped.")
        page.locator("summary", has_text="Resume").click()
        page.get_by_label("Trials in all").fill("x")
        page.get_by_role("button", name="Resume plain").click()
        tab.shows("trials must be a whole number, got 'x'")
        assert page.get_by_label("Trials in all").input_value() == "x"
        page.get_by_label("Trials in all").fill("3")
        page.get_by_role("button", name="Resume plain").click()
        tab.shows("0 of 3 trials")
        page.locator("summary", has_text="Delete").click()
        page.get_by_role("button", name="Delete plain").click()
        tab.shows("The study is deleted.")


def test_with_the_keys_alone(browser: Browser, service: Service, waves: Path) -> None:
    with tab_of(browser) as tab:
        page = tab.page
        press = page.keyboard.press

        def walk_to(what: Locator) -> None:
            """Tab until it has the focus, which is seen wherever it is."""
            expect(what).to_be_attached()
            for _ in range(60):
                press("Tab")
                style = "getComputedStyle(document.activeElement)"
                assert page.evaluate(f"{style}.outlineStyle !== 'none' || document.activeElement === document.body")
                if what.evaluate("element => element === document.activeElement"):
                    return
            pytest.fail("the keys do not lead there")

        page.goto(service.url)
        page.keyboard.type(service.token())  # the field has the focus
        press("Enter")
        tab.shows("Studies")
        press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
        press("Enter")
        expect(page.locator("main")).to_be_focused()
        walk_to(page.get_by_role("main").get_by_role("link", name="New study").first)
        press("Enter")
        page.wait_for_url("**/new")  # whole, or what is loaded late may take the focus back
        walk_to(page.get_by_label("Training data"))
        choosers: list[FileChooser] = []
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        for _ in range(6):  # on a busy machine the browser may show none at the first press
            press("Space")
            page.wait_for_timeout(2_000)
            if choosers:
                break
        choosers[0].set_files(waves)
        walk_to(page.get_by_role("button", name="Check the data"))
        press("Enter")
        walk_to(page.get_by_label("Trials"))
        page.keyboard.type("2")
        walk_to(page.get_by_role("button", name="Start the study"))
        press("Space")
        tab.shows("The study has started.")
        walk_to(page.locator("summary", has_text="Delete"))
        press("Enter")
        walk_to(page.get_by_role("button", name="Delete waves"))
        press("Enter")
        tab.shows("The study is deleted.")
        walk_to(page.get_by_role("button", name="Sign out"))
        press("Enter")
        expect(page.get_by_label("Token")).to_be_focused()


@pytest.fixture(scope="module")
def paths(browser: Browser, service: Service, waves: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of each kind of page one, of a study that is over, whose data have groups."""
    grouped = tmp_path_factory.mktemp("grouped") / "waves.npz"
    with np.load(waves) as arrays:
        groups = np.array([f"a patient with quite a long name, {i // 3}" for i in range(60)])
        np.savez(grouped, X=arrays["X"], y=arrays["y"], groups=groups)
    with tab_of(browser) as tab:
        sign_in(tab, service, service.token())
        start(tab, service, grouped, "shown", 2)
        service.work("shown")
    shown = ["/studies/shown", "/studies/shown/trials/0", "/models/shown", "/models/shown/1/card"]
    return ["/", "/new", "/docs", "/studies/nothing", *shown]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_page_can_be_read_by_everybody(
    browser: Browser, service: Service, paths: list[str], waves: Path, width: int, scheme: Any
) -> None:
    """Contrast as WCAG's AA asks, a name for everything that is used, and nothing wider than the window."""

    def check(tab: Tab, path: str) -> None:
        for details in tab.page.locator("details").all():
            details.evaluate("element => { element.name = ''; element.open = true; }")
        assert tab.page.evaluate(CONTRAST) == [], path
        assert tab.page.evaluate(NAMELESS) == [], path
        wide = tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, (path, wide)

    with tab_of(browser, viewport={"width": width, "height": 800}, color_scheme=scheme) as tab:
        tab.page.goto(f"{service.url}/login")
        check(tab, "/login")
        sign_in(tab, service, service.token())
        for path in paths:
            tab.page.goto(service.url + path)
            check(tab, path)
        tab.page.goto(f"{service.url}/new")
        tab.page.get_by_label("Training data").set_input_files(waves)
        tab.page.get_by_role("button", name="Check the data").click()
        tab.shows("fast · 30")
        check(tab, "/new, checked")
        tab.page.get_by_label("Trials").fill("none")
        tab.page.get_by_role("button", name="Start the study").click()
        tab.shows("study.trials must be a whole number")
        check(tab, "/new/start")
        tab.page.goto(f"{service.url}/models/shown")
        tab.page.get_by_label("Sequences").set_input_files(waves)
        tab.page.get_by_role("button", name="Predict", exact=True).click()
        tab.shows("60 predictions")
        check(tab, "predictions")
