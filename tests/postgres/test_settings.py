"""Whatever a server, a database or a role sets: what is written is read back to the bit; every error is one line."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import make_url

from hpo.storage.check import Finding, check
from hpo.storage.connection import Connection
from hpo.storage.errors import DatabaseRefusal, DatabaseUnavailable, PostgresError
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.tables import migrate
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage, trial_storage
from tests.conftest import execute, fresh_database

ODD = {
    "datestyle": "'German, DMY'",
    "intervalstyle": "'sql_standard'",
    "timezone": "'Pacific/Chatham'",
    "extra_float_digits": "'-15'",
    "bytea_output": "'escape'",
    "client_encoding": "'LATIN1'",
    "standard_conforming_strings": "'off'",
    "default_transaction_read_only": "'on'",
    "default_transaction_isolation": "'serializable'",
    "default_transaction_deferrable": "'on'",
    "statement_timeout": "'400ms'",
    "lock_timeout": "'1ms'",
    "idle_in_transaction_session_timeout": "'1ms'",
    "idle_session_timeout": "'50ms'",
    "transaction_timeout": "'300ms'",
    "synchronous_commit": "'off'",
    "search_path": "'nowhere'",
    "enable_nestloop": "'off'",
    "client_min_messages": "'error'",
}
README = Path(__file__).parents[2] / "README.md"
NUMBERS = [math.pi, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, -2.5e-13, 1 / 3]


def _known(url: str) -> dict[str, str]:
    """Those of the odd settings that this server knows."""
    connection = Connection(url)
    known = {name for (name,) in connection.execute("SELECT name FROM pg_settings")}
    connection.close()
    return {name: value for name, value in ODD.items() if name in {each.lower() for each in known}}


@pytest.fixture(params=["database", "role"])
def odd_url(request: pytest.FixtureRequest, server: str) -> Iterator[str]:
    """An empty database that sets all of this, or a role that does."""
    with fresh_database(server, "template0") as url:
        database, settings = make_url(url).database, _known(url)
        if request.param == "database":
            execute(server, *(f"ALTER DATABASE {database} SET {name} = {value}" for name, value in settings.items()))
            yield url
            return
        with role(url) as other:
            name_of = make_url(other).username
            execute(
                url, f'GRANT ALL ON DATABASE {database} TO "{name_of}"', f'GRANT ALL ON SCHEMA public TO "{name_of}"'
            )
            execute(url, *(f'ALTER ROLE "{name_of}" SET {name} = {value}' for name, value in settings.items()))
            yield other


@contextmanager
def role(url: str) -> Iterator[str]:
    """URL of the same database as a role of its own, that owns nothing and may nothing."""
    name = f"r{uuid4().hex[:10]}"
    execute(url, f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    try:
        yield make_url(url).set(username=name, password="secret").render_as_string(hide_password=False)
    finally:
        execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


def test_what_is_read_back_is_what_was_written(odd_url: str) -> None:
    storage = trial_storage(odd_url)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "größe 数")
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_params(trial_id, {"x": (1 / 3, FloatDistribution(0, 1))})
    for step, value in enumerate([*NUMBERS, math.inf, -math.inf]):
        storage.set_trial_intermediate_value(trial_id, step, value)
    text = "quote ' back \\ slash ∀ \U0001f600 \\n"
    storage.finish_trial(trial_id, TrialState.COMPLETE, [math.pi], {"text": text, "numbers": NUMBERS})
    begun = storage.get_trial(trial_id).datetime_start
    storage.close()
    again = trial_storage(odd_url)
    (trial,) = again.get_all_trials(study_id)
    assert list(map(repr, trial.intermediate_values.values())) == list(map(repr, [*NUMBERS, math.inf, -math.inf]))
    assert (trial.params, trial.value, trial.user_attrs["text"]) == ({"x": 1 / 3}, math.pi, text)
    assert list(map(repr, trial.user_attrs["numbers"])) == list(map(repr, NUMBERS))
    assert trial.datetime_start == begun
    assert again.get_study_name_from_id(study_id) == "größe 数"
    again.close()


def test_a_study_runs_under_odd_settings(odd_url: str) -> None:
    storage = trial_storage(odd_url)
    leases = Leases(storage)
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE])
    leases.open_study(study_id, Terms(budget=2, timeout_s=60), {})
    leases.register("w", study_id, "here", 1)
    for _ in range(2):
        lease = leases.acquire(study_id, "w")
        assert lease is not None
        storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5])
    assert leases.acquire_promotion(study_id, "w")
    given = {"name": "m", "study_id": study_id, "study_name": "s", "trial_number": 0}
    model = Registry(storage.connection).promote(**given, scores={"x": math.pi}, config={}, artifacts={})  # type: ignore[arg-type]
    assert Registry(odd_url).get("m") == model
    storage.close()


def test_tables_are_found_in_the_schema_in_which_they_were_made(empty_database_url: str) -> None:
    """Optuna's tables lie where the search path of whoever made them pointed to."""
    execute(empty_database_url, "CREATE SCHEMA tuning")
    made_with = make_url(empty_database_url).update_query_dict({"options": "-c search_path=tuning"})
    storage = trial_storage(made_with.render_as_string(hide_password=False))
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    storage.close()
    other = trial_storage(empty_database_url)
    assert other.get_study_id_from_name("s") == study_id
    assert other.connection.execute("SELECT to_regclass('public.studies')") == [(None,)]
    other.close()


# ------------------------------------------------------------------------------------------------------------- rights


def granted(kind: str) -> list[str]:
    """The statements of README.md that give a role its rights."""
    (block,) = re.findall(rf"-- {kind}\n(.*?)\n\n", README.read_text() + "\n\n", re.DOTALL)
    return [statement for statement in block.replace("```", "").split(";") if statement.strip()]


@pytest.fixture
def granting(database_url: str) -> Iterator[Callable[[str], str]]:
    """granting("worker") is the URL of a role with these rights."""
    with role(database_url) as url:

        def give(kind: str) -> str:
            name = str(make_url(url).username)
            execute(database_url, *(statement.replace(f"hpo_{kind}", name) for statement in granted(kind)))
            return url

        yield give


def test_a_reader_with_the_rights_of_the_readme_reads_and_does_not_write(
    granting: Callable[[str], str], storage: TrialStorage
) -> None:
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "s")
    Leases(storage).open_study(study_id, Terms(budget=1), {})
    url = granting("reader")
    reading = trial_storage(url)
    assert Leases(reading).snapshot(study_id).name == "s"
    assert optuna.load_study(study_name="s", storage=reading).trials == []
    assert Registry(reading.connection).models() == []
    with pytest.raises(DatabaseRefusal, match=r"permission denied for .*; grant the role .* README"):
        reading.create_new_study([StudyDirection.MAXIMIZE])
    reading.close()
    assert {finding.what: finding.ok for finding in check(url)}["this role may"]


def test_a_worker_with_the_rights_of_the_readme_works(granting: Callable[[str], str], storage: TrialStorage) -> None:
    url = granting("worker")
    working = trial_storage(url)
    leases = Leases(working)
    study_id = working.create_new_study([StudyDirection.MAXIMIZE], "s")
    leases.open_study(study_id, Terms(budget=1), {})
    leases.register("w", study_id, "here", 1)
    with leases.take(study_id, "w") as lease:
        assert lease is not None
        working.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5])
    assert leases.acquire_promotion(study_id, "w")
    leases.retire("w")
    working.delete_study(study_id)
    working.close()


def test_an_owner_with_the_rights_of_the_readme_makes_the_tables(empty_database_url: str) -> None:
    with role(empty_database_url) as url:
        name, database = str(make_url(url).username), str(make_url(url).database)
        for statement in granted("owner"):
            execute(
                empty_database_url, statement.replace("hpo_owner", name).replace("DATABASE hpo", f"DATABASE {database}")
            )
        migrate(url)
        assert all(finding.ok for finding in check(url))


def test_no_right_to_make_tables_is_one_line(empty_database_url: str) -> None:
    """Reported as 125 lines of SQLAlchemy's."""
    with (
        role(empty_database_url) as url,
        pytest.raises(PostgresError, match=r"permission denied for .*README") as refused,
    ):
        trial_storage(url)
    assert len(str(refused.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------- errors that will not pass


@pytest.mark.parametrize(
    "change",
    [
        {"host": "no-such-host.invalid"},
        {"database": "no_such_database"},
        {"username": "nobody_there"},
        {"password": "wrong"},
        {"query": {"sslmode": "require"}},
        {"query": {"sslmode": "nonsense"}},
        {"query": {"no_such_option": "1"}},
    ],
)
def test_what_another_try_does_not_mend_is_refused_at_once(
    change: dict[str, object], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported: a minute of retries for a name that does not exist."""
    own = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: pytest.fail("it tries again")})
    monkeypatch.setattr("hpo.storage.connection.time", own)  # not the module of all threads
    url = make_url(database_url).set(**change).render_as_string(hide_password=False)  # type: ignore[arg-type]
    with pytest.raises(PostgresError) as refused:
        Connection(url).execute("SELECT 1")
    assert "\n" not in str(refused.value).strip()


def test_a_host_that_refuses_and_another_that_answers_are_a_database(database_url: str) -> None:
    parsed = make_url(database_url)
    hosts = {"host": [f"127.0.0.1:{1}", f"{parsed.host}:{parsed.port}"]}
    url = parsed.set(host=None, port=None, query=hosts)
    connection = Connection(url.render_as_string(hide_password=False))
    assert connection.execute("SELECT 1") == [(1,)]
    connection.close()


def test_a_database_out_of_reach_is_waited_for(database_url: str) -> None:
    url = make_url(database_url).set(port=1).render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailable, match=r"did not answer for 0\.2 s") as away:
        Connection(url, retry_s=0.2).execute("SELECT 1")
    assert not isinstance(away.value, DatabaseRefusal)


# -------------------------------------------------------------------------------------------------------------- check


def test_a_check_tells_what_is_there_and_what_is_missing(empty_database_url: str, database_url: str) -> None:
    assert all(finding.ok for finding in check(database_url))
    found = {finding.what: finding for finding in check(empty_database_url)}
    assert found["tables"] == Finding("tables", False, "none yet; `hpo db upgrade` makes them")
