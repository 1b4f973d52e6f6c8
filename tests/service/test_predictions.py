"""Predictions of many clients at once: each is what it would be alone, of the released version, or a clear refusal."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg2
import pytest
from fastapi import FastAPI

import hpo
from hpo.errors import HpoError
from hpo.models.bundle.bundle import Bundle, load
from hpo.service.app import make_app
from hpo.service.backend import CONNECTIONS, Backend, Limits
from hpo.service.problems import Problem
from hpo.storage.access import Access
from hpo.storage.artifacts import FolderStore
from hpo.storage.registry import Registry
from tests.service.conftest import Service, publish_model, serving
from tests.unit.test_bundle import saved

pytestmark = [pytest.mark.xdist_group("service-predictions"), pytest.mark.usefixtures("one_thread")]

TOLERANCE = 2e-6  # of sums in another order, as tests of the saved model have it
NETWORKS: dict[str, dict[str, Any]] = {
    "last": {"features": 1, "classes": 2, "normalization": "channel"},
    "mean": {"pooling": "mean", "bidirectional": True, "normalization": "sequence", "members": 3},
    "attention": {"pooling": "attention", "layers": 2, "patch_length": 3, "members": 1},
    "times": {"missing": "mask", "interval": 60.0},
}


@pytest.fixture(scope="module")
def models(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Promoted models of several kinds by name, as they are alone."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, given in NETWORKS.items():
        publish_model(service, name, saved(folder / name, **given))
        found[name] = load(folder / name)
    return found


def some(random: np.random.Generator, features: int, longest: int = 60) -> list[Any]:
    """A few sequences of any length, some values missing."""
    found = []
    for _ in range(random.integers(1, 6)):
        values = random.normal(1, 3, (random.integers(1, longest), features)).round(3).tolist()
        values[0][0] = None if len(values) > 1 and random.random() < 0.2 else values[0][0]
        found.append(values)
    return found


def as_arrays(sequences: list[Any]) -> list[Any]:
    return [np.array(each, dtype=np.float64) for each in sequences]


def is_of(answer: dict[str, Any], model: Bundle, sequences: list[Any], steps: list[Any] | None = None) -> bool:
    """Whether a model says this of these sequences, each request by itself."""
    arrays = as_arrays(sequences)
    alone = model.predict(arrays if steps is None else {"X": arrays, "steps": steps})
    return bool(
        np.allclose(answer["probabilities"], alone.probabilities, rtol=0, atol=TOLERANCE)
        and answer["labels"] == alone.labels.tolist()
        and answer["ids"] == list(alone.ids)
        and answer["classes"] == list(alone.classes)
    )


def a_client(service: Service, role: str = "read", url: str | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {service.token(role)}"}
    limits = httpx.Limits(max_connections=64)
    return httpx.AsyncClient(base_url=url or service.url, headers=headers, timeout=60, trust_env=False, limits=limits)


def test_many_at_once_get_what_each_would_alone(service: Service, models: dict[str, Bundle]) -> None:
    faults: list[tuple[str, int, str]] = [
        ('{"sequences": [[[1, 2], [3]]]}', 422, "sequence 0 must be a list of steps"),
        ('{"sequences": [[["a", "b"]]]}', 422, "sequence 0 must be a list of steps"),
        ('{"sequences": [[[1, 2, 3, 4]]]}', 422, "the data has 4 features, expected"),
        ('{"sequences": [[[1e300, 1]]]}', 422, ""),
        ('{"sequences": [[[NaN, 1]]]}', 400, "the body is not valid JSON: NaN is no number in JSON"),
        ('{"sequences": ' + 5000 * "[", 400, "the body is not valid JSON"),
        ('{"sequences": []}', 422, "there is no sequence to predict"),
        ('{"sequences": [[[1, 2]]], "steps": [0]}', 422, "`steps` is a list of where the steps of each sequence are"),
        ('{"sequences": [[[1, 2]]], "steps": [[0, 1]]}', 422, "sequence 0: steps must be a list"),
        ('{"sequences": [[[1, 2]]], "steps": [[[0], [1, 2]]]}', 422, "sequence 0: steps must be a list"),
        ('{"sequences": [[[1, 2]]], "steps": [["soon"]]}', 422, "sequence 0: 'soon' is no step"),
    ]

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        random = np.random.default_rng(number)
        name = list(models)[number % len(models)]
        path = f"/v1/models/{name}/{['1', 'latest'][number % 2]}/predict"
        for _ in range(8):
            if number % 8 == 7:
                body, status, reason = faults[random.integers(len(faults))]
                headers = {"Content-Type": "application/json"}
                answer = await client.post(path, content=body, headers=headers)
                assert answer.status_code == status, (body, answer.text)
                assert reason in answer.json()["detail"]
            else:
                sequences = some(random, len(models[name].config.features))
                steps = None
                if name == "times":
                    steps = [random.uniform(30, 90, len(each)).cumsum().tolist() for each in sequences]
                answer = await client.post(
                    path, json={"sequences": sequences} | ({} if steps is None else {"steps": steps})
                )
                assert answer.status_code == 200, answer.text
                assert (answer.json()["model"], answer.json()["version"]) == (name, 1)
                assert is_of(answer.json(), models[name], sequences, steps)

    async def scene() -> None:
        async with a_client(service) as client:
            await asyncio.gather(*(ask(client, number) for number in range(64)))

    asyncio.run(scene())


def test_a_model_that_is_told_times_says_what_it_needs(service: Service, models: dict[str, Bundle]) -> None:
    with hpo.connect(service.url, service.token("read")) as client:
        with pytest.raises(HpoError, match=r"do not say when .*`steps` \(N, T\)"):
            client.predict("times", [[[1, 2], [3, 4]]])
        found = client.predict("times", [[[1, 2], [3, 4]]], steps=[["2024-01-31 09:00", "2024-01-31 09:07"]])
    expected = models["times"].predict({"X": [np.array([[1.0, 2], [3, 4]])], "steps": [[0, 420]]})
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=TOLERANCE)


def test_large_requests_are_computed_beside_the_small_ones(service: Service, models: dict[str, Bundle]) -> None:
    random = np.random.default_rng(0)
    many = [random.normal(size=(20, 1)).round(3).tolist() for _ in range(3000)]  # beyond what the loop parses
    ragged = [[[0.5]]] * 2000 + [random.normal(size=(1000, 1)).round(3).tolist()]  # nearly all of it padding

    async def scene() -> None:
        async with a_client(service) as client:
            bodies = [many, ragged, *(some(random, 1) for _ in range(20))]
            path = "/v1/models/last/latest/predict"
            answers = await asyncio.gather(*(client.post(path, json={"sequences": each}) for each in bodies))
            for answer, body in zip(answers, bodies, strict=True):
                assert is_of(answer.json(), models["last"], body)

    asyncio.run(scene())


class TestRelease:
    def test_under_load_every_answer_is_of_one_version_and_of_the_new_one_from_then_on(
        self, service: Service, tmp_path: Path
    ) -> None:
        versions = {}
        for seed, hidden in enumerate((4, 6), 1):
            folder = saved(tmp_path / str(seed), features=1, classes=2, hidden_size=hidden, members=1)
            versions[publish_model(service, "released", folder, seed)] = load(folder)
        order: list[int] = []  # versions that were released, as known before a request began

        async def ask(client: httpx.AsyncClient, number: int) -> None:
            random = np.random.default_rng(number)
            while len(order) < 6:
                sequences, known = some(random, 1), len(order)
                answer = await client.post("/v1/models/released/production/predict", json={"sequences": sequences})
                assert answer.status_code == 200, answer.text
                found = answer.json()
                assert is_of(found, versions[found["version"]], sequences)
                # released when it was asked, or since
                assert found["version"] in order[known - 1 : len(order)] + list(releasing)

        releasing: set[int] = set()

        async def scene(second: str) -> None:
            async with (
                a_client(service, "admin") as admin,
                a_client(service) as here,
                a_client(service, url=second) as there,
            ):

                async def release(version: int) -> None:
                    releasing.add(version)
                    path = "/v1/models/released/aliases/production"
                    assert (await admin.put(path, json={"version": version})).status_code == 200
                    order.append(version)
                    releasing.clear()

                await release(1)
                asking = [asyncio.create_task(ask(client, n)) for n, client in enumerate((here, there) * 8)]
                for version in (2, 1, 2, 1, 2):
                    for client in (here, there):  # each has answered meanwhile
                        body = {"sequences": [[[1.0]]]}
                        found = await client.post("/v1/models/released/production/predict", json=body)
                        assert found.json()["version"] == order[-1]
                    await release(version)
                await asyncio.gather(*asking)

        with serving(service.environment) as second:
            asyncio.run(scene(second))

    def test_a_deleted_version_stops_predicting_and_its_number_given_again_is_another_model(
        self, service: Service, tmp_path: Path
    ) -> None:
        body = {"sequences": [[[0.3], [0.1]]]}
        with service.client("admin") as client:
            for number, hidden in enumerate((3, 5, 7)):
                folder = saved(tmp_path / str(hidden), features=1, classes=2, hidden_size=hidden)
                assert publish_model(service, "gone", folder, number) == min(number + 1, 2)
                if number:
                    answer = client.post("/v1/models/gone/2/predict", json=body)
                    assert is_of(answer.json(), load(folder), body["sequences"])
                    assert client.delete("/v1/models/gone/2").status_code == 204
                    answer = client.post("/v1/models/gone/2/predict", json=body)
                    assert answer.status_code == 404
                    assert "has no version or alias '2'; there are: 1 = latest" in answer.json()["detail"]
            for wanted in ("02", "0", "99999999999999999999", "nobody"):
                assert client.post(f"/v1/models/gone/{wanted}/predict", json=body).status_code == 404

    def test_a_revoked_token_predicts_nothing_from_then_on(self, service: Service, models: dict[str, Bundle]) -> None:
        text = service.token("read")
        access = Access(service.database_url)
        with service.with_token(text) as client:
            body = {"sequences": [[[0.3]]]}
            assert client.post("/v1/models/last/1/predict", json=body).status_code == 200
            access.revoke(access.holder(text).token_id)  # type: ignore[union-attr]
            answer = client.post("/v1/models/last/1/predict", json=body)
            assert answer.status_code == 401
            assert answer.json()["detail"].startswith("this token is not known, has expired or was revoked")
            assert answer.headers["www-authenticate"].startswith("Bearer")

    def test_a_model_that_loads_slowly_keeps_no_other_waiting(
        self, service: Service, models: dict[str, Bundle], tmp_path: Path
    ) -> None:
        publish_model(service, "slow", saved(tmp_path / "slow", features=1, classes=2))
        key = Registry(service.database_url).get("slow").artifacts["model.safetensors"]
        stored = Path(service.environment["HPO_ARTIFACTS"]) / key
        content = stored.read_bytes()
        stored.unlink()
        os.mkfifo(stored)  # whoever reads it waits for a writer
        answers: list[httpx.Response] = []
        body = {"sequences": [[[0.3], [0.1]]]}

        def ask() -> None:
            with service.client() as client:
                answers.append(client.post("/v1/models/slow/1/predict", json=body))

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        with stored.open("wb") as pipe, service.client() as client:  # opens when the service reads
            for _ in range(20):
                assert client.post("/v1/models/last/1/predict", json=body).status_code == 200
            assert not answers
            stored.unlink()
            stored.write_bytes(content)
            pipe.write(content)
        for thread in asking:
            thread.join(60)
        assert all(is_of(answer.json(), load(tmp_path / "slow"), body["sequences"]) for answer in answers)
        assert len(answers) == 4


class TestLimit:
    def test_of_rows_steps_numbers_and_bytes(self, service: Service, models: dict[str, Bundle]) -> None:
        options = ("--max-rows", "5000", "--max-steps", "5000")
        with serving(service.environment, *options) as url, service.client("read") as client:

            def refusal(sequences: str) -> str:
                path, headers = f"{url}/v1/models/last/latest/predict", {"Content-Type": "application/json"}
                answer = client.post(path, content=f'{{"sequences": {sequences}}}', headers=headers)
                assert answer.status_code == 413, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
                return str(answer.json()["detail"])

            def listed(count: int, each: str) -> str:
                return f"[{','.join([each] * count)}]"

            assert refusal(listed(5001, "[[1]]")) == "at most 5,000 sequences are predicted at once, got 5,001"
            assert refusal(f"[{listed(5001, '[1]')}]") == (
                "a sequence of at most 5,000 steps is predicted, got one of 5,001"
            )
            assert refusal(f"[{listed(4100, '[[1]]')[1:-1]},{listed(4900, '[1]')}]") == (
                "4,101 sequences of up to 4,900 steps of 1 values are 20,094,900 numbers, more than 20,000,000: "
                "send fewer, or those of like length together"
            )
            assert refusal(" " * 16 * 2**20 + "[[[1]]]").startswith("a JSON body of at most 16 MiB is taken here; ")

    def test_of_a_body_whose_length_is_not_announced(self, service: Service, models: dict[str, Bundle]) -> None:
        def blocks() -> Iterator[bytes]:
            for _ in range(17):
                yield b" " * 2**20

        with service.client("read") as client:
            headers = {"Content-Type": "application/json"}
            answer = client.post("/v1/models/last/1/predict", content=blocks(), headers=headers)
        assert (answer.status_code, answer.json()["detail"][:11]) == (413, "a JSON body")

    def test_of_files(self, service: Service, models: dict[str, Bundle], waves: Path) -> None:
        file = {"file": ("waves.npz", waves.read_bytes())}
        with serving(service.environment, "--max-steps", "11") as url, service.client("read") as client:
            answer = client.post(f"{url}/v1/models/last/1/predict", files=file)
        assert answer.status_code == 413
        assert answer.json()["detail"] == "a sequence of at most 11 steps is predicted, got one of 12"


class TestFull:
    def test_a_full_queue_is_503_with_retry_after_and_those_in_it_are_answered(
        self, service: Service, models: dict[str, Bundle]
    ) -> None:
        async def scene(url: str) -> None:
            async with a_client(service, url=url) as client:

                async def ask() -> httpx.Response:
                    return await client.post("/v1/models/last/latest/predict", json={"sequences": [[[0.2]]]})

                assert (await ask()).status_code == 200
                with closing(psycopg2.connect(service.database_url.replace("+psycopg2", ""))) as locker:
                    locker.cursor().execute("LOCK TABLE hpo.tokens IN ACCESS EXCLUSIVE MODE")
                    asked = [asyncio.create_task(ask()) for _ in range(12)]
                    refused = []
                    for done in asyncio.as_completed(asked):
                        refused.append(await done)
                        if len(refused) == 8:  # three wait at least, four at most
                            break
                    assert {answer.status_code for answer in refused} == {503}
                    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
                    assert "2 requests are waiting for predictions" in refused[0].json()["detail"]
                    assert (await client.get("/healthz")).status_code == 200
                    locker.rollback()
                answers = await asyncio.gather(*asked)
                assert sorted({answer.status_code for answer in answers}) == [200, 503]
                assert 3 <= sum(answer.status_code == 200 for answer in answers) <= 4

        with serving(service.environment, "--max-waiting", "2") as url:
            asyncio.run(scene(url))

    def test_a_connection_that_does_not_get_free_is_503(self, service: Service, tmp_path: Path) -> None:
        backend = Backend(service.database_url, FolderStore(tmp_path), Limits(connection_s=0.01))
        with ExitStack() as held:
            for _ in range(CONNECTIONS):
                held.enter_context(backend.database())
            rule = f"all {CONNECTIONS} connections to the database are in use"
            with pytest.raises(Problem, match=rule) as full, backend.database():
                pass
        assert (full.value.status, full.value.headers) == (503, {"Retry-After": "1"})
        with backend.database() as database:
            assert database.access.tokens()
        backend.close()


def test_a_client_that_goes_gives_up_its_place(
    service: Service, models: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application in this process, with the threads of large requests kept busy and one place to wait."""
    for name in ("HPO_HOME", "HPO_ARTIFACTS"):
        monkeypatch.setenv(name, service.environment[name])
    store = FolderStore(Path(service.environment["HPO_ARTIFACTS"]))
    app = make_app(Backend(service.database_url, store, replace(Limits(), waiting=1)))
    sequences = [[[0.5]] * 20] * 2000
    body, token = json.dumps({"sequences": sequences}).encode(), service.token("read")

    async def ask(app: FastAPI, gone: asyncio.Event) -> tuple[int, bytes]:
        sent: list[Any] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {token}".encode()), (b"content-type", b"application/json")]
        path = "/v1/models/last/latest/predict"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": headers, "client": ("127.0.0.1", 1), "server": ("service", 80), "scheme": "http",
                 "http_version": "1.1", "asgi": {"version": "3.0"}}  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"], b"".join(part.get("body", b"") for part in sent)

    async def scene() -> None:
        go_on, never, gone = threading.Event(), asyncio.Event(), asyncio.Event()
        large = app.state.predictor.large
        for _ in range(os.cpu_count() or 1):
            busy = large.ask(lambda: go_on.wait(60))
            while large.waiting:
                await asyncio.sleep(0)
        leaving = asyncio.create_task(ask(app, gone))
        while not large.waiting:
            await asyncio.sleep(0.01)
        assert (await ask(app, never))[0] == 503
        gone.set()
        await leaving
        assert not large.waiting
        staying = asyncio.create_task(ask(app, never))
        while not large.waiting:
            await asyncio.sleep(0.01)
        go_on.set()
        assert await busy
        status, content = await staying
        assert status == 200
        assert is_of(json.loads(content), models["last"], sequences)
        app.state.predictor.close()

    asyncio.run(asyncio.wait_for(scene(), 120))
