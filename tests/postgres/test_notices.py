"""Notices: written with what they tell of, sent at least once, by one sender at a time, until they arrive."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo import notify
from hpo.notify import Notifier, Settings, sending
from hpo.storage.connection import Connection
from hpo.storage.leases import Leases
from hpo.storage.notices import ATTEMPTS, FIRST_S, LONGEST_S, Notices
from hpo.storage.registry import Registry
from hpo.storage.terms import Notify, Terms
from hpo.storage.trials import TrialStorage
from hpo.study.config import EVENTS
from tests.postgres.simulation import Clock
from tests.receiver import SECRET, Receiver, receiving

SIGNED = Settings(SECRET.encode(), private=True)
CONFIG = {"config": {"study": {"name": "waves", "metric": "auroc"}}}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def notices(storage: TrialStorage) -> Notices:
    return Notices(storage.connection)


@pytest.fixture
def clock(storage: TrialStorage, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(storage.connection, monkeypatch)


@pytest.fixture
def study(storage: TrialStorage, leases: Leases, receiver: Receiver) -> int:
    """Of one trial, which tells the receiver all."""
    made = storage.create_new_study([StudyDirection.MAXIMIZE], "waves")
    leases.open_study(made, Terms(1), CONFIG, "ada", Notify(receiver.url, EVENTS))
    return made


def finish(leases: Leases, study: int, version: int | None = None) -> None:
    """Let its trial end, and the study with it."""
    lease = leases.acquire(study, "tester")
    assert lease is not None
    leases.storage.set_trial_user_attr(lease.trial_id, "seed", 1)
    leases.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.75])
    assert leases.acquire_promotion(study, "tester")
    leases.finish_promotion(study, "tester", version)


def promote(storage: TrialStorage, study: int, trial: int = 0) -> int:
    scores = {"metric": "auroc", "value": 0.75, "test": {"auroc": 0.5}, "validation": {"auroc": 0.75}}
    registry = Registry(storage.connection)
    artifacts = {"config.json": f"model-{trial}"}
    return registry.promote(
        "waves", study_id=study, study_name="waves", trial_number=trial, scores=scores, config={}, artifacts=artifacts
    ).version


def events(notices: Notices) -> list[str]:
    """What was written, the oldest first."""
    return [each.event for each in notices.last()][::-1]


class TestWriting:
    def test_an_end_with_a_model(self, storage: TrialStorage, leases: Leases, study: int, notices: Notices) -> None:
        finish(leases, study, promote(storage, study))
        assert events(notices) == ["model.promotion", "study.end"]
        end = notices.last()[0]
        assert (end.state, end.attempts, end.study_name) == ("waiting", 0, "waves")
        about = {key: end.body[key] for key in ("event", "study", "owner", "status", "version")}
        assert about == {"event": "study.end", "study": "waves", "owner": "ada", "status": "finished", "version": 1}

    def test_an_end_without_one_is_a_failure_too(self, leases: Leases, study: int, notices: Notices) -> None:
        finish(leases, study)
        assert events(notices) == ["study.end", "study.failure"]
        assert notices.last()[0].body["reason"] == "it ended without a model"

    def test_a_stop_is_an_end_each_time(self, leases: Leases, study: int, notices: Notices) -> None:
        for _ in range(2):
            leases.stop(study)
            leases.stop(study)
            leases.reopen(study)
        assert events(notices) == ["study.end", "study.end"]

    def test_a_version_is_told_of_once(self, storage: TrialStorage, study: int, notices: Notices) -> None:
        for _ in range(2):
            promote(storage, study)
        assert events(notices) == ["model.promotion"]
        told = {"name": "waves", "version": 1, "trial": 0, "metric": "auroc", "value": 0.75, "test": {"auroc": 0.5}}
        assert notices.last()[0].body["model"] == told

    def test_a_failed_promotion_is_told_of_once_a_reason(self, study: int, notices: Notices) -> None:
        for reason in ("a", "a", "b", "a"):
            notices.note_failure(study, reason)
        assert [each.body["reason"] for each in notices.last()] == ["a", "b", "a"]

    @pytest.mark.parametrize("wanted", [(), ("end",), ("failure",), ("promotion",)])
    def test_only_what_is_wanted_is_told(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices, wanted: tuple[str, ...]
    ) -> None:
        leases.set_notify(study, Notify("https://example.org", wanted))
        promote(storage, study)
        finish(leases, study)
        assert {each.split(".")[1] for each in events(notices)} == set(wanted)

    def test_a_study_without_an_address_tells_nobody(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices
    ) -> None:
        leases.set_notify(study, Notify(None, EVENTS))
        promote(storage, study)
        notices.note_failure(study, "a")
        finish(leases, study)
        assert events(notices) == []

    def test_what_is_rolled_back_is_not_told(self, study: int, notices: Notices, database_url: str) -> None:
        connection = psycopg2.connect(database_url.replace("+psycopg2", ""))
        connection.cursor().execute("UPDATE hpo.terms SET status = 'stopped'")
        connection.rollback()
        connection.close()
        assert events(notices) == []


class TestSending:
    def test_is_signed_and_says_what_happened(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices, receiver: Receiver
    ) -> None:
        finish(leases, study, promote(storage, study))
        assert Notifier(storage.connection, SIGNED).send_due() == 2
        promotion, end = sorted(receiver.requests, key=lambda each: int(each.headers["X-Hpo-Delivery"]))
        assert promotion.content["model"]["version"] == 1
        assert (end.path, end.headers["Host"]) == ("/hook?key=1", f"127.0.0.1:{receiver.port}")
        assert end.content["when"] > promotion.content["when"]
        assert {key: end.content[key] for key in ("status", "trials", "budget", "best", "metric", "version")} == {
            "status": "finished",
            "trials": {"complete": 1, "pruned": 0, "failed": 0, "running": 0, "waiting": 0},
            "budget": 1,
            "best": {"number": 0, "value": 0.75},
            "metric": "auroc",
            "version": 1,
        }
        assert [each.state for each in notices.last()] == ["delivered", "delivered"]
        assert Notifier(storage.connection, SIGNED).send_due() == 0

    def test_is_repeated_with_the_same_words_until_it_arrives(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices, receiver: Receiver, clock: Clock
    ) -> None:
        leases.stop(study)
        receiver.answers = [500, 302, 404]
        receiver.location = receiver.url
        notifier = Notifier(storage.connection, SIGNED)
        faults = []
        for _ in range(4):
            assert notifier.send_due() == 1
            faults.append(notices.last()[0].fault)
            assert notifier.send_due() == 0  # not due yet
            leases.reopen(study)  # the study goes on: what happened stays what it was
            clock.advance(LONGEST_S)
        answers = ["500", "302; redirects are not followed", "404"]
        assert faults == [*(f"the answer was {each}" for each in answers), None]
        assert len({each.body for each in receiver.requests}) == 1
        assert {each.headers["X-Hpo-Delivery"] for each in receiver.requests} == {str(notices.last()[0].notice)}
        assert notices.last()[0].state == "delivered"

    def test_waits_twice_as_long_each_time_and_gives_up_after_a_day(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices, receiver: Receiver, clock: Clock
    ) -> None:
        leases.stop(study)
        receiver.answers = [503] * ATTEMPTS
        notifier, waited_s = Notifier(storage.connection, SIGNED), 0.0
        for attempt in range(ATTEMPTS - 1):
            assert notifier.send_due() == 1
            (notice,) = notices.last()
            assert notice.next_at is not None
            now = storage.connection.execute("SELECT hpo.clock()")[0][0]
            pause_s = (notice.next_at - now).total_seconds()
            expected_s = min(LONGEST_S, FIRST_S * 2**attempt)
            assert expected_s <= pause_s <= 1.25 * expected_s
            clock.advance(pause_s)
            waited_s += pause_s
        assert notifier.send_due() == 1
        (notice,) = notices.last()
        assert (notice.state, notice.attempts, notice.fault) == ("given up", ATTEMPTS, "the answer was 503")
        assert 20 * 3600 < waited_s < 30 * 3600
        clock.advance(10 * LONGEST_S)
        assert notifier.send_due() == 0

    def test_of_two_senders_at_once_one_sends(
        self, leases: Leases, study: int, notices: Notices, receiver: Receiver, database_url: str
    ) -> None:
        for _ in range(20):
            leases.stop(study)
            leases.reopen(study)
        senders = [Notifier(Connection(database_url), SIGNED) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            counts = list(pool.map(lambda sender: sender.send_due(), senders))
        assert sum(counts) == 20
        assert len({each.headers["X-Hpo-Delivery"] for each in receiver.requests}) == len(receiver.requests) == 20

    def test_one_address_that_does_not_answer_keeps_no_other_waiting(
        self,
        storage: TrialStorage,
        leases: Leases,
        study: int,
        notices: Notices,
        receiver: Receiver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(notify, "SEND_S", 1.0)
        with receiving() as silent:
            silent.open.clear()
            for url in (silent.url, receiver.url):
                leases.set_notify(study, Notify(url, EVENTS))
                leases.stop(study)
                leases.reopen(study)
            assert Notifier(storage.connection, SIGNED).send_due() == 2
            heard, unheard = notices.last()
        assert (heard.state, unheard.state, unheard.fault) == ("delivered", "waiting", "no answer within 1 s")

    def test_without_a_secret_nothing_is_sent_and_the_log_says_so_once(
        self,
        storage: TrialStorage,
        leases: Leases,
        study: int,
        notices: Notices,
        receiver: Receiver,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        notifier = Notifier(storage.connection, Settings(None, private=True))
        assert notifier.send_due() == 0
        leases.stop(study)
        for _ in range(2):
            assert notifier.send_due() == 0
        assert receiver.requests == []
        (told,) = caplog.messages
        assert told.startswith("1 notices wait to be sent: set HPO_NOTIFY_SECRET")
        assert notices.last()[0].attempts == 0

    def test_of_a_study_that_was_deleted_goes_on(
        self, storage: TrialStorage, leases: Leases, study: int, receiver: Receiver
    ) -> None:
        leases.stop(study)
        storage.delete_study(study)
        assert Notifier(storage.connection, SIGNED).send_due(study) == 1
        assert receiver.requests[0].content["trials"] == {}

    def test_a_loop_sends_what_comes(
        self, leases: Leases, study: int, receiver: Receiver, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(notify, "LOOK_S", 0.05)
        with sending(Connection(database_url), SIGNED):
            leases.stop(study)
            assert receiver.wait_for(1)[0].content["status"] == "stopped"

    def test_old_ones_are_forgotten(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices, clock: Clock, receiver: Receiver
    ) -> None:
        notifier = Notifier(storage.connection, SIGNED)
        for _ in range(2):
            leases.stop(study)
            leases.reopen(study)
            assert notifier.send_due() == 1
            assert len(notices.last()) == 1
            clock.advance(31 * 86400)


class TestAddresses:
    """Of whom a submitter may be a stranger."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "127.1"])
    def test_that_are_private_get_nothing(
        self, storage: TrialStorage, leases: Leases, study: int, notices: Notices, receiver: Receiver, host: str
    ) -> None:
        fault = attempt(storage, leases, study, f"http://{host}:{receiver.port}/", Settings(SECRET.encode()))
        assert "is not a public address, but loopback, private, link-local or reserved" in str(fault)
        assert receiver.requests == []

    def test_are_connected_to_as_they_were_checked(
        self,
        storage: TrialStorage,
        leases: Leases,
        study: int,
        receiver: Receiver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A name that means another address when it is looked up again is not looked up again."""
        asked = []
        real = socket.getaddrinfo

        def rebinding(host: Any, *given: Any, **more: Any) -> Any:
            asked.append(host)
            if host == "rebinding.example":
                return real("127.0.0.1" if asked.count(host) == 1 else "127.0.0.2", *given, **more)
            return real(host, *given, **more)

        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        monkeypatch.setattr(notify, "is_public", lambda address: str(address) == "127.0.0.1")
        url = f"http://rebinding.example:{receiver.port}/"
        assert attempt(storage, leases, study, url, Settings(SECRET.encode())) is None
        assert receiver.requests[0].headers["Host"] == f"rebinding.example:{receiver.port}"
        assert asked.count("rebinding.example") == 1

    def test_that_are_not_there_are_a_fault(self, storage: TrialStorage, leases: Leases, study: int) -> None:
        with socket.socket() as bound:  # and not listening
            bound.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{bound.getsockname()[1]}/secret"
            fault = attempt(storage, leases, study, url, SIGNED)
        assert fault is not None
        assert fault.startswith("ConnectError: ")
        assert "secret" not in fault
        fault = attempt(storage, leases, study, "http://name.invalid/", SIGNED)
        assert str(fault).startswith("gaierror: ")

    def test_with_tls_must_show_a_certificate_that_is_trusted(
        self, storage: TrialStorage, leases: Leases, study: int, receiver: Receiver
    ) -> None:
        url = receiver.url.replace("http://", "https://")
        assert "SSL" in str(attempt(storage, leases, study, url, SIGNED))
        assert receiver.requests == []


def attempt(storage: TrialStorage, leases: Leases, study: int, url: str, settings: Settings) -> str | None:
    """The fault of one attempt to tell that address of a stop."""
    leases.set_notify(study, Notify(url, EVENTS))
    leases.stop(study)
    leases.reopen(study)
    assert Notifier(storage.connection, settings).send_due() == 1
    return Notices(storage.connection).last()[0].fault
