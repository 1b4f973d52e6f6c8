"""Addresses of databases: read as libpq reads them, completed with a password, written as SQLAlchemy writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote

from hpo.storage.errors import PostgresError
from hpo.storage.masking import mask, remember, without_quotes

__all__ = ["mask", "normalized", "parameters", "without_password"]

_SCHEME = re.compile(r"(?:postgres|postgresql)(\+psycopg2)?://")
_PAIRS = re.compile(r"\s*\w+\s*=")
_HOST_AND_PORT = re.compile(r"([A-Za-z0-9.-]*):(\d*)")  # as SQLAlchemy writes one of several hosts in the query


def normalized(address: str, name: str = "HPO_DATABASE_URL") -> str:
    """An address of PostgreSQL in SQLAlchemy's form for psycopg2, which libpq reads alike but for its scheme.

    A password that it lacks is taken from the file HPO_DATABASE_PASSWORD_FILE or from PGPASSWORD. name: of what holds
    the address, for errors. Raises PostgresError.
    """
    given = parameters(address, name)
    if not given.get("password") and (password := _given_password(given)):
        given["password"] = password
        remember(password)
    return _rendered(given)


def without_password(address: str, name: str = "HPO_DATABASE_URL") -> str:
    """The address in the same form, without any password. Raises PostgresError."""
    given = parameters(address, name)
    return _rendered({key: value for key, value in given.items() if key not in ("password", "sslpassword")})


def parameters(address: str, name: str = "HPO_DATABASE_URL") -> dict[str, str]:
    """libpq's connection parameters of an address: of its own URLs and key=value strings, and of SQLAlchemy's URLs.

    Raises PostgresError for what neither reads, and where a password would be taken for a host or a port.
    """
    import psycopg2  # here, as importing this module must not need it
    from psycopg2.extensions import parse_dsn

    scheme = _SCHEME.match(address)
    if scheme is None and ("://" in address or not _PAIRS.match(address)):
        raise PostgresError(
            f"{name} must be a PostgreSQL URL (postgresql://user@host:port/database) or libpq's key=value pairs, "
            f"got {_outline(address)}; unset it to use the embedded server"
        )
    try:
        dsn = address if scheme is None else _libpq_url(address[scheme.end() :], of_sqlalchemy=scheme[1] is not None)
        found: dict[str, str] = parse_dsn(dsn)
    except (psycopg2.Error, ValueError) as error:
        reason = without_quotes(str(error)).removeprefix("invalid dsn: ")
        way_out = _WAY_OUT if scheme is not None else "write values in '…', with \\' and \\\\ in them"
        raise PostgresError(f"{name} is no address that libpq reads: {reason}; {way_out}") from None
    if not found.get("port", "-").strip(","):
        del found["port"]  # no host of several has one
    _check(found, address, name, url=scheme is not None)
    remember(found.get("password"))
    remember(found.get("sslpassword"))
    return found


_WAY_OUT = "write special characters of user and password as %XX (@ as %40, / as %2F, : as %3A, % as %25)"


def _libpq_url(rest: str, of_sqlalchemy: bool) -> str:
    """What follows the scheme, as libpq writes it: SQLAlchemy has a + for a space, and host=h1:1&host=h2:2."""
    path, mark, query = rest.partition("?")
    if mark and of_sqlalchemy:
        query = query.replace("+", "%20")
    pairs = [(key, value) for key, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)]
    hosts = [value for key, value in pairs if key == "host"]
    if len(hosts) > 1 or any(_HOST_AND_PORT.fullmatch(host) for host in hosts):
        split = [_HOST_AND_PORT.fullmatch(host) for host in hosts]
        names = [host if found is None else found[1] for host, found in zip(hosts, split, strict=True)]
        ports = ["" if found is None else found[2] for found in split]
        pairs = [(key, value) for key, value in pairs if key not in ("host", "port")]
        pairs += [("host", ",".join(names)), ("port", ",".join(ports))]
        query = _query(dict(pairs))
    return f"postgresql://{path}{mark}{query}"


def _check(found: Mapping[str, str], address: str, name: str, *, url: bool) -> None:
    """Raise PostgresError where host, port or database cannot be meant: a password was cut in the middle."""
    authority, _, path = address.partition("://")[2].partition("?")[0].partition("/")
    hosts, ports = found.get("host", "").split(","), found.get("port", "").split(",")
    if url and (authority.count("@") > 1 or "@" in path):
        raise PostgresError(f"{name} has an @ too many; {_WAY_OUT}")
    if not all(port.isascii() and (not port or (port.isdigit() and 0 < int(port[:9]) < 2**16)) for port in ports):
        way_out = f"; {_WAY_OUT}" if url else ""
        raise PostgresError(f"{name} has a port that is no number of 1 to 65535{way_out}")
    if len(ports) > 1 and len(ports) != len(hosts):
        raise PostgresError(f"{name} has {len(ports)} ports for {len(hosts)} hosts: give one for all, or one each")


def _rendered(given: Mapping[str, str]) -> str:
    """SQLAlchemy's URL. Several hosts and a socket's folder stand in the query, as neither fits before the path."""
    rest = dict(given)
    user, password, database = (rest.pop(key, None) for key in ("user", "password", "dbname"))
    userinfo = "" if user is None else quote(user, safe="")
    if password is not None:
        userinfo += f":{quote(password, safe='')}"
    place, hosts, port = "", rest.get("host", "").split(","), rest.get("port", "")
    if len(hosts) == 1 and re.fullmatch(r"[\w.:-]*", hosts[0], re.ASCII):
        host = rest.pop("host", "")
        place = (f"[{host}]" if ":" in host else host) + (f":{rest.pop('port')}" if port else "")
    elif len(hosts) > 1 and "," not in port and port:
        rest["port"] = ",".join([port] * len(hosts))  # one for all; SQLAlchemy asks for one each
    at = "@" if user is not None or password is not None else ""
    path = "" if database is None else f"/{quote(database, safe='')}"
    query = f"?{_query(rest)}" if rest else ""
    return f"postgresql+psycopg2://{userinfo}{at}{place}{path}{query}"


def _query(pairs: Mapping[str, str]) -> str:
    """With %20 for a space, which SQLAlchemy and libpq both read."""
    return "&".join(f"{key}={quote(value, safe='')}" for key, value in sorted(pairs.items()))


def _outline(address: str) -> str:
    """So much of an unknown address that it is recognised, and nothing that may be secret."""
    scheme, mark, _ = address.partition("://")
    if mark:
        return f"'{scheme[:20]}://…'" if re.fullmatch(r"[\w+.-]+", scheme) else "another kind of URL"
    return repr(address) if re.fullmatch(r"[\w.-]{1,60}", address) else f"{len(address)} characters"


def _given_password(given: Mapping[str, str]) -> str | None:
    """From the file HPO_DATABASE_PASSWORD_FILE (its last line break dropped), else PGPASSWORD.

    A service's own password goes before PGPASSWORD, as in libpq.
    """
    path = os.environ.get("HPO_DATABASE_PASSWORD_FILE")
    if not path:
        return None if "service" in given or "PGSERVICE" in os.environ else os.environ.get("PGPASSWORD")
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise PostgresError(f"HPO_DATABASE_PASSWORD_FILE {path} must be UTF-8") from None
    except OSError as error:
        raise PostgresError(f"HPO_DATABASE_PASSWORD_FILE {path} cannot be read: {error.strerror}") from None
