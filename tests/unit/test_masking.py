"""No secret in any message: every form of address that we and our libraries print, whole and damaged."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import psycopg2
import pytest
import sqlalchemy
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn, parse_dsn

from hpo.storage import masking
from hpo.storage.errors import PostgresError
from hpo.storage.masking import mask, mask_errors
from hpo.storage.url import normalized, parameters

MARK = "XQZ"  # nothing else holds it, so that any part of a password shows
JUNK = st.text(st.sampled_from("@:/#?&=%+ \t'\"\\[]{}(),;.*$é🙂-_09"), max_size=4)
PASSWORDS = st.lists(JUNK, min_size=1, max_size=4).map(lambda parts: MARK + MARK.join(parts) + MARK)
USERS = st.sampled_from(["me", "", "me%20too", "a.b-c", "user[1]"])
HOSTS = st.sampled_from(["db", "db:5432", "[::1]:5432", "", "h1:1,h2:2", "%2Fvar%2Frun", "10.0.0.1"])
SCHEMES = st.sampled_from(["postgresql", "postgres", "postgresql+psycopg2", "mysql", "s3", "https", "redis"])


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has remembered is no net for the next one: the form of the text alone must do."""
    monkeypatch.setattr(masking, "_remembered", set())
    for name in (*masking.SECRETS, *masking.ADDRESSES):
        monkeypatch.delenv(name, raising=False)


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "percent-encoded": lambda text: quote(text, safe=""),
    "as SQLAlchemy encodes it": lambda text: quote(text, safe=" +"),
}
AROUND = [
    "{}",
    "cannot reach {}",
    "cannot reach {} today",
    "({})",
    "'{}'",
    'File "x.py", line 3, in connect\n    raise OperationalError("{}")\nOperationalError: {}\n',
    "no connection to {} within 2 s: connection to server failed for user me",
    "{}\nand then postgresql://other:5432/db or {}",
    "first https://example.org/page, then {}",
    "{},{}",
]


@given(PASSWORDS, USERS, HOSTS, SCHEMES, st.sampled_from(list(FORMS)), st.sampled_from(AROUND))
@example("XQZ@XQZ://XQZ", "me", "db", "postgresql", "as it is", "{}")
@example("XQZ@XQZ:XQZ://XQZ", "me", "db", "postgresql", "as it is", "{}")
@example("XQZ@ XQZ://XQZ", "me", "db", "postgresql", "as it is", "{}")
def test_no_part_of_a_password_in_a_url_is_shown(
    password: str, user: str, host: str, scheme: str, form: str, around: str
) -> None:
    url = f"{scheme}://{user}:{FORMS[form](password)}@{host}/db?sslmode=require"
    masked = mask(around.replace("{}", url))
    assert MARK not in masked
    assert mask(masked) == masked


@given(PASSWORDS, st.sampled_from(AROUND))
def test_no_part_of_a_password_with_ends_of_lines_is_shown(password: str, around: str) -> None:
    url = f"postgresql://me:{password[:5]}\n{password}@db/x"
    assert MARK not in mask(around.replace("{}", url))


@given(PASSWORDS, st.sampled_from(AROUND))
def test_no_part_of_a_password_among_pairs_is_shown(password: str, around: str) -> None:
    pairs = [
        make_dsn(host="db", password=password, dbname="x"),
        repr({"user": "me", "password": password, "port": 1}),
        f"postgresql://db/x?user=me&password={quote(password, safe='')}&sslmode=require",
        f"postgresql://db/x?sslpassword={quote_plus(password)}",
        f"PGPASSWORD={quote(password, safe='')} psql",
        f"AWS_SECRET_ACCESS_KEY={quote(password, safe='')}",
        f"https://bucket.example.org/key?X-Amz-Signature={quote(password, safe='')}&x=1",
    ]
    for text in pairs:
        masked = mask(around.replace("{}", text) if "'{}'" not in around else text)
        assert MARK not in masked


@given(PASSWORDS, st.sampled_from(AROUND))
def test_a_password_in_use_is_shown_in_no_text_and_no_form(password: str, around: str) -> None:
    """Also where nothing around it tells that it is one."""
    parameters(f"postgresql://me:{quote(password, safe='')}@db/x")
    forms: list[Callable[[str], str]] = [*FORMS.values(), quote_plus, repr]
    for form in forms:
        assert password not in mask(around.replace("{}", f" {form(password)} "))
        assert MARK not in mask(f"tried {form(password)} in vain")
    masking._remembered.clear()


def test_secrets_of_the_environment_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in masking.SECRETS:
        monkeypatch.setenv(name, f"{name} {MARK}")
    for name in masking.ADDRESSES:
        monkeypatch.setenv(name, f"http://me:{name}-{MARK}%40home@host/x")
    for name in masking.SECRETS:
        assert MARK not in mask(f"it said {name} {MARK}.")
    for name in masking.ADDRESSES:
        assert MARK not in mask(f"it said {name}-{MARK}@home, then {name}-{MARK}%40home.")


def test_a_short_password_is_masked_in_addresses_and_leaves_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters("postgresql://hpo:hpo@db/hpo")
    assert mask("hpo: no connection to postgresql://hpo:hpo@db/hpo") == (
        "hpo: no connection to postgresql://hpo:***@db/hpo"
    )


@pytest.mark.parametrize(
    "text",
    [
        "nothing to hide: 1 < 2",
        "dashboard at http://127.0.0.1:8080 (Ctrl-C ends it)",
        "postgresql://db:5432/x refuses; write to me@example.org",
        "postgresql+psycopg2:///db?host=%2Fvar%2Frun&port=5432",
        "http://[::1]:8080/x and me@example.org",
        "s3://bucket/prefix/key",
        "password authentication failed for user \"me\"",
        "File \"x.py\", line 3, in f\n  @property",
    ],
)  # fmt: skip
def test_what_holds_no_password_is_left_alone(text: str) -> None:
    assert mask(text) == text


BROKEN = [
    "postgresql://me:{}@db/x",
    "postgresql://me:{}/{}@db/x",
    "postgresql://me:{}@{}@db/x",
    "postgresql://me:%{}@db/x",
    "postgresql://me:{}",
    "postgresql://me:{}@[::1/x",
    "postgresql://me:{}@db/x?password={}&nonsense=1",
    "postgresql://db/x?{}=1",
    "host=db password={} {} =",
    "host=db password='{}",
    "password={} {}=1",
    "mysql://me:{}@db/x",
    "{}:{}@db/x",
    "{} {}",
]


@given(st.sampled_from(BROKEN), PASSWORDS)
def test_an_address_that_is_refused_shows_no_part_of_it(form: str, password: str) -> None:
    """libpq quotes what it could not read: `invalid percent-encoded token: "p%zz"`."""
    address = form.replace("{}", password)
    said = raised_by(normalized, address)
    assert "\n" not in said
    assert MARK not in said


@given(st.sampled_from(BROKEN), PASSWORDS)
def test_no_part_of_a_password_in_a_message_of_a_library_is_shown(form: str, password: str) -> None:
    if "host=db" in form or "password={}" in form or form.startswith("{}") or "?{}" in form:
        return  # what stands behind a password without quotes is no password to anybody but its owner
    if "@" not in form:  # nobody could tell where it ends
        password = re.sub(r"[@\n\r]", "", password)
    address = form.replace("{}", password.replace("://", ":/"))  # it would be another address to anybody
    for read in (parse_dsn, sqlalchemy.make_url):
        assert MARK not in mask(f"{raised_by(read, address)} for {address}")


def raised_by(call: Callable[[str], Any], address: str) -> str:
    """The message of the error that comes of it, if one does."""
    try:
        call(address)
    except (PostgresError, psycopg2.Error, sqlalchemy.exc.ArgumentError) as error:
        return str(error)
    except UnicodeDecodeError as error:  # psycopg2's, of what is no UTF-8 once it is decoded
        return str(error)
    except ValueError:  # SQLAlchemy's int(port): we do not let it read what somebody wrote
        assert call is sqlalchemy.make_url
    return ""


def test_logs_warnings_and_tracebacks_of_a_process_are_masked(tmp_path: Path) -> None:
    code = f"""
import logging, sys, threading, warnings
from hpo.storage.masking import mask_errors
mask_errors()
mask_errors()
logging.basicConfig()
url = "postgresql://me:{MARK}@db/x"
logging.error("cannot reach %s", url)
warnings.warn(url)
print(url, file=sys.stderr)
thread = threading.Thread(target=lambda: int(url))
thread.start(); thread.join()
try:
    int(url)
except ValueError as error:
    raise RuntimeError(f"at {{url}}") from error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("postgresql://me:***@db/x") >= 5
    source = [line for line in done.stderr.splitlines() if MARK in line]
    assert source == []
    assert "Traceback" in done.stderr


def test_a_masked_stream_is_the_stream_but_for_what_is_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", sys.stderr)
        mask_errors()
        assert sys.stderr.write("a pg://c:d@e\n") == 13
        sys.stderr.writelines(["plain\n"])
        assert sys.stderr.isatty() is False
    assert capsys.readouterr().err == "a pg://c:***@e\nplain\n"
