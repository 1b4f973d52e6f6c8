"""What is asked together is computed together, each question gets its own answer, and there is an end to the queue."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hpo.service.batches import Batches
from hpo.service.problems import Problem

Compute = Callable[[Sequence[int]], Sequence[int | Exception]]


def run(scene: Callable[[Batches[int, int]], Coroutine[Any, Any, None]], compute: Compute, **options: Any) -> None:
    """Play a scene with batches that compute in two threads."""

    async def play() -> None:
        with ThreadPoolExecutor(2) as threads:
            await scene(Batches(compute, threads, **{"waiting": 1000, "together": 100} | options))

    asyncio.run(play())


def doubled(numbers: Sequence[int]) -> list[int | Exception]:
    return [ValueError(f"{number} is odd") if number % 2 else 2 * number for number in numbers]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("calls", [1, 3])
def test_every_question_gets_its_own_answer(quick: bool, calls: int) -> None:
    dice = random.Random(0)

    async def scene(batches: Batches[int, int]) -> None:
        async def client(number: int) -> None:
            for _ in range(20):
                for _ in range(dice.randrange(4)):
                    await asyncio.sleep(0)
                if number % 2:
                    with pytest.raises(ValueError, match=f"^{number} is odd$"):
                        await batches.ask(number)
                else:
                    assert await batches.ask(number) == 2 * number

        await asyncio.wait_for(asyncio.gather(*map(client, range(50))), 60)

    run(scene, doubled, quick=lambda _: quick, calls=calls, together=7)


def test_what_gathers_during_a_call_is_one_call() -> None:
    computed: list[list[int]] = []
    go_on = threading.Event()

    def compute(numbers: Sequence[int]) -> list[int | Exception]:
        computed.append(list(numbers))
        assert go_on.wait(60)
        return list(numbers)

    async def scene(batches: Batches[int, int]) -> None:
        first = batches.ask(0)
        while not computed:
            await asyncio.sleep(0)
        others = [batches.ask(number) for number in range(1, 6)]
        go_on.set()
        assert [await each for each in (first, *others)] == [0, 1, 2, 3, 4, 5]
        assert computed == [[0], [1, 2, 3], [4, 5]]

    run(scene, compute, together=3)


def test_a_full_queue_is_503_and_what_nobody_waits_for_gives_up_its_place() -> None:
    computed: list[int] = []
    go_on = threading.Event()

    def compute(numbers: Sequence[int]) -> list[int | Exception]:
        computed.extend(numbers)
        assert go_on.wait(60)
        return list(numbers)

    async def scene(batches: Batches[int, int]) -> None:
        first = batches.ask(0)
        while not computed:
            await asyncio.sleep(0)
        second, third = batches.ask(1), batches.ask(2)
        with pytest.raises(Problem, match="2 requests are waiting for predictions: ask again in a second") as full:
            batches.ask(3)
        assert (full.value.status, full.value.headers) == (503, {"Retry-After": "1"})
        second.cancel()
        fourth = batches.ask(4)
        go_on.set()
        assert [await each for each in (first, third, fourth)] == [0, 2, 4]
        assert computed == [0, 2, 4]

    run(scene, compute, waiting=2)


def test_an_error_of_a_call_is_each_ones_and_the_next_call_goes_on() -> None:
    def compute(numbers: Sequence[int]) -> list[int | Exception]:
        if 0 in numbers:
            raise ZeroDivisionError
        return list(numbers)

    async def scene(batches: Batches[int, int]) -> None:
        answers = await asyncio.gather(batches.ask(0), batches.ask(1), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ZeroDivisionError, ZeroDivisionError]
        assert await batches.ask(1) == 1

    run(scene, compute)
