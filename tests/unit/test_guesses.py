"""Wrong passwords: who has to wait, and for how long."""

from __future__ import annotations

from hpo.dashboard.guesses import FREE, FREE_OVERALL, LONGEST_PAUSE_S, MOST_CLIENTS, OVERALL_PER_S, Guesses


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_waits_longer_after_each_wrong_password() -> None:
    """An acceptance run: 200 wrong passwords were answered in 1.5 s."""
    clock = Clock()
    guesses = Guesses(clock)
    assert [guesses.wait_s("192.0.2.1", right=False) for _ in range(FREE)] == [0.0] * FREE
    pauses = []
    for _ in range(9):
        assert guesses.wait_s("192.0.2.1", right=False) == 0  # looked at, and wrong
        pauses.append(guesses.wait_s("192.0.2.1", right=True))  # not looked at, though right
        clock.now += pauses[-1]
    assert pauses == sorted(pauses)
    assert pauses[0] <= 2
    assert pauses[-1] == LONGEST_PAUSE_S
    assert guesses.wait_s("192.0.2.1", right=True) == 0


def test_an_address_is_forgiven_with_time() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    for _ in range(FREE + 1):
        guesses.wait_s("192.0.2.1", right=False)
    assert guesses.wait_s("192.0.2.1", right=False) > 0
    clock.now += 6 * 3600
    assert [guesses.wait_s("192.0.2.1", right=False) for _ in range(FREE)] == [0.0] * FREE


def test_the_guesses_of_one_address_are_no_other_one_s() -> None:
    guesses = Guesses(Clock())
    for _ in range(1000):
        guesses.wait_s("192.0.2.1", right=False)
    assert guesses.wait_s("192.0.2.2", right=True) == 0


def test_guesses_from_many_addresses_are_limited_together_and_memory_does_not_grow() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    looked_at = 0
    for number in range(3 * MOST_CLIENTS):
        clock.now += 0.01
        looked_at += guesses.wait_s(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", right=False) == 0
    assert looked_at <= FREE_OVERALL + OVERALL_PER_S * 0.01 * 3 * MOST_CLIENTS + 1
    assert len(guesses._clients) <= MOST_CLIENTS
    clock.now += 2 / OVERALL_PER_S
    assert guesses.wait_s("192.0.2.2", right=True) == 0


def test_the_addresses_that_one_ipv6_host_may_choose_are_one_client() -> None:
    guesses = Guesses(Clock())
    waits = [guesses.wait_s(f"2001:db8::{number:x}", right=False) for number in range(2 * FREE)]
    assert waits[-1] > 0
    assert guesses.wait_s("2001:db8:0:1::1", right=False) == 0
    assert guesses.wait_s("::ffff:192.0.2.1", right=False) == 0  # an IPv4 address is not in one network with all others
    assert guesses.wait_s("not an address", right=False) == 0
