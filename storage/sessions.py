"""Browsers that are signed in with a token.

The cookie holds 256 random bits and the database their SHA-256, so that any process of the service knows it and no copy
of the database opens a door. A session ends with its token.
"""

from __future__ import annotations

import hashlib
import secrets

from hpo.storage.access import AccessError, Token
from hpo.storage.connection import Connection
from hpo.storage.statements import statement
from hpo.storage.tables import ensure

LIFETIME_S = 12 * 3600.0  # after which a browser signs in again
_BEGIN, _HOLDER, _END = (statement(name) for name in ("begin_session", "session_holder", "end_session"))
_FORGET = statement("forget_old_sessions")


class Sessions:
    """The sessions of a database; creates the tables where there are none. Raises PostgresError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        ensure(connection)

    def begin(self, token: Token, lifetime_s: float = LIFETIME_S) -> tuple[str, float]:
        """A new cookie for the token's holder, and the seconds that it is good for. Raises AccessError."""
        cookie = secrets.token_urlsafe(32)
        given = {"digest": _digest(cookie), "token": token.token_id, "lifetime_s": lifetime_s}
        rows = self._connection.execute(_FORGET, _BEGIN, given=given)
        if not rows:
            raise AccessError("this token has expired or was revoked")
        return cookie, float(rows[0][0])

    def holder(self, cookie: str) -> Token | None:
        """The token behind a cookie; None where there is none any more."""
        rows = self._connection.execute(_HOLDER, given={"digest": _digest(cookie)})
        return Token(*rows[0]) if rows else None

    def end(self, cookie: str) -> None:
        """The cookie opens nothing from now on."""
        self._connection.execute(_END, given={"digest": _digest(cookie)})


def _digest(cookie: str) -> bytes:
    return hashlib.sha256(cookie.encode("utf-8", "replace")).digest()
