"""Sends the notices of the database: signed, at least once, and to public addresses unless a setting allows others.

The addresses are what studies' owners give, who may be strangers. So a name is resolved once and the connection goes
to one of the very addresses that were checked, redirects are not followed, and of an answer the status alone is read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import HpoError, legible
from hpo.storage.background import BackgroundLoop
from hpo.storage.connection import Connection
from hpo.storage.errors import PostgresError
from hpo.storage.masking import mask, remember
from hpo.storage.notices import Notice, Notices

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("hpo")

SEND_S = 10.0  # that an attempt may take; less than until the next one
LOOK_S = 3.0  # between two looks for what is due
AT_ONCE = 8  # attempts: one address that does not answer must not keep others waiting
LEAST_SECRET = 16  # characters: a signature lets one guess a short secret
FAULT_MOST = 300  # characters of a fault
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # whose last 32 bits are an IPv4 address

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotifyError(HpoError):
    """The settings for notices break a rule."""


class SendError(HpoError):
    """A notice did not arrive."""


@dataclass(frozen=True)
class Settings:
    """How this process sends notices."""

    secret: bytes | None  # that signs them; None: nothing is sent
    private: bool = False  # whether loopback, private and link-local addresses may be sent to

    @classmethod
    def of_environment(cls) -> Settings:
        """HPO_NOTIFY_SECRET, else the content of the file HPO_NOTIFY_SECRET_FILE; HPO_NOTIFY_PRIVATE.

        Raises NotifyError.
        """
        private = os.environ.get("HPO_NOTIFY_PRIVATE") or "0"
        if private not in ("0", "1"):
            raise NotifyError(
                f"HPO_NOTIFY_PRIVATE must be 1, to send notices to private addresses, or 0, got {private!r}"
            )
        secret = _secret()
        if secret is not None and len(secret) < LEAST_SECRET:
            raise NotifyError(
                f"HPO_NOTIFY_SECRET must have at least {LEAST_SECRET} characters, got {len(secret)}; "
                "`openssl rand -hex 32` makes one"
            )
        remember(secret)
        return cls(None if secret is None else secret.encode(), private == "1")


def _secret() -> str | None:
    if secret := os.environ.get("HPO_NOTIFY_SECRET"):
        return secret
    if not (file := os.environ.get("HPO_NOTIFY_SECRET_FILE")):
        return None
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotifyError(f"HPO_NOTIFY_SECRET_FILE {file} cannot be read: {error}") from None


class Notifier:
    """Sends what is due in a database. The connection may be shared."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._notices, self._settings = Notices(connection), settings
        self._warned = False  # that nothing is sent without a secret
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs addresses whole, and what is secret in them

    def send_due(self, study_id: int | None = None) -> int:
        """Make an attempt for each notice that is due, of one study or of any; how many there were.

        Without a secret they are left for another sender, and the first time the log says so. Raises PostgresError.
        """
        if self._settings.secret is None:
            self._warn(study_id)
            return 0
        count = 0
        while claimed := self._notices.claim(AT_ONCE, study_id):
            count += len(claimed)
            for notice, fault in zip(claimed, asyncio.run(self._sent(claimed)), strict=True):
                self._note(notice, fault)
        return count

    def _warn(self, study_id: int | None) -> None:
        if not self._warned and (count := self._notices.due(study_id)):
            self._warned = True
            log.warning(
                "%d notices wait to be sent: set HPO_NOTIFY_SECRET, which signs them, for `hpo serve` or a worker",
                count,
            )

    async def _sent(self, notices: list[Notice]) -> list[str | None]:
        """For each notice why it did not arrive, None where it did."""
        return list(await asyncio.gather(*map(self._fault, notices)))

    async def _fault(self, notice: Notice) -> str | None:
        assert self._settings.secret is not None
        try:
            async with asyncio.timeout(SEND_S):
                await _send(notice, self._settings.secret, private=self._settings.private)
        except TimeoutError:
            return f"no answer within {SEND_S:g} s"
        except SendError as error:
            return str(error)
        return None

    def _note(self, notice: Notice, fault: str | None) -> None:
        about = f"{notice.event} of study {notice.study_name}"
        if fault is None:
            self._notices.delivered(notice)
            log.info("notice %d, %s: delivered", notice.notice, about)
            return
        self._notices.failed(notice, legible(mask(fault), FAULT_MOST))
        then = "given up" if notice.next_at is None else "to be sent again"
        log.warning("notice %d, %s: attempt %d failed, %s: %s", notice.notice, about, notice.attempts, then, fault)


@contextmanager
def sending(connection: Connection, settings: Settings) -> Iterator[None]:
    """Send what is due while the block runs. Its end waits for no attempt: one that was not noted is made again."""
    notifier = Notifier(connection, settings)
    loop = BackgroundLoop(
        notifier.send_due,
        LOOK_S,
        name="hpo-notices",
        failure="notices wait for the database",
        expected=(PostgresError,),
    )
    loop.start()
    try:
        yield
    finally:
        loop.stop(timeout_s=0.0)


def send_last(connection: Connection, study_id: int) -> None:
    """One attempt for each notice of a study that is due, by a process that ends; others go on with what fails."""
    try:
        Notifier(connection, Settings.of_environment()).send_due(study_id)
    except (PostgresError, NotifyError) as error:
        log.warning("notices of the study were not sent: %s", mask(str(error)))


def signature(secret: bytes, seconds: int, body: bytes) -> str:
    """The header X-Hpo-Signature: HMAC-SHA256 (RFC 2104) of the time, a dot and the body. seconds: since 1970."""
    digest = hmac.new(secret, f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={seconds},v1={digest}"


async def _send(notice: Notice, secret: bytes, *, private: bool) -> None:
    """Raises SendError where it does not arrive."""
    import httpx

    body = json.dumps(notice.body).encode()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"hpo/{version('hpo')}",
        "X-Hpo-Delivery": str(notice.notice),
        "X-Hpo-Event": notice.event,
        "X-Hpo-Signature": signature(secret, int(time.time()), body),
    }
    try:
        url = httpx.URL(notice.url)
        addresses = await _addresses(url, private)
        # Proxies of the environment would resolve the name by themselves.
        async with httpx.AsyncClient(trust_env=False, verify=httpx.create_ssl_context(), timeout=SEND_S) as client:
            status = await _post(client, url, addresses, headers, body)
    except (httpx.InvalidURL, httpx.HTTPError, OSError, UnicodeError) as error:
        raise SendError(f"{type(error).__name__}: {error}") from None
    if not 200 <= status < 300:
        follow = "; redirects are not followed" if 300 <= status < 400 else ""
        raise SendError(f"the answer was {status}{follow}")


async def _post(
    client: httpx.AsyncClient, url: httpx.URL, addresses: list[IpAddress], headers: dict[str, str], body: bytes
) -> int:
    """The status of the answer of the first address that takes a connection, with the name in Host, and for TLS in SNI
    and in the check of the certificate."""
    import httpx

    for address in addresses:
        request = client.build_request(
            "POST",
            url.copy_with(host=str(address)),
            content=body,
            headers={**headers, "Host": url.netloc.decode()},
            extensions={"sni_hostname": url.host},
        )
        try:
            answer = await client.send(request, stream=True)
        except httpx.ConnectError:
            if address == addresses[-1]:
                raise
        else:
            await answer.aclose()
            return answer.status_code
    raise SendError(f"{url.host} has no address")


async def _addresses(url: httpx.URL, private: bool) -> list[IpAddress]:
    """Those of the URL's host that may be sent to. Raises SendError where there are none, and OSError."""
    port = url.port or (443 if url.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(ipaddress.ip_address(each[4][0]) for each in found))
    allowed = [address for address in addresses if private or is_public(address)]
    if not allowed:
        raise SendError(
            f"{url.host} is not a public address, but loopback, private, link-local or reserved: name another url, or "
            "set HPO_NOTIFY_PRIVATE=1 where notices are sent"
        )
    return allowed


def is_public(address: IpAddress) -> bool:
    """Whether an address is one of the open Internet; one that holds an IPv4 address goes by that."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_link_local)
