"""How often an owner may write."""

from __future__ import annotations

from hpo.service.rate import MOST_OWNERS, Rate


def test_an_owner_has_so_many_calls_a_minute() -> None:
    now = 100.0
    rate = Rate(6, clock=lambda: now)
    assert [rate.wait_s("ada") for _ in range(8)] == [0] * 6 + [10, 10]
    assert rate.wait_s("bob") == 0
    now += 9
    assert rate.wait_s("ada") == 1
    now += 1
    assert [rate.wait_s("ada") for _ in range(2)] == [0, 10]
    now += 600
    assert [rate.wait_s("ada") for _ in range(7)] == [0] * 6 + [10]


def test_owners_are_forgotten_in_the_order_of_their_last_call() -> None:
    rate = Rate(1, clock=lambda: 0.0)
    for number in range(MOST_OWNERS):
        assert rate.wait_s(str(number)) == 0
    assert rate.wait_s("0") == 60
    assert rate.wait_s("one more") == 0
    assert [rate.wait_s("0"), rate.wait_s("1")] == [60, 0]
