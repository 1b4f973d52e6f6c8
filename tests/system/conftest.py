"""A browser for the tests of this folder."""

from tests.browser import browser, chromium

__all__ = ["browser", "chromium"]
