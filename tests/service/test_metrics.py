"""What /metrics says after known events, and when the service says that it is ready."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import execute
from tests.service.conftest import Service, environment_of, serving, upload

pytestmark = pytest.mark.xdist_group("service-metrics")

Labels = tuple[tuple[str, str], ...]


def read(client: httpx.Client) -> dict[tuple[str, Labels], float]:
    """The value of each sample."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation for family in families if family.name.startswith("hpo_"))
    return {
        (each.name, tuple(sorted(each.labels.items()))): each.value for family in families for each in family.samples
    }


def requests(method: str, route: str, status: int) -> tuple[str, Labels]:
    """The count of requests like that."""
    return "hpo_http_request_seconds_count", (("method", method), ("route", route), ("status", str(status)))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


def test_studies_trials_workers_and_predictions_are_counted(
    client: httpx.Client, service: Service, waves: Path, task: Callable[..., str]
) -> None:
    before = read(client)
    assert before["hpo_database_up", ()] == 1
    client.post("/v1/studies", content=task("waves", upload(client, waves), 3))
    submitted = read(client)
    assert submitted["hpo_studies", (("status", "open"),)] == 1
    assert submitted["hpo_trials_queued", ()] == 3
    execute(
        service.database_url,
        "INSERT INTO hpo.workers (worker, started_at, seen_at) VALUES ('alive', now(), now())",
        "INSERT INTO hpo.workers (worker, started_at, seen_at) VALUES ('silent', now(), now() - interval '1 h')",
        "INSERT INTO hpo.workers (worker, started_at, seen_at, stopped_at) VALUES ('ended', now(), now(), now())",
    )
    assert read(client)["hpo_workers_alive", ()] == 1
    service.work("waves")
    trained = read(client)
    assert trained["hpo_studies", (("status", "open"),)] == trained["hpo_trials_queued", ()] == 0
    assert trained["hpo_studies", (("status", "finished"),)] == 1
    assert trained["hpo_trials", (("state", "complete"),)] == 3
    assert trained["hpo_trials_held", ()] == 0
    for count in (1, 4):
        body = {"sequences": count * [[[0.1], [0.2]]]}
        assert client.post("/v1/models/waves/latest/predict", json=body).status_code == 200
    after = read(client)
    assert after["hpo_prediction_sequences_sum", ()] - trained["hpo_prediction_sequences_sum", ()] == 5
    assert after["hpo_prediction_seconds_count", ()] - trained["hpo_prediction_seconds_count", ()] == 2
    assert after["hpo_prediction_seconds_sum", ()] > trained["hpo_prediction_seconds_sum", ()]
    assert after[requests("POST", "/v1/models/{name}/{version}/predict", 200)] == 2
    assert after[requests("POST", "/v1/studies", 201)] == 1
    assert after["hpo_http_requests_in_flight", ()] == 1  # this one


def test_nothing_that_clients_make_up_becomes_a_label(client: httpx.Client) -> None:
    before = read(client)
    for word in ("one", "two", "three"):
        assert client.get(f"/{word}/{word}").status_code == 404
        assert client.get(f"/v1/studies/{word}").status_code == 404
        assert client.request(word.upper(), "/healthz").status_code == 405
        assert client.get(f"/assets/{word}.css").status_code == 404
    after = read(client)
    new = {key: after[key] for key in after.keys() - before.keys() if key[0] == "hpo_http_request_seconds_count"}
    assert new == {
        requests("GET", "none", 404): 3,
        requests("GET", "/v1/studies/{name}", 404): 3,
        requests("GET", "/assets", 404): 3,
        requests("other", "/healthz", 405): 3,
    }
    assert not any(word in str(new) for word in ("one/", "two", "three"))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a service with an embedded server of its own, which is stopped at the end."""
    environment = environment_of(tmp_path, "")
    yield environment
    database(environment, "stop")


def database(environment: dict[str, str], command: str) -> None:
    subprocess.run([sys.executable, "-P", "-m", "hpo", "db", command], env=environment, check=True, timeout=120)


def test_a_service_is_ready_while_database_and_store_answer(own: dict[str, str], tmp_path: Path) -> None:
    store, elsewhere = tmp_path / "artifacts", tmp_path / "elsewhere"
    with serving(own) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:

        def problem() -> str:
            answer = client.get("/readyz")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            return str(answer.json()["detail"])

        assert client.get("/readyz").json() == {"status": "ok"}
        store.rename(elsewhere)
        assert problem().startswith("not ready: the artifact folder")
        elsewhere.rename(store)
        assert client.get("/readyz").status_code == 200
        assert read(client)["hpo_database_up", ()] == 1
        database(own, "stop")
        assert problem().startswith("not ready: the database at")
        found = read(client)
        assert found["hpo_database_up", ()] == 0
        assert found[requests("GET", "/readyz", 503)] == 2
        assert not any(name == "hpo_studies" for name, _ in found)
        assert client.get("/healthz").status_code == 200
        database(own, "start")
        assert client.get("/readyz").status_code == 200
        assert read(client)["hpo_database_up", ()] == 1
