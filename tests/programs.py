"""Programs of the distribution that tests need: installed where that is possible, or the tests are skipped."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

INSTALL_S = 240


def program(package: str, *names: str) -> str:
    """The path of the first of these programs that is there; as root with apt-get the package is installed first."""
    why = "this is not root with apt-get"
    if not _found(names) and os.geteuid() == 0 and shutil.which("apt-get"):
        why = _install(package)
    return _found(names) or pytest.skip(
        f"install {package} (Debian: apt-get install {package}); it could not be done: {why}"
    )


def _found(names: tuple[str, ...]) -> str | None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def _install(package: str) -> str:
    """One attempt; why it did not work."""
    apt = ["apt-get", "-qy", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # nothing is started
    try:
        for command in (["update"], ["install", "--no-install-recommends", package]):
            subprocess.run(
                [*apt, *command], env=environment, timeout=INSTALL_S, check=True, capture_output=True, text=True
            )
    except subprocess.SubprocessError as error:  # a status, or out of time
        return f"{error}: {str(getattr(error, 'stderr', ''))[-500:]}"
    return "the package brought no program"
