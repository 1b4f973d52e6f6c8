"""What `import hpo` gives: the calls, and every exception that their docstrings name."""

from __future__ import annotations

import re

import pytest

import hpo
from hpo.errors import HpoError

CALLS = [getattr(hpo, name) for name in hpo.__all__ if name[0].islower()]


def test_every_public_name_is_there() -> None:
    for name in hpo.__all__:
        found = getattr(hpo, name)
        assert callable(found)
        assert name[0].islower() or issubclass(found, HpoError)
    with pytest.raises(AttributeError, match="module 'hpo' has no attribute 'Nothing'"):
        hpo.Nothing  # noqa: B018


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_exceptions_of_a_call_come_from_hpo(call: object) -> None:
    """A day as a new user: the exceptions that the documentation names had to be looked for in the source."""
    raises = re.findall(r"Raises ([^.]*)\.", " ".join((call.__doc__ or "").split()))
    named = re.findall(r"\b[A-Z]\w*(?:Error|Interrupted|Lost|Memory)\b|\bInterrupted\b", " ".join(raises))
    assert named
    assert set(named) <= set(hpo.__all__)


def test_an_error_of_a_user_is_caught_by_its_public_name(tmp_path: object) -> None:
    with pytest.raises(hpo.DataError, match=r"unknown suffix"):
        hpo.read("data.doc")
    with pytest.raises(hpo.BundleError):
        hpo.load("no-such-folder")
    with pytest.raises(hpo.ConfigError):
        hpo.launch("no-such-study.toml")
