"""Tokens, the audit, and what a repeated submission means, on a real Postgres."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest
from optuna.study import StudyDirection

from hpo.storage.access import ROLES, TOKEN, Access, AccessError, Asked, SubmissionConflict
from hpo.storage.connection import Connection
from hpo.storage.leases import Leases
from hpo.storage.masking import mask
from hpo.storage.registry import Registry
from hpo.storage.sessions import LIFETIME_S, Sessions
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage
from tests.postgres.test_registry import promote


@pytest.fixture
def access(database_url: str) -> Access:
    return Access(database_url)


class TestAdmissions:
    def test_say_what_holder_and_registry_say_of_each_request(self, access: Access, database_url: str) -> None:
        registry = Registry(database_url)
        made = [promote(registry, "power", trial) for trial in (1, 2, 3)]
        registry.set_alias("power", "production", 2)
        token, text = access.create("read", "ada")
        revoked, gone = access.create("admin", "ada")
        access.revoke(revoked.token_id)
        wanted: dict[str, int | None] = {"1": 1, "2": 2, "latest": 3, "production": 2}
        unknown = ("01", "0", "4", "-1", "1.0", "99999999999", "1\0", "", "\ud800", "é", "'; --", "%s")
        wanted |= dict.fromkeys(unknown)
        asked = [Asked(text, "power", each) for each in wanted]
        found = access.admissions(asked)
        assert [each.version for each in found] == list(wanted.values())
        assert {each.token for each in found} == {token}
        for each in found:
            assert each.made_at == (each.version and made[each.version - 1].created_at)
        others = [Asked(each, "power", "1") for each in (gone, "", f"{text}x", "hpo_" + 12 * "0" + text[16:])]
        assert [(each.token, each.version) for each in access.admissions(others)] == [(None, 1)] * 4
        elsewhere = access.admissions([Asked(text, "nobody", "1"), Asked(text, "po\0wer", "1")])
        assert [(each.token, each.version) for each in elsewhere] == [(token, None)] * 2

    def test_are_one_round_trip(self, database_url: str) -> None:
        connection = Connection(database_url)
        access = Access(connection)
        _, text = access.create("read", "ada")
        before = connection.trips
        assert len(access.admissions([Asked(text, "power", "latest")] * 50)) == 50
        assert connection.trips == before + 1


class TestTokens:
    def test_open_the_door_for_their_holder(self, access: Access) -> None:
        token, text = access.create("submit", "ada@example.org")
        assert (token.role, token.owner, token.expires_at, token.active) == ("submit", "ada@example.org", None, True)
        assert access.holder(text) == token
        assert access.tokens() == [token]

    def test_nothing_else_does(self, access: Access) -> None:
        token, text = access.create("admin", "ada")
        _, other = access.create("read", "bob")
        swapped = f"hpo_{token.token_id}_{other.split('_', 2)[2]}"
        unknown = f"hpo_{'0' * 12}_{text.split('_', 2)[2]}"
        for wrong in ("", "hpo", text[:-1], text + "a", text.upper(), f" {text}", swapped, unknown, "é" * 60, "\0"):
            assert access.holder(wrong) is None

    def test_roles_include_those_below(self, access: Access) -> None:
        may = {role: [wanted for wanted in ROLES if access.create(role, "ada")[0].may(wanted)] for role in ROLES}
        assert may == {"read": ["read"], "submit": ["read", "submit"], "admin": ["read", "submit", "admin"]}

    def test_expire(self, access: Access) -> None:
        token, text = access.create("read", "ada", lifetime_s=0.05)
        assert token.expires_at is not None
        time.sleep(0.1)
        assert access.holder(text) is None
        assert not access.tokens()[0].active

    def test_are_revoked_for_good(self, access: Access) -> None:
        token, text = access.create("read", "ada")
        revoked = access.revoke(token.token_id)
        assert revoked.revoked_at is not None
        assert access.holder(text) is None
        assert access.revoke(token.token_id) == revoked
        with pytest.raises(AccessError, match=f"no token 'x'; known: {token.token_id}"):
            access.revoke("x")

    def test_are_refused_with_the_rule(self, access: Access) -> None:
        with pytest.raises(AccessError, match="a role is one of read, submit, admin, got 'root'"):
            access.create("root", "ada")
        for owner in ("", "-ada", "a b", "a\n", "é", "a" * 101):
            with pytest.raises(AccessError, match="an owner is 1 to 100 of"):
                access.create("read", owner)
        with pytest.raises(AccessError, match="expires after some time, got -1 s"):
            access.create("read", "ada", -1)

    def test_secrets_are_nowhere_in_the_database(self, access: Access, database_url: str) -> None:
        _, text = access.create("read", "ada")
        secret = text.split("_", 2)[2]
        connection = psycopg2.connect(database_url.replace("+psycopg2", ""))
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT t::text FROM hpo.tokens t")
            (row,) = cursor.fetchall()
        connection.close()
        assert secret not in row[0]
        assert secret.encode().hex() not in row[0]

    def test_are_masked_wherever_they_appear(self, access: Access) -> None:
        _, text = access.create("read", "ada")
        assert TOKEN.fullmatch(text)
        for line in (f"Authorization: Bearer {text}", f"GET /?token={text}&a=1", f"'{text}'", f"x{text}"):
            masked = mask(line)
            assert text.split("_", 2)[2] not in masked
            assert re.search(r"hpo_[0-9a-f]{12}_\*\*\*|\*\*\*", masked)


class TestAudit:
    def test_keeps_who_did_what_the_newest_first(self, access: Access) -> None:
        ada, bob = access.create("submit", "ada")[0], access.create("admin", "bob")[0]
        access.note(ada, "study.submit", "waves", {"trials": 6})
        access.note(bob, "study.stop", "waves")
        access.note(bob, "study.delete", "tides")
        found = [(a.owner, a.token_id, a.action, a.subject, a.detail) for a in access.actions("waves")]
        assert found == [
            ("bob", bob.token_id, "study.stop", "waves", {}),
            ("ada", ada.token_id, "study.submit", "waves", {"trials": 6}),
        ]
        assert [action.subject for action in access.actions(most=1)] == ["tides"]


class TestSubmissions:
    def test_a_key_means_one_submission(self, access: Access) -> None:
        for _ in range(2):
            access.claim("ada", "key", "waves", "digest")
        access.claim("bob", "key", "tides", "other")
        with pytest.raises(SubmissionConflict, match="'key' was used for another submission, of the study 'waves'"):
            access.claim("ada", "key", "waves", "changed")

    def test_of_many_at_once_one_is_the_first(self, database_url: str, access: Access) -> None:
        def claim(digest: str) -> bool:
            try:
                Access(database_url).claim("ada", "key", "waves", digest)
            except SubmissionConflict:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(claim, map(str, range(8)))) == 1

    def test_a_study_belongs_to_who_submitted_it_first(
        self, access: Access, storage: TrialStorage, leases: Leases
    ) -> None:
        study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "waves")
        assert access.owner_of(study_id) is None
        for owner in ("ada", "bob"):
            assert leases.open_study(study_id, Terms(3), {}, owner).owner == "ada"
        assert access.owner_of(study_id) == leases.snapshot(study_id).owner == "ada"


class TestSessions:
    @pytest.fixture
    def sessions(self, database_url: str) -> Sessions:
        return Sessions(Connection(database_url))

    def test_a_cookie_is_its_token_until_it_ends(self, access: Access, sessions: Sessions) -> None:
        token, _ = access.create("submit", "ada")
        cookie, lasts_s = sessions.begin(token)
        other, _ = sessions.begin(token)
        assert lasts_s == pytest.approx(LIFETIME_S, abs=5)
        assert sessions.holder(cookie) == sessions.holder(other) == token
        for wrong in ("", cookie[:-1], f"{cookie}a", "é" * 43, "\0", "\ud800"):
            assert sessions.holder(wrong) is None
        sessions.end(cookie)
        sessions.end(cookie)
        assert sessions.holder(cookie) is None
        assert sessions.holder(other) == token

    def test_it_ends_with_its_token(self, access: Access, sessions: Sessions) -> None:
        token, _ = access.create("submit", "ada", lifetime_s=3600)
        cookie, lasts_s = sessions.begin(token)
        assert 3590 < lasts_s <= 3600
        access.revoke(token.token_id)
        assert sessions.holder(cookie) is None
        with pytest.raises(AccessError, match="has expired or was revoked"):
            sessions.begin(token)

    def test_it_ends_after_its_time_and_is_forgotten(
        self, access: Access, sessions: Sessions, database_url: str
    ) -> None:
        token, _ = access.create("read", "ada")
        cookie, _ = sessions.begin(token, lifetime_s=0)
        assert sessions.holder(cookie) is None
        sessions.begin(token)
        assert Connection(database_url).execute("SELECT count(*) FROM hpo.sessions") == [(1,)]

    def test_the_database_has_no_cookie(self, access: Access, sessions: Sessions, database_url: str) -> None:
        cookie, _ = sessions.begin(access.create("admin", "ada")[0])
        rows = Connection(database_url).execute("SELECT * FROM hpo.sessions")
        assert cookie not in str(rows)
        assert cookie.encode() not in b"".join(bytes(value) for value in rows[0] if isinstance(value, memoryview))

    def test_whether_anybody_may_come_in(self, access: Access) -> None:
        assert not access.any()
        token, _ = access.create("read", "ada")
        assert access.any()
        access.revoke(token.token_id)
        assert not access.any()
