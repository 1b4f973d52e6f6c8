"""Calls that end: a connection whose server takes everything and never answers is cut at the call's deadline.

libpq waits for an answer without limit. One thread of the process looks at the calls in progress and shuts the socket
of an overdue one, which ends the call as a lost connection.
"""

from __future__ import annotations

import math
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from hpo.storage.background import BackgroundLoop

LOOK_S = 0.25  # between two looks at the calls in progress
FROZEN_S = 5.0  # without a look: the process, or its machine, did not run


class Deadline:
    """Of the calls on one connection, one at a time."""

    def __init__(self, descriptor: int) -> None:
        """descriptor: the connection's socket, of which this keeps a copy, as its number is given again once closed."""
        self._descriptor = os.dup(descriptor)
        self.close = weakref.finalize(self, os.close, self._descriptor)  # to be called with the connection's own
        self._ends_at = math.inf
        self.passed = False  # and the connection was cut
        _watch(self)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cut the connection where the block takes longer."""
        self.end_after(seconds)
        try:
            yield
        finally:
            self._ends_at = math.inf

    def end_after(self, seconds: float) -> None:
        """Cut the connection once so much time is over."""
        self._ends_at = time.monotonic() + seconds

    def shorten(self, seconds: float) -> None:
        """The call in progress, if there is one, has no longer than this from now on."""
        if self._ends_at < math.inf:
            self._ends_at = min(self._ends_at, time.monotonic() + seconds)

    def look(self) -> None:
        """Cut the connection where its call is overdue."""
        if time.monotonic() > self._ends_at and not self.passed:
            self.passed = True
            with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as connected:
                connected.shutdown(socket.SHUT_RDWR)  # an error: it is closed already


@dataclass(frozen=True)
class Pause:
    """A time in which this process could not do its work."""

    seconds: float = 0.0
    ended_at: float = -math.inf  # by the monotonic clock

    @property
    def ended_ago_s(self) -> float:
        return time.monotonic() - self.ended_at


_ALL: weakref.WeakSet[Deadline] = weakref.WeakSet()
_loops: list[BackgroundLoop] = []  # the process's one, once there is a connection


def shorten_all(seconds: float) -> None:
    """No call in progress in this process takes longer than this from now on. From any thread."""
    for deadline in list(_ALL):
        deadline.shorten(seconds)


def _watch(deadline: Deadline) -> None:
    _ALL.add(deadline)
    if not _loops:
        _Looks.at = time.time()
        _loops.append(BackgroundLoop(_look, LOOK_S, name="hpo-deadlines", failure="a deadline could not be kept"))
        _loops[0].start()


class _Looks:
    """When the thread looked last, by the clock on the wall, which also goes while the machine sleeps."""

    at = 0.0
    frozen = Pause()


def last_freeze() -> Pause:
    """When this process did not run for a while: its laptop slept, its container was paused, it was stopped."""
    silent_s = time.time() - _Looks.at if _loops else 0.0
    if silent_s > FROZEN_S:
        _Looks.frozen = Pause(silent_s, time.monotonic())
    return _Looks.frozen


def _look() -> None:
    last_freeze()
    _Looks.at = time.time()
    for deadline in list(_ALL):
        deadline.look()


def _after_fork() -> None:
    """The parent's connections are not ours to cut, and its thread did not come along."""
    _ALL.clear()
    _loops.clear()


os.register_at_fork(after_in_child=_after_fork)
