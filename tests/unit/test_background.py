from __future__ import annotations

import logging
import threading

import pytest

from hpo.storage.background import BackgroundLoop


def test_a_loop_calls_its_function_until_it_is_stopped() -> None:
    calls: list[str] = []
    loop = BackgroundLoop(lambda: calls.append(threading.current_thread().name), 0.001, name="here", failure="no")
    with loop:
        assert loop.wait_for_rounds(3, 60)
    ended = len(calls)
    assert ended >= 3
    assert set(calls) == {"here"}
    assert not loop.wait_for_rounds(1, 0.05)
    assert len(calls) == ended


def test_a_loop_survives_errors_and_logs_the_expected_ones_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    errors = iter([OSError("away"), ValueError("a bug")])

    def fail() -> None:
        for error in errors:
            raise error

    with (
        caplog.at_level(logging.WARNING),
        BackgroundLoop(fail, 0.001, name="here", failure="it could not be done", expected=(OSError,)) as loop,
    ):
        assert loop.wait_for_rounds(3, 60)
    first, second = caplog.records
    assert (first.levelname, first.getMessage(), first.exc_info) == ("WARNING", "it could not be done: away", None)
    assert (second.levelname, second.getMessage()) == ("ERROR", "it could not be done")
    assert second.exc_info


def test_a_loop_that_was_never_started_can_be_stopped() -> None:
    BackgroundLoop(lambda: None, 1.0, name="here", failure="no").stop()
