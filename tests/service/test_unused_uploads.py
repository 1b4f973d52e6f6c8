"""Data files that nobody uses have an end; studies keep their data, and who still needs a file sends it again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import hpo
from hpo.service.backend import Backend, Limits
from hpo.storage.artifacts import FolderStore
from hpo.storage.keys import UPLOADS
from tests.conftest import fresh_database, wait_for
from tests.service.conftest import Service, environment_of, serving, upload
from tests.service.processes import files_below

pytestmark = pytest.mark.xdist_group("service-unused")

KEEP_S = 4.0
LONG_AGO = time.time() - 30 * 86400


@pytest.fixture(scope="module")
def forgetful(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of two processes that keeps data files for seconds; requests go to the first one."""
    folder = tmp_path_factory.mktemp("forgetful")
    options = ("--keep-uploads", f"{KEEP_S:g}s")
    with fresh_database(server, template) as url:
        environment = environment_of(folder, url)
        with serving(environment, *options) as address, serving(environment, *options):
            yield Service(address, url, environment)


def test_a_study_outlives_its_upload_which_is_sent_again_where_it_is_needed(
    forgetful: Service, waves: Path, task: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "waves.npz").write_bytes(waves.read_bytes())
    (tmp_path / "waves.toml").write_text(task("waves", "waves.npz"))
    artifacts, home = Path(forgetful.environment["HPO_ARTIFACTS"]), Path(forgetful.environment["HPO_HOME"])
    with forgetful.client() as client, hpo.connect(forgetful.url, forgetful.token()) as ours:
        wait_for(lambda: client.post("/v1/studies", content=task("waves", upload(client, waves))).is_success)
        key = upload(client, waves)
        wait_for(lambda: key not in files_below(artifacts))
        wait_for(lambda: not files_below(home / "uploads"))
        assert client.get(f"/v1/data/{key}").status_code == 404
        late = client.post("/v1/studies", content=task("waves", key))
        assert late.status_code == 422
        assert "--keep-uploads of the service) is removed: send it again" in late.json()["detail"]
        assert ours.submit(tmp_path / "waves.toml").name == "waves"  # the same study
        forgetful.work("waves")
        assert client.get("/v1/studies/waves").json()["trials"]["complete"] == 2
        wait_for(lambda: not any(name.startswith(UPLOADS) for name in files_below(artifacts)))


@pytest.mark.parametrize("use", ["sent", "asked for", "looked for", "submitted"])
def test_a_file_that_is_used_stays(service: Service, waves: Path, task: Callable[..., str], use: str) -> None:
    with service.client() as client:
        key = upload(client, waves)
        stored = Path(service.environment["HPO_ARTIFACTS"]) / key
        os.utime(stored, (LONG_AGO, LONG_AGO))
        asks: dict[str, Callable[[], httpx.Response]] = {
            "sent": lambda: client.post("/v1/data", files={"file": ("waves.npz", waves.read_bytes())}),
            "asked for": lambda: client.get(f"/v1/data/{key}"),
            "looked for": lambda: client.get("/v1/data", params={"sha256": key.split("-")[1]}),
            "submitted": lambda: client.post("/v1/studies", content=task("kept", key)),
        }
        assert asks[use]().is_success
        assert stored.stat().st_mtime > LONG_AGO + 86400


def test_several_processes_remove_only_what_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    store = FolderStore(tmp_path / "artifacts")
    copies = tmp_path / "home" / "uploads"
    copies.mkdir(parents=True)
    unused = [f"upload-{i:064x}-a.csv" for i in range(50)]
    others = [f"data-{1:064x}.safetensors", "weights-1-2-3.safetensors", "model-1-2-x"]
    for key in (*unused, *others, "upload-used-a.csv"):
        store.put(key, b"x")
        os.utime(store.folder / key, (LONG_AGO, LONG_AGO))
    for name in (unused[0], "upload-used-a.csv"):
        (copies / name).write_bytes(b"x")
    os.utime(copies / unused[0], (LONG_AGO, LONG_AGO))
    assert store.renew("upload-used-a.csv")
    several = [Backend("postgresql://nowhere", store, Limits(keep_s=86400)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Backend.remove_unused, several))
    assert store.keys() == sorted([*others, "upload-used-a.csv"])
    assert files_below(copies) == {"upload-used-a.csv"}
