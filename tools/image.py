"""Build the image without an engine, and run its roles as docker-compose.yml and examples/kubernetes say.

    sudo .venv/bin/python -m tools.image        (apt-get install buildah mmdebstrap iproute2; some minutes, 8 GB)

The base is made of Debian's packages by mmdebstrap, the image of the Dockerfile by buildah, whose chroot isolation
needs no engine; pip's sources are this machine's, and the image does not keep them. `tools/containers.py` runs the
roles. All of it lies in one folder, with mounts and processes in namespaces of their own: nothing is left at the end.

Exit status 77: this machine lacks what it takes, and the last line says what; 1: the image failed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from tools.containers import Image, end_all

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("buildah", "mmdebstrap", "unshare", "nsenter", "setpriv", "mount", "ip")
LACKING = 77
WORK = Path("/var/tmp")  # on a disk, where /tmp may be memory
PACKAGES = "python3,python3-venv,ca-certificates"  # of the base, as python:3.13-slim has them
# What says where pip finds packages.
SOURCES = (
    "index-url",
    "extra-index-url",
    "find-links",
    "constraint",
    "cert",
    "proxy",
    "trusted-host",
    "default-timeout",
)


class Lacking(Exception):
    """This machine cannot build or run the image."""


def main() -> int:
    """Build and run in a folder and in namespaces that end with this call; its exit status."""
    if sys.argv[1:]:
        build_and_run(Path(sys.argv[1]))
        return 0
    signal.signal(signal.SIGTERM, _end)
    try:
        check_machine()
    except Lacking as error:
        print(f"image: {error}")
        return LACKING
    work = Path(tempfile.mkdtemp(prefix="hpo-image-", dir=WORK))
    work.chmod(0o711)
    alone = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    inside = subprocess.Popen([*alone, sys.executable, "-m", "tools.image", str(work)], cwd=ROOT)
    try:
        return inside.wait()
    finally:
        end_all(inside)
        shutil.rmtree(work)


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def check_machine() -> None:
    """Raise Lacking where the image can be neither built nor run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Lacking("it takes root on Linux")
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise Lacking(f"{', '.join(missing)} not found: apt-get install buildah mmdebstrap iproute2")
    mount = ["unshare", "--mount", "--pid", "--fork", "--net", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    tried = subprocess.run(mount, capture_output=True)
    if tried.returncode:
        raise Lacking("this machine does not let root make namespaces and mount in them")


def build_and_run(work: Path) -> None:
    """Within the namespaces. Ends the process with LACKING where Debian's packages cannot be had."""
    for part in ("tmp", "containers"):
        (work / part).mkdir()
    try:
        base = make_base(work)
    except Lacking as error:
        print(f"image: {error}")
        raise SystemExit(LACKING) from None
    image = build(work, base)
    found = work / "image.json"
    found.write_text(json.dumps({"root": str(image.root), "config": image.config}))
    apart = ["unshare", "--net", sys.executable, "-m", "tools.containers", str(found), str(work / "containers")]
    raise SystemExit(subprocess.run(apart, cwd=ROOT).returncode)


def buildah(work: Path, *words: str, text: str | None = None) -> str:
    """What buildah prints, with images and containers below `work`. Ends the process where it fails."""
    places = ["--root", str(work / "images"), "--runroot", str(work / "run")]
    environment = {**os.environ, "TMPDIR": str(work / "tmp"), "BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(
        ["buildah", *places, *words], cwd=ROOT, env=environment, input=text, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stdout.splitlines()[-20:], done.stderr.splitlines()[-20:])
        raise SystemExit("\n".join((*last[0], *last[1], f"image: buildah {words[0]} failed")))
    return done.stdout.strip()


def make_base(work: Path) -> str:
    """The name of an image of Debian's packages, of the release of the Dockerfile's own base. Raises Lacking."""
    (release,) = re.findall(r"^ARG PYTHON_IMAGE=.+-slim-([a-z]+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    archive = work / "tmp" / "base.tar"
    made = subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", release, archive],
        env={**os.environ, "TMPDIR": str(work / "tmp")},
    )
    if made.returncode:
        raise Lacking(f"mmdebstrap could not make Debian {release} of its packages: the lines above say why")
    recipe = f"FROM scratch\nADD {archive.name} /\n"
    buildah(work, "bud", "--quiet", "--tag", "localhost/base", "--file", "-", str(archive.parent), text=recipe)
    archive.unlink()
    print(f"base: Debian {release} with {PACKAGES}", flush=True)
    return "localhost/base"


def build(work: Path, base: str) -> Image:
    """The image of the Dockerfile on that base, for CPUs, its files mounted."""
    settings, paths = pip_settings()
    file = work / "pip.conf"
    file.touch(0o600)  # an address may hold a password
    file.write_text(settings)
    volumes = [f"--volume={file}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in paths)]
    options = ["--pull-never", "--format=docker", "--tag=localhost/hpo", f"--build-arg=PYTHON_IMAGE={base}"]
    buildah(work, "bud", *options, *volumes, ".")
    container = buildah(work, "from", "--pull-never", "localhost/hpo")
    root = Path(buildah(work, "mount", container))
    config = json.loads(buildah(work, "inspect", container))["Docker"]["config"]
    print("image: built from the Dockerfile", flush=True)
    return Image(root, config)


def pip_settings() -> tuple[str, list[Path]]:
    """A pip.conf with this machine's sources of packages, and the files and folders of this machine among them."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}  # from lines as global.find-links='…', :env:.cert='…'
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:.")):  # which overrides global.…
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in SOURCES:
            found[key] = ast.literal_eval(value)
    places = [Path(place.removeprefix("file://")) for value in found.values() for place in value.split()]
    # The pages of an index lead to files beside them.
    wanted = [path.parent if path.name == "simple" else path for path in places]
    paths = [path for path in dict.fromkeys(wanted) if path.is_absolute() and path.exists()]
    lines = (f"{key} = {' '.join(value.split())}\n" for key, value in found.items())
    return "[global]\n" + "".join(lines), paths


if __name__ == "__main__":
    raise SystemExit(main())
