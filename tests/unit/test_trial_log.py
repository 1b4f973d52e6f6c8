"""What is kept of a trial's log for its page."""

from __future__ import annotations

import csv
import logging
import threading

from hpo.trial import log as trial_log


def rows() -> list[tuple[str, str]]:
    """Level and message of what is kept, in order."""
    table = list(csv.reader(trial_log.written().decode().splitlines(keepends=True)))
    assert table[0] == ["time", "level", "message"]
    return [(level, message) for _, level, message in table[1:]]


def test_a_trial_keeps_what_was_said_of_it_and_not_of_the_one_before() -> None:
    trial_log.begin()
    logging.getLogger("hpo").warning("the first trial")
    trial_log.begin()
    logging.getLogger("hpo").warning('it said "no", %d times', 3)
    trial_log.note("epoch 1\nof two")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("hpo").exception("trial 7 failed")
    *before, (level, failure) = rows()
    assert before == [("WARNING", 'it said "no", 3 times'), ("DEBUG", "epoch 1\nof two")]
    assert level == "ERROR"
    assert failure.startswith("trial 7 failed\nTraceback (most recent call last):")
    assert failure.endswith("ValueError: broken")


def test_slots_in_threads_keep_their_own() -> None:
    def other() -> None:
        logging.getLogger("hpo").warning("of no trial")
        trial_log.begin()
        logging.getLogger("hpo").warning("of the other trial")
        found.extend(rows())

    found: list[tuple[str, str]] = []
    trial_log.begin()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [("WARNING", "of the other trial")]
    assert rows() == []


def test_the_last_rows_are_kept_and_no_password() -> None:
    trial_log.begin()
    for number in range(trial_log.ROWS + 5):
        trial_log.note(f"epoch {number}")
    logging.getLogger("hpo").warning("postgresql://hpo:secret@host/db is away")
    assert len(rows()) == trial_log.ROWS
    assert rows()[0] == ("DEBUG", "epoch 6")
    assert "secret" not in rows()[-1][1]
