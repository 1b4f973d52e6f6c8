"""The artifact store: a folder or an S3-style bucket, through Optuna's own store classes.

Keys are flat (see keys.py). What is stored under a key appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from optuna.artifacts.exceptions import ArtifactNotFound

from hpo.errors import StudyFault
from hpo.storage.files import part_file, remove_old_parts
from hpo.storage.home import own_folder
from hpo.storage.keys import KEY, content_hash, described

if TYPE_CHECKING:
    from typing import Protocol

    class _Backend(Protocol):  # Optuna's artifact store protocol
        def open_reader(self, artifact_id: str) -> BinaryIO: ...
        def write(self, artifact_id: str, content_body: BinaryIO) -> None: ...
        def remove(self, artifact_id: str) -> None: ...


_S3_ATTEMPTS = 6
_CHECK_S = 2.0  # that the question may take whether a bucket is there
_PART_LIFE_S = 24 * 3600.0  # an earlier version's part file older than this was left by a process that died
_BLOCK = 2**20  # bytes read at once
_UNREADABLE = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))  # what is stored, not who may read it


class ArtifactError(StudyFault):
    """The artifact store could not be opened, read or written."""


class MissingArtifactError(ArtifactError, ArtifactNotFound):
    """There is nothing under this key. Also Optuna's own `ArtifactNotFound`."""


class DamagedArtifactError(ArtifactError):
    """What is stored under the key cannot be read, or is not what the key says."""


class ArtifactStore:
    """What both stores share; `open_reader`, `write` and `remove` are Optuna's artifact store protocol.

    Whatever is read under a key with a SHA-256 is compared with it: DamagedArtifactError at the end of another content.
    """

    url: str

    @property
    def place(self) -> str:
        """Where it is, and the setting that says so."""
        given = os.environ.get("HPO_ARTIFACTS")
        return f"{self.url} ({'by HPO_ARTIFACTS' if given else 'the default, as HPO_ARTIFACTS is not set'})"

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A binary reader of the whole artifact; MissingArtifactError where there is none."""
        source = self._open(artifact_id)
        expected = content_hash(artifact_id)
        return source if expected is None else cast(BinaryIO, _CheckedReader(source, expected, artifact_id, self.place))

    def _open(self, key: str) -> BinaryIO:
        """The stored bytes as they are."""
        raise NotImplementedError

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store everything that `content_body` gives from its position on; replaces what was there."""
        raise NotImplementedError

    def remove(self, artifact_id: str) -> None:
        """Delete one artifact; MissingArtifactError where the store can tell that there was none."""
        raise NotImplementedError

    def exists(self, key: str) -> bool:
        """Whether there is something under the key."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ArtifactError where the store is away. It is soon known."""
        raise NotImplementedError

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        raise NotImplementedError

    def ages(self, prefix: str = "") -> dict[str, float]:
        """Seconds since each artifact whose key begins with `prefix` was stored, or renewed."""
        raise NotImplementedError

    def renew(self, key: str) -> bool:
        """Let an artifact be as old as if it had been stored now; False where there is none."""
        raise NotImplementedError

    def holds(self, key: str) -> bool:
        """Whether there is something under the key, with the content that the key names. It is read for that."""
        if content_hash(key) is None:
            return self.exists(key)
        try:
            for _ in self._blocks(key):
                pass
        except (MissingArtifactError, DamagedArtifactError):
            return False
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's bytes, under a key."""
        with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as source:
            self.write(key, source)

    def get(self, key: str) -> bytes:
        """An artifact's bytes; MissingArtifactError where there is none."""
        return b"".join(self._blocks(key))

    def fetch(self, key: str, path: Path) -> None:
        """Copy an artifact to `path`, whole or not at all; the folder of `path` must exist."""
        with _whole(path) as part, part.open("xb") as target:
            for block in self._blocks(key):
                target.write(block)

    def delete(self, key: str) -> None:
        """Delete one artifact; a missing one is fine."""
        with suppress(MissingArtifactError):
            self.remove(key)

    def _missing(self, key: str) -> MissingArtifactError:
        return MissingArtifactError(
            f"{described(key)} is not in {self.place}; set HPO_ARTIFACTS to the store that it was written to "
            f"(no artifact {key!r})"
        )

    def _blocks(self, key: str) -> Iterator[bytes]:
        """An artifact's bytes in blocks; a reader that breaks off is an error, not a short artifact."""
        with self.open_reader(key) as source:
            try:
                while block := source.read(_BLOCK):
                    yield block
            except ArtifactError:
                raise
            except OSError as error:
                kind = DamagedArtifactError if error.errno in _UNREADABLE else ArtifactError
                raise kind(f"{described(key)}: reading {key!r} from {self.place} broke off: {error}") from error
            except Exception as error:
                text = f"{described(key)}: reading {key!r} from {self.place} broke off: {error}"
                raise ArtifactError(text) from error


class _CheckedReader(io.RawIOBase):
    """A reader that compares all that it has read with a SHA-256 when it comes to the end."""

    def __init__(self, source: BinaryIO, expected: str, key: str, place: str) -> None:
        self._source, self._expected, self._key, self._place = source, expected, key, place
        self._hash, self._size = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises DamagedArtifactError at the end of another content."""
        block = self._source.read(len(buffer))
        if not block and self._hash.hexdigest() != self._expected:
            raise DamagedArtifactError(
                f"{described(self._key)} is damaged in {self._place}: "
                f"artifact {self._key} does not have the content that its name says, in {self._size} bytes"
            )
        buffer[: len(block)] = block
        self._hash.update(block)
        self._size += len(block)
        return len(block)

    def close(self) -> None:
        self._source.close()
        super().close()


class FolderStore(ArtifactStore):
    """Artifacts as files of one folder (local, or shared between the workers' machines)."""

    def __init__(self, folder: Path) -> None:
        from optuna.artifacts import FileSystemArtifactStore

        self.folder = folder.absolute()
        self.url = str(self.folder)
        self._make_folder()
        self._files: _Backend = FileSystemArtifactStore(self.folder)
        remove_old_parts(self.folder, _PART_LIFE_S)

    def _open(self, key: str) -> BinaryIO:
        try:
            return self._files.open_reader(_checked(key))
        except ArtifactNotFound:
            raise self._missing(key) from None
        except OSError as error:
            kind = DamagedArtifactError if error.errno in _UNREADABLE else ArtifactError
            raise kind(f"{described(key)}: cannot read {key!r} in {self.place}: {error.strerror}") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        # Optuna's store copies straight to the name that it is given: give it the part's.
        self._make_folder()
        with _whole(self.folder / _checked(artifact_id)) as part:
            self._files.write(part.name, content_body)

    def remove(self, artifact_id: str) -> None:
        try:
            self._files.remove(_checked(artifact_id))
        except ArtifactNotFound:
            raise self._missing(artifact_id) from None
        except OSError as error:
            raise ArtifactError(f"cannot delete {artifact_id!r} in {self.place}: {error.strerror}") from error

    def exists(self, key: str) -> bool:
        return (self.folder / _checked(key)).is_file()

    def check(self) -> None:
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise ArtifactError(f"the artifact folder {self.place} is not there, or not ours to write to")

    def keys(self, prefix: str = "") -> list[str]:
        self._make_folder()
        with os.scandir(self.folder) as entries:
            return sorted(
                e.name for e in entries if e.name.startswith(prefix) and KEY.fullmatch(e.name) and e.is_file()
            )

    def ages(self, prefix: str = "") -> dict[str, float]:
        now, found = time.time(), {}
        for key in self.keys(prefix):
            with suppress(OSError):  # deleted since
                found[key] = max(0.0, now - (self.folder / key).stat().st_mtime)
        return found

    def renew(self, key: str) -> bool:
        try:
            os.utime(self.folder / _checked(key))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ArtifactError(f"cannot renew {key!r} in {self.place}: {error.strerror}") from error
        return True

    def _make_folder(self) -> None:
        """Also again, where somebody removed it while we run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            rule = "set HPO_ARTIFACTS to a folder that can be made, or to s3://bucket/prefix"
            raise ArtifactError(f"artifact folder {self.folder} cannot be made: {error.strerror}; {rule}") from error


class BucketStore(ArtifactStore):
    """Artifacts as objects of an S3-style bucket; credentials and AWS_ENDPOINT_URL from the environment."""

    def __init__(self, bucket: str, prefix: str) -> None:
        try:
            import boto3
        except ImportError as error:
            raise ArtifactError("s3:// needs boto3; install it with: pip install 'hpo[s3]'") from error
        from optuna.artifacts import Boto3ArtifactStore

        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = boto3.client("s3", config=_s3_config(), endpoint_url=_s3_endpoint())
        self._objects: _Backend = Boto3ArtifactStore(bucket, client=self._client, avoid_buf_copy=True)

    def _open(self, key: str) -> BinaryIO:
        with self._calling(key):
            return self._objects.open_reader(self._name(key))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with self._calling(artifact_id):  # an object appears when its upload is complete, never in parts
            self._objects.write(self._name(artifact_id), content_body)

    def remove(self, artifact_id: str) -> None:
        with self._calling(artifact_id):
            self._objects.remove(self._name(artifact_id))

    def exists(self, key: str) -> bool:
        try:
            with self._calling(key):
                self._client.head_object(Bucket=self.bucket, Key=self._name(key))
        except MissingArtifactError:
            return False
        return True

    def check(self) -> None:
        try:
            with self._calling("the bucket"):
                self._impatient.head_bucket(Bucket=self.bucket)
        except MissingArtifactError:
            raise ArtifactError(f"{self.place} is not there") from None

    @cached_property
    def _impatient(self) -> Any:
        """A client that does not repeat what failed."""
        import boto3

        return boto3.client("s3", config=_s3_config(attempts=1, timeout_s=_CHECK_S), endpoint_url=_s3_endpoint())

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(self._stored(prefix))

    def ages(self, prefix: str = "") -> dict[str, float]:
        now = datetime.now(UTC)
        return {key: max(0.0, (now - stored).total_seconds()) for key, stored in self._stored(prefix).items()}

    def renew(self, key: str) -> bool:
        source = {"Bucket": self.bucket, "Key": self._name(key)}
        try:
            with self._calling(key):  # a copy to its own place, within the store
                self._client.copy_object(**source, CopySource=source, MetadataDirective="REPLACE")
        except MissingArtifactError:
            return False
        return True

    def _stored(self, prefix: str) -> dict[str, datetime]:
        """The keys that begin with `prefix`, and when each was stored."""
        with self._calling(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            entries = [entry for page in pages for entry in page.get("Contents", [])]
        found = {entry["Key"].removeprefix(self.prefix): entry["LastModified"] for entry in entries}
        return {key: stored for key, stored in found.items() if KEY.fullmatch(key)}

    def _name(self, key: str) -> str:
        return self.prefix + _checked(key)

    @contextmanager
    def _calling(self, key: str) -> Iterator[None]:
        """Turn the client's errors into ours."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ArtifactNotFound, ClientError) as error:
            code = _error_code(error)
            if code in ("NoSuchKey", "404"):
                raise self._missing(key) from None
            raise ArtifactError(
                f"{self.place} refused {key!r}: {code}; is the bucket there, and open to these credentials?"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise ArtifactError(f"{self.place} cannot be used for {key!r}: {error}") from error


def artifact_store(url: str | None = None) -> ArtifactStore:
    """The artifact store at `url`: a folder, `file://…` or `s3://bucket/prefix`.

    Without one: HPO_ARTIFACTS, else the folder `artifacts` beside the embedded database.
    Raises ArtifactError where the URL is of another kind, or the folder cannot be made.
    """
    url = url or os.environ.get("HPO_ARTIFACTS")
    if not url:
        return FolderStore(own_folder("artifacts"))
    try:
        parts = urlsplit(url) if "://" in url else None
    except ValueError as error:  # brackets that are no IPv6 address
        raise ArtifactError(f"HPO_ARTIFACTS is no folder and no URL: {error}") from None
    if parts is None:
        try:
            return FolderStore(Path(url).expanduser())
        except RuntimeError as error:  # ~ of a user who is not known, or has no home
            rule = "HPO_ARTIFACTS must name a folder or s3://bucket/prefix"
            raise ArtifactError(f"{rule}: {str(error).rstrip('.')}, got {url}") from None
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and re.fullmatch(r"[a-z0-9][a-z0-9.-]+", parts.netloc):
        return BucketStore(parts.netloc, parts.path.strip("/"))
    # Only the scheme is shown: a URL of another kind may carry a password.
    rule = "HPO_ARTIFACTS must name a folder, file:///folder or s3://bucket/prefix"
    raise ArtifactError(f"{rule}, got {parts.scheme}://…")


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ArtifactError(
            f"an artifact key is 1 to 200 of A-Z a-z 0-9 . _ - and begins with a letter or digit, got {key!r}"
        )
    return key


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """`part_file` with the failure as an ArtifactError."""
    try:
        with part_file(path) as part:
            yield part
    except OSError as error:
        raise ArtifactError(_write_failure(path, error)) from error


def _write_failure(path: Path, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free"
    except OSError:
        free = "free space unknown"
    return f"cannot write {path.name!r} in {path.parent} ({free}): {error.strerror or error}"


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _s3_config(attempts: int = _S3_ATTEMPTS, timeout_s: float = 60.0) -> Any:
    """For a store that is not Amazon's the bucket in the path and no extra checksums."""
    from botocore.config import Config

    options: dict[str, Any] = {
        "connect_timeout": min(10.0, timeout_s),
        "read_timeout": timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": attempts},
    }
    if _s3_endpoint():
        options["s3"] = {"addressing_style": "path"}
        options |= dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    return Config(**options)


def _error_code(error: BaseException) -> str:
    """The S3 error code of a client error, or of the client error behind Optuna's ArtifactNotFound."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", type(error).__name__))
