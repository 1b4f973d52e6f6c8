"""The image, built from the Dockerfile and run as Compose and Kubernetes say: where buildah and root's rights are."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.image import LACKING, WORK, Lacking, check_machine, pip_settings

ROOT = Path(__file__).resolve().parents[2]


def lacking() -> str:
    """What this machine lacks; empty where it lacks nothing."""
    try:
        check_machine()
    except Lacking as error:
        return str(error)
    return ""


LACKS = lacking()


@pytest.mark.timeout(1500)
@pytest.mark.skipif(bool(LACKS), reason=f"the image is not built: {LACKS}")
def test_the_image_is_built_and_its_roles_run_read_only_as_its_user() -> None:
    folders, mounts = set(WORK.glob("hpo-image-*")), Path("/proc/self/mounts").read_text()
    command = [sys.executable, "-m", "tools.image"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate()
        finally:
            process.terminate()  # a test that is given up ends it in good order, too
    if process.returncode == LACKING:
        pytest.skip(said.splitlines()[-1])
    assert process.returncode == 0, said
    for role in ("postgres", "serve", "pod", "launch", "dashboard"):
        assert f"\n{role}: " in said
    assert set(WORK.glob("hpo-image-*")) == folders
    assert Path("/proc/self/mounts").read_text() == mounts


def test_a_build_asks_for_packages_where_this_machine_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index, wheels = tmp_path / "index" / "simple", tmp_path / "wheels"
    index.mkdir(parents=True)
    wheels.mkdir()
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index}")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{wheels} {tmp_path / 'missing'}")
    monkeypatch.setenv("PIP_NO_BINARY", "torch")
    settings, paths = pip_settings()
    assert f"extra-index-url = file://{index}\n" in settings
    assert "no-binary" not in settings  # it does not say where from
    assert {index.parent, wheels} <= set(paths)
    assert tmp_path / "missing" not in paths


def test_a_machine_that_lacks_what_it_takes_says_so(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path)}
    tried = subprocess.run(
        [sys.executable, "-m", "tools.image"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert tried.returncode == LACKING
    assert tried.stdout.startswith(("image: it takes root on Linux", "image: buildah, mmdebstrap, "))
