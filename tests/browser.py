"""A real headless browser for tests.

Playwright drives the distribution's Chromium. As root with apt-get it is installed where it is missing, else tests that
need it are skipped. Playwright's own browsers are never downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.programs import program

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60.0  # a guard against hanging
FLAGS = (
    "--no-sandbox",  # root may not have one, and all pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path."""
    return program("chromium", *BROWSERS)


class Tab:
    """A tab of a browser without history. `errors` are those of its console and its scripts."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            self.errors.append(message.text)

    def shows(self, text: str | re.Pattern[str]) -> None:
        """Wait until the page shows the text."""
        expect(self.page.locator("body")).to_contain_text(text, use_inner_text=True)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    expect.set_options(timeout=1000 * PATIENCE_S)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, timeout=1000 * PATIENCE_S)
        yield browser
        browser.close()
