"""By which names a browser may ask for pages: a site that lets its own name lead here (DNS rebinding) finds nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus

from hpo.dashboard.origins import host_name, is_address, is_loopback_name
from hpo.service.problems import Problem


@dataclass(frozen=True)
class Hosts:
    """This machine itself; off loopback also its addresses and its own name; and what a setting adds."""

    allowed: tuple[str, ...] = ()  # names; *.example.org is any below it, * any at all
    reachable: bool = False  # whether the service listens off loopback

    def admits(self, header: str) -> bool:
        """Whether a Host header is one of them."""
        name = host_name(header)
        if is_loopback_name(header) or any(_fits(name, pattern.lower()) for pattern in self.allowed):
            return True
        return self.reachable and (is_address(name) or name in _own_names())

    def check(self, header: str) -> None:
        """Raise Problem (403) for another name."""
        if not self.admits(header):
            raise Problem(HTTPStatus.FORBIDDEN, refusal(header))


@cache
def _own_names() -> frozenset[str]:
    """This machine's name, short and whole: asked once, as a name server may take its time."""
    return frozenset((socket.gethostname().lower(), socket.getfqdn().lower()))


def refusal(header: str) -> str:
    """What to do for pages by that name."""
    name = host_name(header)[:200]
    return (
        f"pages are not served by the name {name!r}: start the service with --allowed-host {name}, or list it in "
        "HPO_SERVE_HOSTS"
    )


def names(text: str) -> Iterable[str]:
    """The names in a setting, between commas or spaces."""
    return text.replace(",", " ").split()


def _fits(name: str, pattern: str) -> bool:
    return pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
