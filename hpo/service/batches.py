"""Requests that arrive together, computed by one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from http import HTTPStatus
from typing import Generic, TypeVar

from hpo.service.problems import Problem

Q = TypeVar("Q")
A = TypeVar("A")


class Batches(Generic[Q, A]):
    """One call computes all that was asked for since the one before it began.

    Nothing is waited for: what comes alone is computed at once, and while that lasts the next questions gather. So each
    call begins after its questions were asked. Used by the event loop's thread alone.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Q]], Sequence[A | Exception]],
        threads: Executor,
        *,
        waiting: int,
        together: int,
        calls: int = 1,
        quick: Callable[[Sequence[Q]], bool] = lambda _: False,
    ) -> None:
        """compute: the answer or the error of each question, in their order; what it raises is each one's error.

        waiting: questions that no call has taken yet, at most. together: those of one call. calls: at once. quick:
        whether the call is so short that the event loop's thread makes it: two threads that take the interpreter from
        each other at every operation of torch's answer a third fewer requests.
        """
        self._compute, self._threads, self._quick = compute, threads, quick
        self._most, self._together, self._calls = waiting, together, calls
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._running: set[asyncio.Task[None] | None] = set()

    def ask(self, question: Q) -> asyncio.Future[A]:
        """The answer to come; cancelled before its call begins it is not computed. Raises Problem (503) when full."""
        self._check_room()
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if len(self._running) < self._calls:
            self._running.add(asyncio.create_task(self._run()))
        return answer

    def _check_room(self) -> None:
        """Raise Problem (503) where as many wait as may."""
        if len(self._waiting) < self._most:
            return
        self._waiting = [each for each in self._waiting if not each[1].cancelled()]
        if len(self._waiting) >= self._most:
            reason = (
                f"{self._most} requests are waiting for predictions: ask again in a second, or let more servers run"
            )
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, reason, {"Retry-After": "1"})

    @property
    def waiting(self) -> int:
        """Questions that somebody waits for and no call has taken yet."""
        return sum(not answer.cancelled() for _, answer in self._waiting)

    async def _run(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[: self._together], self._waiting[self._together :]
                asked = [(question, answer) for question, answer in taken if not answer.cancelled()]
                if asked:
                    await self._answer([question for question, _ in asked], [answer for _, answer in asked])
        finally:  # here, not in a callback: what is asked before that ran would wait for ever
            self._running.discard(asyncio.current_task())

    async def _answer(self, questions: list[Q], answers: list[asyncio.Future[A]]) -> None:
        found: Sequence[A | Exception]
        try:
            if self._quick(questions):
                found = self._compute(questions)
            else:
                found = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, questions)
        except Exception as error:
            found = [error] * len(answers)
        for answer, each in zip(answers, found, strict=True):
            if answer.cancelled():
                continue
            if isinstance(each, Exception):
                answer.set_exception(each)
            else:
                answer.set_result(each)
