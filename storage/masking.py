"""No password leaves the program: addresses, tracebacks and messages of libraries are masked on their way out.

Two nets. What is known to be secret (passwords of the addresses that this process uses, and the environment's) is
replaced wherever it stands, however it is quoted. What looks like a secret is replaced by the form of the text around
it, rather too much than too little: it may be malformed, and it may belong to another program.
"""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

MASK = "***"
# Variables that hold a secret, or an address with one.
SECRETS = (
    "PGPASSWORD",
    "HPO_DB_PASSWORD",
    "HPO_DASHBOARD_PASSWORD",
    "HPO_TOKEN",
    "HPO_NOTIFY_SECRET",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
)
ADDRESSES = ("HPO_DATABASE_URL", "HPO_ARTIFACTS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
LEAST = 6  # characters of a secret that is looked for everywhere: a shorter one is part of many words
_remembered: set[str] = set()

_START = r"(\b[\w+.-]{2,30}://(?!\[[0-9A-Fa-f:.]*\])"
# scheme://user: … @, to the last @ before the next address: a password may hold spaces, quotes, ends of lines, and what
# looks like an address, but for a scheme of small letters that begins a word.
_NEXT = r"(?<![@:\w+.-])[a-z][a-z0-9+.-]+://"
_URL = re.compile(_START + r"[^:/@\n]*:)(?!\*\*\*@)((?:(?!" + _NEXT + r").){0,3000})@", re.DOTALL)
# An @ behind an address without a password: postgresql://db:5432/x fails for me@example.org.
_NOT_ITS_OWN = re.compile(r"\d{1,5}([/?,][^\s@]*)?\W?\s")
# Without an @: what follows the colon is no port.
_NO_PORT = r"(?!\d*(?:[/?,;)\]}\s'\".:]|$)|\*\*\*)"
_NO_HOST = re.compile(_START + r"[^\s:/@]*:)" + _NO_PORT + r"[^\n]+")
_NAMES = (
    r"(?:\w*pass(?:word|wd|phrase)|pwd|\w*secret(?:_?access)?(?:_?key)?|\w*(?:session|auth|access)_?token"
    r"|x-amz-signature)"
)
# In a URL's query to the next &, elsewhere to the closing quote or the next space.
_IN_QUERY = re.compile(rf"(?i)([?&]{_NAMES}=)[^&\s]*")
_PAIR = re.compile(
    rf"""(?i)((?<![?&\w]){_NAMES}["']?\s*[=:]\s*)"""
    r"""(?!\*\*\*)("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|["'][^\n]*|(?:\\.|[^\s\\])+)"""
)
# What libpq quotes of an address that it cannot read, to the last quote: there may be some in it.
_QUOTED = re.compile(
    r'((?:percent-encoded (?:token|value):|missing "=" after|invalid connection option|URI query parameter:'
    r'|port number:|integer value|in URI:) )".*"|(host name )"[^"\n]*@.*"',
    re.DOTALL,
)


# A token of the service; what is before its secret may be said.
_TOKEN = re.compile(r"(hpo_[0-9a-f]{12}_)[A-Za-z0-9_-]{20,}")


def remember(secret: str | None) -> None:
    """Mask this wherever it appears from now on, unless it is too short to be told from a word."""
    if secret and len(secret) >= LEAST:
        _remembered.add(secret)


def mask(text: str) -> str:
    """The text with every password in it replaced by ***."""
    if (known := _known(frozenset(_remembered | _from_environment()))) is not None:
        text = known.sub(MASK, text)
    text = _URL.sub(lambda found: found[0] if _NOT_ITS_OWN.match(found[2]) else f"{found[1]}{MASK}@", text)
    text = _NO_HOST.sub(rf"\1{MASK}", text)
    text = _QUOTED.sub(lambda found: f'{found[1] or found[2]}"{MASK}"', text)
    text = _TOKEN.sub(rf"\1{MASK}", text)
    text = _IN_QUERY.sub(rf"\1{MASK}", text)
    return _PAIR.sub(rf"\1{MASK}", text)


def without_quotes(message: str) -> str:
    """A message of libpq about an address, up to the first part of the address that it quotes."""
    known = message.replace('"="', "=").replace('"]"', "]")
    return known.split('"')[0].split("\n")[0].rstrip(" :")


def _from_environment() -> set[str]:
    found = {os.environ.get(name, "") for name in SECRETS}
    for name in ADDRESSES:
        if match := re.match(r"[\w+.-]+://[^:/@]*:(.*)@", os.environ.get(name, ""), re.DOTALL):
            found |= {match[1], unquote(match[1])}
    return {secret for secret in found if len(secret) >= LEAST}


@lru_cache(maxsize=8)
def _known(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """Every form in which a known secret may appear, the longest first."""
    forms = {form for secret in secrets for form in _forms(secret)}
    if not forms:
        return None
    return re.compile("|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in sorted(forms, key=len, reverse=True)))


def _forms(secret: str) -> set[str]:
    escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
    return {
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote(secret, safe=" +"),
        quote_plus(secret),
        escaped,
        repr(secret)[1:-1],
        repr(quote(secret, safe=" +"))[1:-1],
    }


class MaskedStream:
    """A text stream that masks what is written to it. For sys.stderr, where logs and tracebacks go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unmasked(stream: TextIO) -> TextIO:
    """The stream below a MaskedStream, for what masks by itself; any other stream as it is."""
    return stream._stream if isinstance(stream, MaskedStream) else stream


def mask_errors() -> None:
    """From now on this process's standard error is masked: logs, warnings, tracebacks, messages."""
    if sys.stderr is not None and not isinstance(sys.stderr, MaskedStream):
        sys.stderr = MaskedStream(sys.stderr)
