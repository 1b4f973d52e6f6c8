"""Who may use the service: tokens, what their holders did, and whose a study is.

A token is `hpo_ID_SECRET`. The database keeps the SHA-256 of the secret, which is 256 random bits, so that it needs no
slow hash; the ID is what lists, logs and the audit say.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpo.errors import HpoError
from hpo.storage.connection import Connection, Row
from hpo.storage.statements import statement
from hpo.storage.tables import ensure

ROLES = ("read", "submit", "admin")  # each may do what those before it may, and more
TOKEN = re.compile(r"hpo_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,99}")
_ADD, _ALL, _DIGEST, _REVOKE = (statement(name) for name in ("add_token", "tokens", "token_digest", "revoke_token"))
_NOTE, _ACTIONS = statement("note_action"), statement("actions")
_CLAIM, _SUBMISSION, _FORGET = (
    statement(name) for name in ("claim_submission", "submission", "forget_old_submissions")
)
_STUDY_OWNER, _ANNOTATED, _ANY = (statement(name) for name in ("study_owner", "annotated_study", "any_token"))
_ADMISSIONS = statement("admissions")
_UNKEPT = re.compile(r"[\0\ud800-\udfff]")  # what PostgreSQL cannot be asked for


class AccessError(HpoError):
    """There is no such token, or one cannot be made like this."""


class SubmissionConflict(HpoError):
    """The key of a submission was used for another one."""


@dataclass(frozen=True)
class Token:
    """What is known of a token; not its secret."""

    token_id: str
    role: str
    owner: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    active: bool  # neither expired nor revoked when it was read

    def may(self, role: str) -> bool:
        """Whether its holder may do what that role may."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Asked:
    """What a request for a model says: its token's text, the model's name, and a number or an alias."""

    token: str
    name: str
    wanted: str


@dataclass(frozen=True)
class Admission:
    """Who asks, and for which version of the model."""

    token: Token | None  # None: it opens nothing
    version: int | None  # None: there is no such model, version or alias
    made_at: datetime | None  # which tells a version from an earlier one of its number


@dataclass(frozen=True)
class Action:
    """A line of the audit."""

    happened_at: datetime
    owner: str
    token_id: str | None
    action: str  # as in "study.submit"
    subject: str  # the name of what was written to
    detail: dict[str, Any]


class Access:
    """The tokens of a database; creates the tables where there are none.

    database: a URL, or a connection to share. Raises PostgresError like it.
    """

    def __init__(self, database: str | Connection) -> None:
        self._connection = Connection(database) if isinstance(database, str) else database
        ensure(self._connection)

    # ------------------------------------------------------------------------------------------------------ tokens

    def create(self, role: str, owner: str, lifetime_s: float | None = None) -> tuple[Token, str]:
        """A new token and its text, which is not kept and cannot be had again. Raises AccessError."""
        if role not in ROLES:
            raise AccessError(f"a role is one of {', '.join(ROLES)}, got {role!r}")
        if not _OWNER.fullmatch(owner):
            rule = "1 to 100 of A-Z a-z 0-9 @ . _ - and begins with a letter or digit"
            raise AccessError(f"an owner is {rule}, got {owner!r}")
        if lifetime_s is not None and lifetime_s <= 0:
            raise AccessError(f"a token expires after some time, got {lifetime_s:g} s")
        token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        given = {"token": token_id, "digest": _digest(secret), "role": role, "owner": owner, "lifetime_s": lifetime_s}
        self._connection.execute(_ADD, given=given)
        return self._token(token_id), f"hpo_{token_id}_{secret}"

    def tokens(self) -> list[Token]:
        """All of them, also those that open nothing any more, oldest first."""
        return [Token(*row) for row in self._connection.execute(_ALL)]

    def any(self) -> bool:
        """Whether there is one that opens the door."""
        return bool(self._connection.execute(_ANY)[0][0])

    def revoke(self, token_id: str) -> Token:
        """It opens nothing from now on. Raises AccessError where there is none."""
        self._connection.execute(_REVOKE, given={"token": token_id})
        return self._token(token_id)

    def holder(self, text: str) -> Token | None:
        """The token of that text; None where there is none, or it has expired or was revoked."""
        found = TOKEN.fullmatch(text)
        if found is None:
            return None
        rows = self._connection.execute(_DIGEST, given={"token": found[1]})
        return _opened(found[2], rows[0] if rows else (None,))

    def admissions(self, asked: Sequence[Asked]) -> list[Admission]:
        """`holder` and the version of each request, in one round trip."""
        found = [TOKEN.fullmatch(each.token) for each in asked]
        given = {
            "tokens": [token[1] if token else "" for token in found],
            "names": [_UNKEPT.sub("/", each.name) for each in asked],  # no name has a slash
            "wanted": [_UNKEPT.sub("/", each.wanted) for each in asked],
        }
        rows = self._connection.execute(_ADMISSIONS, given=given)
        return [
            Admission(_opened(token[2] if token else "", row[:-2]), *row[-2:])
            for token, row in zip(found, rows, strict=True)
        ]

    def _token(self, token_id: str) -> Token:
        for token in self.tokens():
            if token.token_id == token_id:
                return token
        known = ", ".join(token.token_id for token in self.tokens()) or "none yet"
        raise AccessError(f"there is no token {token_id!r}; known: {known}")

    # ------------------------------------------------------------------------------------------------------- audit

    def note(self, by: Token, action: str, subject: str, detail: Mapping[str, Any] | None = None) -> None:
        """Keep that the token's holder did this."""
        given = {"owner": by.owner, "token": by.token_id, "action": action, "subject": subject}
        self._connection.execute(_NOTE, given={**given, "detail": json.dumps(dict(detail or {}))})

    def actions(self, subject: str | None = None, most: int = 100) -> list[Action]:
        """The last of them, the newest first; of one subject, or of all."""
        rows = self._connection.execute(_ACTIONS, given={"subject": subject, "most": most})
        return [Action(*row) for row in rows]

    # ----------------------------------------------------------------------------------------------------- studies

    def claim(self, owner: str, key: str, study_name: str, digest: str) -> None:
        """Let the owner's key mean this submission, known by its digest, for a month.

        Does nothing where it does already. Raises SubmissionConflict where it means another one.
        """
        given = {"owner": owner, "key": key, "study_name": study_name, "digest": digest}
        ((name, claimed),) = self._connection.execute(_FORGET, _CLAIM, _SUBMISSION, given=given)
        if claimed != digest:
            raise SubmissionConflict(
                f"the Idempotency-Key {key!r} was used for another submission, of the study {name!r}: take a new key "
                "for each study"
            )

    def owner_of(self, study_id: int) -> str | None:
        """Who submitted the study; None where nobody did through the service, and for one that there is not."""
        rows = self._connection.execute(_STUDY_OWNER, given={"study": study_id})
        return rows[0][0] if rows else None

    def annotated(self, *, study_id: int | None = None, trial_id: int | None = None) -> tuple[str, str | None] | None:
        """Name and owner of a study, or of a trial's study; None where there is none."""
        rows = self._connection.execute(_ANNOTATED, given={"study": study_id, "trial": trial_id})
        return (rows[0][0], rows[0][1]) if rows else None


def _opened(secret: str, row: Row) -> Token | None:
    """The token of a row whose first column is the digest of its secret, or None where there is no row."""
    kept = b"" if row[0] is None else bytes(row[0])
    right = hmac.compare_digest(_digest(secret), kept.ljust(hashlib.sha256().digest_size))
    return Token(*row[1:]) if right else None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
