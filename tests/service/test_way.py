"""From a data file to predictions over HTTP, by a client that knows nothing of the project, with a real worker."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from hpo.models.bundle.bundle import load
from hpo.models.data.readers import read
from tests.service.conftest import Service, upload

pytestmark = pytest.mark.xdist_group("service-way")


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


@pytest.fixture(scope="module")
def key(client: httpx.Client, waves: Path) -> str:
    return upload(client, waves)


@pytest.fixture(scope="module")
def finished(client: httpx.Client, service: Service, key: str, task: Callable[..., str]) -> list[dict[str, object]]:
    """The events of a whole study, named waves."""
    answer = client.post("/v1/studies", content=task("waves", key), headers={"Content-Type": "application/toml"})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/v1/studies/waves"
    worker = threading.Thread(target=service.work, args=("waves",))
    worker.start()
    found = list(events(client, "waves"))
    worker.join(60)
    return found


def events(client: httpx.Client, name: str, last: str | None = None) -> Iterator[dict[str, object]]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with client.stream("GET", f"/v1/studies/{name}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event: dict[str, object] = {}
        for line in stream.iter_lines():
            if not line:
                if event:
                    yield event
                event = {}
            elif not line.startswith(":"):  # a comment, which only shows that the connection lives
                name, _, value = line.partition(": ")
                event[name] = json.loads(value) if name == "data" else value


class TestData:
    def test_is_described(self, client: httpx.Client, waves: Path) -> None:
        with waves.open("rb") as file:
            answer = client.post("/v1/data", files={"file": ("my waves.npz", file)})
        found = answer.json()
        assert answer.status_code == 201
        assert found.pop("key").endswith("-my_waves.npz")
        assert found == {
            "sequences": 60,
            "steps": 12,
            "features": ["x0"],
            "classes": {"fast": 30, "slow": 30},
            "groups": None,
            "filled": 0,
            "warnings": [],
        }

    def test_has_one_key_by_its_content(self, client: httpx.Client, key: str, waves: Path) -> None:
        assert upload(client, waves) == key
        assert client.get(f"/v1/data/{key}").json() == {"key": key}
        unknown = key.replace(key.split("-")[1], "0" * 64)
        assert client.get(f"/v1/data/{unknown}").status_code == 404
        assert client.get("/v1/data/weights-1").status_code == 404

    def test_warnings_of_the_reader_are_told(self, client: httpx.Client, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("Unnamed: 0;t0;t1;label\n0;1,5;2;a\n1;3;4;b\n")
        with (tmp_path / "a.csv").open("rb") as file:
            found = client.post("/v1/data", files={"file": ("a.csv", file)}).json()
        assert found["steps"] == 2
        assert any("'Unnamed: 0' is left out" in warning for warning in found["warnings"])
        assert not any("/" in warning for warning in found["warnings"])

    def test_times_and_weights_are_no_features(self, client: httpx.Client) -> None:
        content = b"t0,t1,day,trust,label\n1,2,2024-01-02,1,a\n3,4,2024-01-01,2,b\n"
        named = {"time": "day", "weight": "trust"}
        found = client.post("/v1/data", params=named, files={"file": ("a.csv", content)}).json()
        assert (found["steps"], found["features"], found["warnings"]) == (2, ["x0"], [])
        for columns, reason in (
            (named | {"time": "week"}, "a.csv has no time column 'week'; its columns are t0, t1, day, trust, label"),
            (named | {"weight": "day"}, "label, id, step, group, time and weight must be different columns"),
        ):
            answer = client.post("/v1/data", params=columns, files={"file": ("a.csv", content)})
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith(reason)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.csv", b"t0,label\nx,a\n", "a.csv, row 2, column 't0': 'x' is not a number"),
            ("a.xlsx", b"PK", "a.xlsx is a spreadsheet, which is not read: save the sheet as csv"),
            ("a.npz", b"", "a.npz is empty or not an npz file"),
            ("../../etc/hosts", b"root", "hosts: unknown suffix ''"),
        ],
    )
    def test_that_cannot_be_read_is_422_with_the_reason(
        self, client: httpx.Client, name: str, content: bytes, expected: str
    ) -> None:
        answer = client.post("/v1/data", files={"file": (name, content)})
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(expected)

    def test_in_another_form_is_refused(self, client: httpx.Client) -> None:
        assert client.post("/v1/data", content=b"1,2").status_code == 415
        assert client.post("/v1/data", files={"other": ("a.csv", b"1")}).status_code == 422
        assert client.post("/v1/data", data={"file": "a.csv"}, files={"x": b""}).status_code in (400, 422)
        broken = {"Content-Type": "multipart/form-data; boundary=x"}
        assert client.post("/v1/data", content=b"--x\r\nnonsense", headers=broken).status_code == 422


class TestStudy:
    def test_is_followed_to_its_end(self, finished: list[dict[str, object]]) -> None:
        assert [event["event"] for event in finished][-1] == "end"
        last = finished[-1]["data"]
        assert isinstance(last, dict)
        assert last["trials"]["complete"] == 2
        assert (last["status"], last["owner"], last["version"]) == ("finished", "ada", 1)

    def test_is_listed_with_its_trials(self, client: httpx.Client, finished: list[dict[str, object]]) -> None:
        assert "waves" in [study["name"] for study in client.get("/v1/studies").json()]
        assert client.get("/v1/studies/waves").json()["best"]["value"] > 0.4
        page = client.get("/v1/studies/waves/trials", params={"offset": 1, "limit": 1}).json()
        assert (page["total"], [trial["number"] for trial in page["trials"]]) == (2, [1])
        one = client.get("/v1/studies/waves/trials/1").json()
        assert one | page["trials"][0] == one
        assert (len(one["curve"]["value"]), list(one["reports"])) == (2, ["1", "2"])
        assert one["log"].startswith("time,level,message\n")
        assert one["params"]["layers"] == 1
        gone = client.get("/v1/studies/waves/trials/2")
        assert (gone.status_code, gone.json()["detail"]) == (404, "study 'waves' has trials 0 to 1, not 2")

    def test_says_what_its_workers_logged(
        self, client: httpx.Client, service: Service, finished: list[dict[str, object]]
    ) -> None:
        none = client.get("/v1/studies/waves/logs")  # they logged to their standard error
        assert (none.status_code, none.json()["detail"]) == (404, "study 'waves' has no log; logs: none")
        folder = Path(service.environment["HPO_HOME"]) / "logs" / "waves"
        (folder / "worker-0.log").write_text("first\nsecond\n")
        (log,) = client.get("/v1/studies/waves/logs", params={"lines": 1}).json()
        assert (log["path"], log["text"].strip()) == (str(folder / "worker-0.log"), "second")

    def test_repeated_is_the_same_and_changed_a_conflict(
        self, client: httpx.Client, key: str, task: Callable[..., str], finished: list[dict[str, object]]
    ) -> None:
        assert client.post("/v1/studies", content=task("waves", key)).status_code == 200
        changed = client.post("/v1/studies", content=task("waves", key).replace("epochs = 2", "epochs = 3"))
        assert changed.status_code == 409
        assert "train.epochs: stored 2, file 3" in changed.json()["detail"]

    def test_an_idempotency_key_means_one_submission(
        self, client: httpx.Client, key: str, task: Callable[..., str]
    ) -> None:
        headers = {"Idempotency-Key": "once"}
        first = client.post("/v1/studies", content=task("once", key), headers=headers)
        again = client.post("/v1/studies", content=task("once", key), headers=headers)
        other = client.post("/v1/studies", content=task("another", key), headers=headers)
        assert [first.status_code, again.status_code, other.status_code] == [201, 200, 409]
        assert "was used for another submission, of the study 'once'" in other.json()["detail"]
        assert client.get("/v1/studies/another").status_code == 404

    def test_as_json_and_named_by_its_data(self, client: httpx.Client, waves: Path) -> None:
        with waves.open("rb") as file:
            key = client.post("/v1/data", files={"file": ("tides.npz", file)}).json()["key"]
        answer = client.post("/v1/studies", json={"data": {"train": key}, "study": {"trials": 1}})
        assert (answer.status_code, answer.json()["name"]) == (201, "tides")

    @pytest.mark.parametrize(
        ("content", "status", "expected"),
        [
            (b"[study", 400, "the study file is not valid TOML"),
            (b"", 422, "a study needs [data] train, a key that POST /v1/data gave"),
            (b'data = {train = "/etc/passwd"}', 422, "data.train must be a key that POST /v1/data gave"),
            (b'data = {train = "upload-' + 64 * b"0" + b'-a.npz"}', 422, "data.train must be a key that POST"),
            (b"\xff", 400, "the study file is not valid TOML"),
        ],
    )
    def test_that_is_none_is_refused(self, client: httpx.Client, content: bytes, status: int, expected: str) -> None:
        answer = client.post("/v1/studies", content=content, headers={"Content-Type": "application/toml"})
        assert (answer.status_code, answer.json()["detail"][: len(expected)]) == (status, expected)

    def test_with_an_unknown_entry_is_refused(self, client: httpx.Client, key: str) -> None:
        answer = client.post("/v1/studies", json={"data": {"train": key}, "space": {"hidden": 3}})
        assert answer.status_code == 422
        assert "hidden" in answer.json()["detail"]
        nan = client.post("/v1/studies", content='{"a": NaN}', headers={"Content-Type": "application/json"})
        assert (nan.status_code, nan.json()["detail"]) == (
            400,
            "the study file is not valid JSON: NaN is no number in JSON",
        )
        assert client.post("/v1/studies", content="a", headers={"Content-Type": "image/png"}).status_code == 415


class TestOwner:
    def test_others_may_look_and_not_touch(
        self, client: httpx.Client, service: Service, key: str, task: Callable[..., str]
    ) -> None:
        client.post("/v1/studies", content=task("mine", key))
        with service.client(owner="bob") as bob:
            assert bob.get("/v1/studies/mine").status_code == 200
            for method, path in (("POST", "stop"), ("POST", "resume"), ("POST", "promote"), ("DELETE", "")):
                answer = bob.request(method, f"/v1/studies/mine/{path}".rstrip("/"))
                assert answer.status_code == 403
                assert answer.json()["detail"] == "study 'mine' is ada's: only its owner or an admin may do this"
            clash = bob.post("/v1/studies", content=task("mine", key))
            assert clash.status_code == 409
            assert "a study named 'mine' is there already and is ada's; choose another" in clash.json()["detail"]
        assert client.post("/v1/studies/mine/stop").json()["status"] == "stopped"
        assert client.post("/v1/studies/mine/resume", json={"trials": 5}).json()["budget"] == 5
        with service.client("admin", "root") as admin:
            assert admin.delete("/v1/studies/mine").status_code == 204
        assert client.get("/v1/studies/mine").status_code == 404


class TestModel:
    def test_comes_home_and_predicts_alike(
        self, client: httpx.Client, finished: list[dict[str, object]], waves: Path, tmp_path: Path
    ) -> None:
        found = client.get("/v1/models/waves/latest").json()
        assert (found["version"], found["study"], found["aliases"]) == (1, "waves", ["latest"])
        assert 0 <= found["scores"]["test"]["auroc"] <= 1
        archive = client.get("/v1/models/waves/1/bundle")
        zipfile.ZipFile(io.BytesIO(archive.content)).extractall(tmp_path)
        model = load(tmp_path / "waves")
        with waves.open("rb") as file:
            answer = client.post("/v1/models/waves/latest/predict", files={"file": ("waves.npz", file)}).json()
        expected = model.predict(read(waves))
        np.testing.assert_allclose(answer["probabilities"], expected.probabilities, atol=1e-6)
        assert answer["labels"] == expected.labels.tolist()
        X = np.load(waves)["X"]
        few = client.post("/v1/models/waves/1/predict", json={"sequences": X[:3].tolist()}).json()
        np.testing.assert_allclose(few["probabilities"], expected.probabilities[:3], atol=1e-6)
        assert client.get("/v1/models/waves/1/card").text.startswith("# waves")

    @pytest.mark.parametrize(
        "body",
        ["{", "[]", '{"sequences": 3}', '{"sequences": []}', '{"sequences": [[["a"]]]}', '{"sequences": [[[1, 2]]]}',
         '{"sequences": [[]]}', '{"sequences": [[[1], [1, 2]]]}', '{"sequences": [[[1e400]]]}'],
    )  # fmt: skip
    def test_predicts_nothing_of_nonsense(
        self, client: httpx.Client, finished: list[dict[str, object]], body: str
    ) -> None:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/models/waves/latest/predict", content=body, headers=headers)
        assert answer.status_code in (400, 422)
        assert answer.headers["content-type"] == "application/problem+json"

    def test_an_alias_is_another_version_at_once(
        self, client: httpx.Client, service: Service, finished: list[dict[str, object]]
    ) -> None:
        second = client.post("/v1/studies/waves/promote", params={"trial": 0})
        third = client.post("/v1/studies/waves/promote", params={"trial": 1})
        versions = {second.json()["version"], third.json()["version"]}
        assert versions == {1, 2}
        for version in (2, 1):
            assert client.put("/v1/models/waves/aliases/production", json={"version": version}).status_code == 200
            body = {"sequences": [[[0.1], [0.2]]]}
            assert client.post("/v1/models/waves/production/predict", json=body).json()["version"] == version
        with service.client(owner="bob") as bob:
            assert bob.put("/v1/models/waves/aliases/production", json={"version": 1}).status_code == 403
            assert bob.delete("/v1/models/waves/2").status_code == 403
        named = client.delete("/v1/models/waves/1")
        assert (named.status_code, "is what production names" in named.json()["detail"]) == (409, True)
        assert client.delete("/v1/models/waves/2").status_code == 204
        assert client.delete("/v1/models/waves/aliases/production").status_code == 204
        assert client.get("/v1/models/waves/production").status_code == 404
        assert client.get("/v1/models/waves/2").status_code == 404
        assert client.get("/v1/models/nobody/1").status_code == 404


def test_every_write_is_in_the_audit_and_no_secret_is(
    client: httpx.Client, service: Service, finished: list[dict[str, object]]
) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-P", "-m", "hpo", "audit", "waves", "--json"]
    done = subprocess.run(command, env=service.environment, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found[-1]["action"] == "study.submit"
    assert found[-1]["owner"] == "ada"
    token = client.headers["Authorization"].split("_", 2)[2]
    assert token not in done.stdout
