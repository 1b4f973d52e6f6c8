"""Where a browser's request comes from: by which name it asks, and from a page of which site."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets, in small letters."""
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def is_address(name: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine itself: localhost, 127.x.x.x or [::1], with or without a port."""
    name = host_name(host)
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


def same_origin(fetch_site: str | None, origin: str | None, host: str | None) -> bool | None:
    """Whether a request comes from a page of this very site, or from no page; None where it does not say.

    By Sec-Fetch-Site, which browsers send over TLS and to loopback; else by Origin and Host.
    """
    if fetch_site:
        return fetch_site in ("same-origin", "none")
    if origin is None:
        return None
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False
