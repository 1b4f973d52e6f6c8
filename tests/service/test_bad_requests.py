"""What clients do wrong, or at once: a clear 4xx, and nothing half-made is left behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psycopg2
import pytest
from optuna.study import StudyDirection

import hpo
from hpo.storage.keys import KEY, UPLOAD
from hpo.storage.trials import trial_storage
from tests.conftest import fresh_database, wait_for
from tests.service.conftest import Service, environment_of, upload
from tests.service.processes import RESET, Server, files_below

pytestmark = pytest.mark.xdist_group("service-bad")

STALL_S = 1.0
HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
CSV = b"t0,label\n1,a\n2,b\n"
FORM = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def strict(
    server: str, template: str, tmp_path_factory: pytest.TempPathFactory, two_free_ports: list[int]
) -> Iterator[tuple[Service, Server]]:
    """A service that waits a second for a stalled body, and takes 2 MiB."""
    folder = tmp_path_factory.mktemp("strict")
    with fresh_database(server, template) as url:
        environment = environment_of(folder, url)
        options = ("--stall", f"{STALL_S:g}s", "--max-body", "2", "--max-rows", "100")
        made = Server(environment, two_free_ports[0], folder / "log", *options)
        made.start()
        yield Service(made.url, url, environment), made
        made.stop()
        assert "Traceback" not in made.log.read_text()


@pytest.fixture(scope="module")
def service(strict: tuple[Service, Server]) -> Service:
    return strict[0]


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


@pytest.fixture(scope="module")
def key(client: httpx.Client, waves: Path) -> str:
    return upload(client, waves)


@pytest.fixture(scope="module")
def model(client: httpx.Client, service: Service, key: str, task: Callable[..., str]) -> str:
    """The name of a study that is over, and of its model."""
    assert client.post("/v1/studies", content=task("waves", key)).status_code == 201
    service.work("waves")
    return "waves"


def is_problem(answer: httpx.Response, status: int, detail: str = "") -> bool:
    """Whether it says what was wrong, as described; asserts each part."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status
    assert detail in found["detail"]
    assert "/uploads/" not in found["detail"]  # where files lie here is nobody's business
    return True


# ------------------------------------------------------------------------------------------- bodies that do not come


@contextmanager
def sending(service: Service, path: str, size: int, content_type: str = FORM) -> Iterator[socket.socket]:
    """A connection on which a request of so many bytes has been announced."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token()}\r\n"
        connection.sendall(f"{head}Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n".encode())
        yield connection


def answer_on(connection: socket.socket) -> str:
    """All that is answered until the server closes the connection."""
    found = b""
    while data := connection.recv(65536):
        found += data
    return found.decode()


def left_behind(service: Service) -> set[str]:
    """Names of files that are no stored artifact and no copy of one."""
    stored = {name for name in files_below(Path(service.environment["HPO_ARTIFACTS"])) if not KEY.fullmatch(name)}
    copies = files_below(Path(service.environment["HPO_HOME"]) / "uploads")
    return stored | {name for name in copies if not UPLOAD.fullmatch(name)}


@pytest.mark.parametrize(
    ("path", "content_type", "begin"),
    [
        ("/v1/data", FORM, HEAD + CSV),
        ("/v1/data", FORM, b""),
        ("/v1/studies", "application/json", b'{"study":'),
        ("/v1/studies/nobody/resume", "application/json", b'{"trials":'),
    ],
)
def test_a_body_that_stalls_is_given_up(service: Service, path: str, content_type: str, begin: bytes) -> None:
    with sending(service, path, 1000, content_type) as connection:
        connection.sendall(begin)
        said = answer_on(connection)
    assert said.startswith("HTTP/1.1 408 ")
    assert f"the body has stalled: {len(begin)} bytes, then nothing in time" in said
    assert not left_behind(service)


def test_a_body_that_comes_drop_by_drop_is_given_up(service: Service) -> None:
    with sending(service, "/v1/data", 10**6) as connection:
        connection.sendall(HEAD)
        stopped = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not stopped.wait(STALL_S / 10):  # never silent for long
                    connection.sendall(b"1")

        drops = threading.Thread(target=drip)
        drops.start()
        said = answer_on(connection)
        stopped.set()
        drops.join()
    assert said.startswith("HTTP/1.1 408 ")
    assert not left_behind(service)


def test_a_slow_body_is_waited_for(service: Service) -> None:
    """Slower than all of it within the limit, as long as something comes."""
    content = HEAD + b"t0,label\n" + b"".join(b"%d.0000000000000000,%c\n" % (i, b"ab"[i % 2]) for i in range(200))
    content += b"\r\n--x--\r\n"
    with sending(service, "/v1/data", len(content)) as connection:
        for i in range(0, len(content), len(content) // 8):
            connection.sendall(content[i : i + len(content) // 8])
            time.sleep(STALL_S / 4)  # what is slow is what is tested
        assert connection.recv(65536).startswith(b"HTTP/1.1 201 ")


@pytest.mark.parametrize("reset", [True, False])
def test_an_upload_that_is_cut_off_leaves_nothing(strict: tuple[Service, Server], reset: bool) -> None:
    service, running = strict
    content = HEAD + b"t0,label\n" + b"1,a\n2,b\n" * 200_000
    for share in (0.0, 0.001, 0.3, 0.99):
        with sending(service, "/v1/data", len(content) + 1000) as connection:
            connection.sendall(content[: int(share * len(content))])
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    with service.client() as client:
        assert client.get("/healthz").is_success
    wait_for(lambda: not left_behind(service))
    assert "POST" not in running.log.read_text()  # nobody's fault here


@pytest.mark.parametrize("form", [HEAD, HEAD + CSV, HEAD + CSV + b"\r\n--", b"--x\r\nContent-", b"", b"\r\n" * 500])
def test_a_form_without_its_end_is_refused(service: Service, client: httpx.Client, form: bytes) -> None:
    answer = client.post("/v1/data", content=form, headers={"Content-Type": FORM})
    assert answer.status_code in (400, 422)
    assert is_problem(answer, answer.status_code)
    assert not left_behind(service)


def test_a_body_beyond_the_limit_is_413_announced_or_not(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    big = tmp_path / "big.csv"
    big.write_bytes(b"t0,label\n" + b"1,a\n2,b\n" * 400_000)
    with big.open("rb") as file:
        is_problem(client.post("/v1/data", files={"file": ("big.csv", file)}), 413, "at most 2 MiB")
    parts = iter([HEAD, *([b"1,a\n2,b\n" * 1000] * 400)])
    is_problem(client.post("/v1/data", content=parts, headers={"Content-Type": FORM}), 413, "at most 2 MiB")
    is_problem(client.post("/v1/studies", content=b" " * 2**20 + b"a"), 413, "at most 1 MiB")
    with (
        hpo.connect(service.url, service.token()) as ours,
        pytest.raises(hpo.ServiceError, match="at most 2 MiB") as error,
    ):
        ours.check(big)
    assert error.value.status == 413
    assert not left_behind(service)


# ------------------------------------------------------------------------------------------------- bodies of nonsense


@pytest.mark.parametrize("content_type", ["", "text/html", "application/octet-stream", "image/png", "multipart/mixed"])
def test_an_unknown_content_type_is_415(client: httpx.Client, model: str, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    is_problem(client.post("/v1/data", content=CSV, headers=headers), 415, "multipart/form-data")
    is_problem(client.post(f"/v1/models/{model}/latest/predict", content=CSV, headers=headers), 415)
    if content_type:  # curl's --data without a type is a study file
        is_problem(
            client.post("/v1/studies", content=CSV, headers=headers), 415, "application/toml or application/json"
        )


@pytest.mark.parametrize("boundary", [b"", b"; boundary=", b"; boundary=\x01", b"; boundary=\xe9", b"; boundary=yyy"])
def test_a_form_without_its_boundary_is_400(client: httpx.Client, boundary: bytes) -> None:
    headers = [(b"Content-Type", b"multipart/form-data" + boundary)]
    is_problem(client.post("/v1/data", content=HEAD + CSV + b"\r\n--x--\r\n", headers=headers), 400)


NONSENSE = {
    "not a number": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "half of a pair": '{"a": "\\ud800"}',
    "deep": "[" * 100_000,
    "digits": "1" * 5000,
    "cut off": '{"a": ',
    "no UTF-8": b"\xff",
    "nothing": "",
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_what_is_no_json_is_400(client: httpx.Client, model: str, body: str | bytes) -> None:
    headers = {"Content-Type": "application/json"}
    is_problem(client.post("/v1/studies", content=body, headers=headers), 400, "is not valid JSON")
    for path in (f"/v1/models/{model}/latest/predict", f"/v1/studies/{model}/resume"):
        answer = client.post(path, content=body or "{", headers=headers)
        assert answer.status_code in (400, 422)
        assert is_problem(answer, answer.status_code)


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**30, 1.5, True, "1", [], {}])
def test_a_number_that_is_none_or_too_large_is_422(client: httpx.Client, model: str, value: object) -> None:
    is_problem(client.post(f"/v1/studies/{model}/resume", json={"trials": value}), 422, "body.trials")
    is_problem(client.put(f"/v1/models/{model}/aliases/x", json={"version": value}), 422, "body.version")


def test_numbers_of_the_address_are_checked(client: httpx.Client, model: str) -> None:
    for number in (-1, 10**12, 10**30, "x"):
        is_problem(client.get(f"/v1/studies/{model}/trials/{number}"), 422)
        is_problem(client.delete(f"/v1/models/{model}/{number}"), 422)
        is_problem(client.get(f"/v1/studies/{model}/trials", params={"offset": number}), 422)
        is_problem(client.post(f"/v1/studies/{model}/promote", params={"trial": number}), 422)
    is_problem(client.get(f"/v1/studies/{model}/trials/7"), 404)
    is_problem(client.post(f"/v1/studies/{model}/promote", params={"trial": 7}), 409, "has not trial 7, completed")
    is_problem(client.get(f"/v1/models/{model}/7"), 404, "there are: 1 = latest")
    is_problem(client.post(f"/v1/models/{model}/7/predict", json={"sequences": [[[1]]]}), 404, "there are: 1 = latest")


def test_control_characters_in_an_address_are_400(client: httpx.Client, model: str) -> None:
    for text in ("%00", "a%00b", "%0A", "%1b[2J", "%7F"):
        for path in ("studies/{}", "studies/{}/events", "models/{}/1", "data/{}", f"models/{model}/{{}}"):
            is_problem(client.get(f"/v1/{path.format(text)}"), 400, "no control characters")
        is_problem(client.delete(f"/v1/models/{model}/aliases/{text}"), 400)
    is_problem(client.get("/v1/data?sha256=%00"), 400)
    for odd in ("%F0%9F%98%80", "%FF", "%ED%A0%80", "a" * 5000, "%2e%2e"):
        is_problem(client.get(f"/v1/studies/{odd}x"), 404)


def test_another_method_is_405_with_all_that_may_be_asked(client: httpx.Client) -> None:
    served = {
        "/healthz": "GET",
        "/v1/studies": "GET, POST",
        "/v1/studies/x": "GET, DELETE",
        "/v1/models/x/1": "GET, DELETE",
    }
    for path, allowed in served.items():
        for method in ("PATCH", "TRACE", "OPTIONS", "BREW"):
            answer = client.request(method, path)
            is_problem(answer, 405, f"{method} is not served here")
            assert answer.headers["allow"] == allowed
        assert client.head(path).status_code == 405


def test_an_error_names_files_as_they_were_sent(client: httpx.Client, key: str) -> None:
    tables = {"study": {"name": "positive"}, "data": {"train": key, "positive": "quick"}}
    is_problem(client.post("/v1/studies", json=tables), 422, f"data.positive does not fit {key}")
    assert client.get("/v1/studies/positive").status_code == 404


@pytest.mark.parametrize("track", [{"tensorboard": "/srv/boards"}, {"mlflow": "http://10.0.0.1:5000"}, {}, 1])
def test_no_worker_writes_runs_to_folders_or_hosts_for_whoever_submits(
    client: httpx.Client, key: str, track: object
) -> None:
    tables = {"study": {"name": "tracked"}, "data": {"train": key}, "track": track}
    is_problem(client.post("/v1/studies", json=tables), 422, "[track] is not taken by the service")
    assert client.get("/v1/studies/tracked").status_code == 404


def test_a_submission_that_is_refused_makes_no_study(client: httpx.Client, service: Service, tmp_path: Path) -> None:
    """Data that can be read, and not be trained on."""
    (tmp_path / "one.csv").write_text("t0,label\n1,a\n2,a\n")
    tables = {"study": {"name": "one"}, "data": {"train": upload(client, tmp_path / "one.csv")}}
    is_problem(client.post("/v1/studies", json=tables, headers={"Idempotency-Key": "one"}), 422)
    assert half_made(service) == 0
    assert client.get("/v1/studies/one").status_code == 404


# ------------------------------------------------------------------------------------------------------------ at once


def at_once(*asks: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """The answers to requests that set out together."""
    together = threading.Barrier(len(asks))

    def ask(each: Callable[[], httpx.Response]) -> httpx.Response:
        together.wait()
        return each()

    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(ask, asks))


def half_made(service: Service) -> int:
    """Studies of Optuna's that have no terms: nobody works on them."""
    with closing(psycopg2.connect(service.database_url.replace("+psycopg2", ""))) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM studies LEFT JOIN hpo.terms USING (study_id) WHERE budget IS NULL")
        ((count,),) = cursor.fetchall()
        return int(count)


def test_of_two_deletions_one_finds_it(client: httpx.Client, key: str, model: str, task: Callable[..., str]) -> None:
    other = 1 - client.get(f"/v1/models/{model}/latest").json()["trial"]
    for i in range(5):
        assert client.post("/v1/studies", content=task(f"twice{i}", key, 1)).status_code == 201
        version = client.post(f"/v1/studies/{model}/promote", params={"trial": other}).json()["version"]
        client.put(f"/v1/models/{model}/aliases/twice", json={"version": version})
        for path in (f"models/{model}/aliases/twice", f"models/{model}/{version}", f"studies/twice{i}"):
            answers = at_once(*[partial(client.delete, f"/v1/{path}")] * 2)
            assert sorted(each.status_code for each in answers) == [204, 404], [each.text for each in answers]


def test_a_study_that_is_only_being_made_is_not_there_yet(client: httpx.Client, service: Service) -> None:
    """Optuna's row of it comes first; between that and the study's owner, its own submitter was told 403."""
    storage = trial_storage(service.database_url)
    storage.create_new_study([StudyDirection.MAXIMIZE], "half-made")
    answer = client.delete("/v1/studies/half-made")
    assert answer.status_code == 404, answer.text
    assert "no study named 'half-made'" in answer.json()["detail"]
    storage.delete_study(storage.get_study_id_from_name("half-made"))
    storage.close()


def test_a_study_is_deleted_while_it_is_submitted(
    client: httpx.Client, service: Service, key: str, task: Callable[..., str]
) -> None:
    content = task("contested", key)
    for _ in range(25):
        submitted, repeated, deleted = at_once(
            lambda: client.post("/v1/studies", content=content),
            lambda: client.post("/v1/studies", content=content),
            lambda: client.delete("/v1/studies/contested"),
        )
        assert submitted.status_code in (200, 201, 404), submitted.text
        assert repeated.status_code in (200, 201, 404), repeated.text
        assert deleted.status_code in (204, 404), deleted.text
        assert half_made(service) == 0
    assert client.post("/v1/studies", content=content).json()["status"] == "open"
    assert client.delete("/v1/studies/contested").status_code == 204


def test_a_model_is_deleted_while_it_predicts_and_is_downloaded(
    client: httpx.Client, service: Service, model: str, waves: Path
) -> None:
    sequences = np.load(waves)["X"][:3].tolist()
    latest = client.get(f"/v1/models/{model}/latest").json()["trial"]
    for _ in range(5):
        version = client.post(f"/v1/studies/{model}/promote", params={"trial": 1 - latest}).json()["version"]
        path = f"/v1/models/{model}/{version}"
        predicted, downloaded, reported, deleted = at_once(
            partial(client.post, f"{path}/predict", json={"sequences": sequences}),
            partial(client.get, f"{path}/bundle"),
            partial(client.get, f"{path}/report"),
            partial(client.delete, path),
        )
        assert deleted.status_code == 204, deleted.text
        for each in (predicted, downloaded, reported):
            assert each.status_code == 200 or is_problem(each, 404)
        is_problem(client.post(f"{path}/predict", json={"sequences": sequences}), 404)
        is_problem(client.get(f"{path}/bundle"), 404)
    assert client.post(f"/v1/models/{model}/latest/predict", json={"sequences": sequences}).status_code == 200
    assert not left_behind(service)


def test_one_key_for_two_studies_at_once_is_one_study(client: httpx.Client, key: str, task: Callable[..., str]) -> None:
    def submit(name: str) -> Callable[[], httpx.Response]:
        headers = {"Idempotency-Key": "shared"}
        return lambda: client.post("/v1/studies", content=task(name, key, 1), headers=headers)

    answers = at_once(submit("left"), submit("right"))
    assert sorted(each.status_code for each in answers) == [201, 409]
    names = [client.get(f"/v1/studies/{name}").status_code for name in ("left", "right")]
    assert sorted(names) == [200, 404]
    refused = next(each for each in answers if each.status_code == 409)
    assert json.loads(refused.text)["detail"].startswith("the Idempotency-Key 'shared' was used for another submission")
