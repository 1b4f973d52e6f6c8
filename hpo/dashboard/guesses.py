"""Wrong passwords: nobody guesses for ever."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

FREE = 20  # wrong passwords of one address before it has to pause
FORGET_S = 600.0  # seconds in which one wrong password of an address is forgotten
LONGEST_PAUSE_S = 64.0
FREE_OVERALL = 100  # wrong passwords of all addresses together before new ones have to wait
OVERALL_PER_S = 2.0  # wrong passwords of all addresses that are forgotten in a second
MOST_COUNTED = FREE + 10.0  # wrong passwords of one address, so that it is forgiven in some hours
MOST_CLIENTS = 4096  # addresses that are remembered


@dataclass
class _Wrong:
    """A count of wrong passwords that falls with time."""

    count: float = 0.0
    at: float = 0.0
    until: float = 0.0  # end of the pause

    def left(self, now: float, per_s: float) -> float:
        return max(0.0, self.count - (now - self.at) * per_s)

    def add(self, now: float, per_s: float) -> float:
        self.count, self.at = self.left(now, per_s) + 1, now
        return self.count


class Guesses:
    """Counts the wrong passwords of each client address and of all; says how long one has to wait. Never sleeps.

    After FREE wrong passwords each further one doubles the pause of its address. In a pause no password of the address
    is looked at, not even the right one: an answer would be a guess. The address is the connection's own, as anybody
    can write a header. Addresses are forgotten in the order of their last guess; what they did still counts overall.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: OrderedDict[str, _Wrong] = OrderedDict()
        self._overall = _Wrong()
        self._lock = threading.Lock()

    def wait_s(self, address: str, *, right: bool) -> float:
        """Note a password from that address. Seconds to wait where it may not be looked at, else 0."""
        now, client = self._clock(), _client(address)
        with self._lock:
            known = self._clients.get(client)
            if known is not None and now < known.until:
                return known.until - now
            if self._overall.left(now, OVERALL_PER_S) >= FREE_OVERALL:
                return 1 / OVERALL_PER_S
            if not right:
                self._note(client, now)
            return 0.0

    def _note(self, client: str, now: float) -> None:
        self._overall.add(now, OVERALL_PER_S)
        wrong = self._clients.setdefault(client, _Wrong())
        self._clients.move_to_end(client)
        wrong.count = min(wrong.add(now, 1 / FORGET_S), MOST_COUNTED)
        if wrong.count > FREE:
            wrong.until = now + min(2.0 ** (wrong.count - FREE), LONGEST_PAUSE_S)
        if len(self._clients) > MOST_CLIENTS:
            self._clients.popitem(last=False)


def _client(address: str) -> str:
    """What stands for a client: an IPv4 address, or the /64 network that an IPv6 host chooses its addresses from."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""  # a socket of another kind: one client
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
