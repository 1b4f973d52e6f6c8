"""Database URLs: read, completed with a password, shown without one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpo.storage.errors import PostgresError


def mask(text: str) -> str:
    """The text, a URL or one with URLs in it, with every password replaced by ***."""
    text = re.sub(r"(\b[\w+.-]{2,30}://[^:/@\n]*:)(\S*|[^@\n]*)@", r"\1***@", text)  # SQLAlchemy leaves spaces
    return re.sub(r"""(?i)(password["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s&,}]+)""", r"\1***", text)


def normalized(text: str) -> str:
    """HPO_DATABASE_URL in SQLAlchemy's form for psycopg2, with the password from file or environment if it has none.

    Raises PostgresError for anything but a PostgreSQL URL.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise PostgresError(
            "HPO_DATABASE_URL must be a PostgreSQL URL (postgresql://user@host:port/database), "
            f"got {mask(text)!r}; unset it to use the embedded server"
        ) from None
    if not url.password and (password := _given_password()):
        url = url.set(password=password)
    return url.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)


def _given_password() -> str | None:
    """From the file HPO_DATABASE_PASSWORD_FILE (its last line break dropped), else PGPASSWORD."""
    path = os.environ.get("HPO_DATABASE_PASSWORD_FILE")
    if not path:
        return os.environ.get("PGPASSWORD")
    try:
        return Path(path).read_text().rstrip("\r\n")
    except OSError as error:
        raise PostgresError(f"HPO_DATABASE_PASSWORD_FILE {path} cannot be read: {error.strerror}") from None
