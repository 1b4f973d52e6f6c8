"""The artifact store keeps one contract over a folder and a real S3 server; files are whole or absent."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts.exceptions import ArtifactNotFound

from hpo.storage.artifacts import ArtifactError, ArtifactStore, FolderStore, MissingArtifactError, artifact_store


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_client(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="studies")
    return client


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    if request.param == "folder":
        yield artifact_store(str(tmp_path / "artifacts"))
        return
    client = request.getfixturevalue("s3_client")
    yield artifact_store("s3://studies/here")
    for entry in client.list_objects_v2(Bucket="studies").get("Contents", []):
        client.delete_object(Bucket="studies", Key=entry["Key"])


def test_what_was_put_comes_back(store: ArtifactStore, tmp_path: Path) -> None:
    big = os.urandom(9 * 2**20)  # more than one part of an S3 upload
    (tmp_path / "big").write_bytes(big)
    store.put("big.bin", tmp_path / "big")
    store.put("small-1_a", b"abc")
    store.put("empty", b"")
    store.fetch("big.bin", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == big
    assert [store.get(key) for key in ("small-1_a", "empty")] == [b"abc", b""]
    assert store.keys() == ["big.bin", "empty", "small-1_a"]
    assert store.keys("small") == ["small-1_a"]


def test_a_later_put_replaces_an_earlier_one(store: ArtifactStore) -> None:
    store.put("key", b"a longer content")
    store.put("key", b"short")
    assert store.get("key") == b"short"


def test_a_missing_artifact_is_named_and_is_optunas_own_error(store: ArtifactStore, tmp_path: Path) -> None:
    assert not store.exists("nothing")
    expected = (
        r"a file is not in .*(artifacts|s3://studies/here) \(.*HPO_ARTIFACTS.*\); "
        r"set HPO_ARTIFACTS to the store that it was written to \(no artifact 'nothing'\)"
    )
    for read in (store.get, store.open_reader, lambda key: store.fetch(key, tmp_path / "copy")):
        with pytest.raises(MissingArtifactError, match=expected):
            read("nothing")
    with pytest.raises(ArtifactNotFound):
        store.open_reader("nothing")
    assert list(tmp_path.glob("*copy*")) == []
    assert list(tmp_path.glob(".*")) == []


def test_a_renewed_artifact_is_as_young_as_a_new_one(store: ArtifactStore) -> None:
    for key in ("upload-1", "upload-2", "data-1"):
        store.put(key, b"x")
    assert store.ages("upload-").keys() == {"upload-1", "upload-2"}
    time.sleep(1.1)  # a bucket's times are whole seconds
    before = store.ages("upload-")
    assert store.renew("upload-2")
    after = store.ages("upload-")
    assert after["upload-1"] >= before["upload-1"] > 0.1
    assert after["upload-2"] < before["upload-2"]
    assert store.get("upload-2") == b"x"
    assert not store.renew("upload-3")
    assert store.keys() == ["data-1", "upload-1", "upload-2"]


def test_deleting_twice_is_fine(store: ArtifactStore) -> None:
    store.put("key", b"abc")
    assert store.exists("key")
    store.delete("key")
    store.delete("key")
    assert not store.exists("key")
    assert store.keys() == []


@pytest.mark.parametrize("key", ["", "../up", "a/b", "/etc/passwd", ".hidden", "a b", "ä", "a" * 201, "a\n"])
def test_a_key_outside_the_rule_is_refused(store: ArtifactStore, key: str) -> None:
    for use in (store.get, store.exists, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(ArtifactError, match="an artifact key is 1 to 200"):
            use(key)


def test_it_serves_as_an_optuna_artifact_store(store: ArtifactStore, tmp_path: Path) -> None:
    study = optuna.create_study()
    (tmp_path / "curve.png").write_bytes(b"a curve")
    key = optuna.artifacts.upload_artifact(
        artifact_store=store, file_path=str(tmp_path / "curve.png"), study_or_trial=study
    )
    target = tmp_path / "again.png"
    optuna.artifacts.download_artifact(artifact_store=store, artifact_id=key, file_path=str(target))
    assert target.read_bytes() == store.get(key) == b"a curve"


def test_two_prefixes_of_a_bucket_do_not_see_each_other(s3_client: Any) -> None:
    one, other = artifact_store("s3://studies/one"), artifact_store("s3://studies/one/deeper")
    other.put("key", b"other")
    assert not one.exists("key")
    assert one.keys() == []
    assert other.keys() == ["key"]
    other.delete("key")


def test_a_missing_bucket_says_so_and_shows_no_secret(s3_client: Any) -> None:
    store = artifact_store("s3://no-such-bucket")
    for use in (store.get, lambda key: store.put(key, b""), store.keys):
        with pytest.raises(ArtifactError, match=r"s3://no-such-bucket .*NoSuchBucket.*is the bucket there") as error:
            use("key")
        assert not isinstance(error.value, MissingArtifactError)
        assert "a-secret" not in str(error.value)


def test_an_unreachable_bucket_is_an_artifact_error(s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("hpo.storage.artifacts._S3_ATTEMPTS", 1)
    with pytest.raises(ArtifactError, match=r"s3://studies \(.*\) cannot be used"):
        artifact_store("s3://studies").get("key")


def test_a_store_that_is_there_says_so_and_one_that_is_away_does_not(store: ArtifactStore) -> None:
    store.check()
    if isinstance(store, FolderStore):
        store.folder.rename(store.folder.with_name("elsewhere"))
        with pytest.raises(ArtifactError, match=r"the artifact folder .* is not there, or not ours to write to"):
            store.check()


def test_a_bucket_that_is_away_is_soon_known(s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"s3://no-such-bucket \(.*\) is not there"):
        artifact_store("s3://no-such-bucket").check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ArtifactError, match=r"s3://studies \(.*\) cannot be used"):
        artifact_store("s3://studies").check()


def test_the_url_chooses_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = tmp_path / "a folder"
    assert artifact_store(f"file://{tmp_path}/a%20folder").url == str(spaced)
    monkeypatch.setenv("HPO_ARTIFACTS", str(spaced))
    assert artifact_store().url == str(spaced)
    monkeypatch.delenv("HPO_ARTIFACTS")
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    assert artifact_store().url == str(tmp_path / "home" / "artifacts")


def test_a_url_of_another_kind_is_refused_without_showing_its_password() -> None:
    with pytest.raises(ArtifactError, match=r"a folder, file:///folder or s3://bucket/prefix") as error:
        artifact_store("ftp://me:hunter2@host/x")
    assert "hunter2" not in str(error.value)


def test_a_home_of_a_user_who_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", "~nosuchuser/x")
    with pytest.raises(
        ArtifactError, match=r"HPO_ARTIFACTS must name a folder or s3://bucket/prefix: .* ~nosuchuser/x"
    ):
        artifact_store()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"artifact folder .*file/artifacts cannot be made"):
        artifact_store(str(tmp_path / "file" / "artifacts"))


_COPY_INPUT = """
import sys
from hpo.storage.artifacts import artifact_store
artifact_store(sys.argv[1]).write("key", sys.stdin.buffer)
"""


def test_a_writer_killed_in_the_middle_leaves_no_artifact(tmp_path: Path) -> None:
    store = artifact_store(str(tmp_path))
    store.put("key", b"before")
    with subprocess.Popen([sys.executable, "-c", _COPY_INPUT, str(tmp_path)], stdin=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        writer.stdin.write(b"x" * 2**20)
        writer.stdin.flush()
        while not any(part.stat().st_size for part in tmp_path.glob(".*.part")):
            assert writer.poll() is None
            time.sleep(0.01)
        assert store.get("key") == b"before"
        writer.kill()
    assert store.get("key") == b"before"
    assert store.keys() == ["key"]


def test_partial_files_of_dead_writers_are_swept_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".old.part", tmp_path / ".fresh.part"
    for part in (old, fresh):
        part.write_bytes(b"x")
    day_ago = time.time() - 25 * 3600
    os.utime(old, (day_ago, day_ago))
    artifact_store(str(tmp_path))
    assert not old.exists()
    assert fresh.exists()


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise ValueError("the source broke")

    store = artifact_store(str(tmp_path))
    with pytest.raises(ValueError, match="the source broke"):
        store.write("key", Broken())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_concurrent_writers_of_one_key_leave_one_whole_content(tmp_path: Path) -> None:
    store = artifact_store(str(tmp_path))
    contents = [bytes([65 + i]) * 2**19 for i in range(4)]
    threads = [threading.Thread(target=store.put, args=("key", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("key") in contents
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


_FILL_DISK = """
import os, sys
from pathlib import Path
from hpo.storage.artifacts import ArtifactError, artifact_store
folder, limit = Path(sys.argv[1]), sys.argv[2]
store = artifact_store(str(folder))
store.put("small", b"x" * 1000)
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
source = Path(sys.argv[3]).open("rb")
for write in (lambda: store.write("large", source), lambda: store.fetch("small", folder / "copy")):
    try:
        write()
    except ArtifactError as error:
        print(error)
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_is_an_error_with_folder_and_free_space_and_leaves_nothing(tmp_path: Path) -> None:
    """A real full file system where namespaces are allowed, else a limit on the size of a file."""
    folder, large = tmp_path / "full", tmp_path / "large"
    folder.mkdir()
    large.write_bytes(b"x" * 2**20)
    script = [sys.executable, "-c", _FILL_DISK, str(folder)]
    mount = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=256k none "$0" && "$@"',
    ]
    if shutil.which("unshare") and subprocess.run([*mount, str(folder), "true"], capture_output=True).returncode == 0:
        command = [*mount, str(folder), *script, "", str(large)]
    else:
        command = [*script, str(2**16), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, names = done.stdout.splitlines()
    assert f"cannot write 'large' in {folder} (" in message
    assert "MiB free)" in message
    assert "No space left" in message or "File too large" in message
    assert names == "['copy', 'small']"
