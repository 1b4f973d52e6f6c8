"""The build, the console script, and the set-up that `make demo` and `make test` do on their own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hpo", "models", "storage")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"torch", "sklearn", "onnx", "onnxruntime", "pyarrow", "boto3", "optuna_dashboard", "ray"}
the_wheel = pytest.mark.xdist_group("wheel")  # tests that share one
a_ready_checkout = pytest.mark.xdist_group("ready")  # tests that share one
COMMANDS = ("launch", "worker", "status", "stop", "delete", "dashboard", "promote", "models", "export", "predict")

# A build backend of a few lines: the set-up is tried without a network and without the real, large packages.
BACKEND = """
import zipfile
from pathlib import Path

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "stub-1-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, name), "w") as wheel:
        wheel.writestr("stub.py", "")
        wheel.writestr("stub-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: stub\\nVersion: 1\\n"
                       "Requires-Dist: torch>=2.11,<2.14\\n")
        wheel.writestr("stub-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("stub-1.dist-info/RECORD", "")
    return name
"""
STUB = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "stub"
version = "1"
dependencies = [
    "torch>=2.11,<2.14",
]
"""


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


# The build


def _installed_name(path: Path) -> str:
    """The name of a source file's folder, or of a file, as it is installed: models/ and storage/ lie below hpo/."""
    return path.as_posix() if path.parts[0] == "hpo" else f"hpo/{path.as_posix()}"


def _sources(root: Path) -> list[Path]:
    """What the packages hold, relative to the root; the links hpo/models and hpo/storage are not followed."""
    found = (path for name in FOLDERS for path in (root / name).rglob("*") if path.is_file())
    return [path.relative_to(root) for path in found if "__pycache__" not in path.parts]


def _examples(root: Path) -> list[Path]:
    """What `hpo demo` needs, relative to the root: study files, data, their licence and where they come from."""
    found = [*(root / "examples").glob("*.toml"), *(root / "examples/data").iterdir()]
    return [path.relative_to(root) for path in found]


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    folders = {_installed_name(path.parent) for path in _sources(ROOT) if path.name == "__init__.py"}
    folders |= {_installed_name(path.parent) for path in _examples(ROOT)}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {folder.replace("/", ".") for folder in folders}


def _copy_sources(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", folder / "examples")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    _copy_sources(folder / "source")
    build = ("pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    built = run(sys.executable, "-m", *build, folder / "source")
    assert built.returncode == 0, built.stderr
    return next(folder.glob("hpo-*.whl"))


@the_wheel
def test_a_wheel_holds_every_source_file_the_type_mark_and_the_licence_in_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert licences
    examples = {_installed_name(path) for path in _examples(ROOT)}
    assert {f"hpo/examples/data/{name}" for name in ("LICENSE-aeon.txt", "ATTRIBUTION.md")} < examples
    assert inside == {_installed_name(path) for path in _sources(ROOT)} | examples


# A user's script in a folder of its own; it needs no `__main__` guard.
SCRIPT = """
import sys
import hpo

assert hpo.__file__.startswith(sys.prefix), hpo.__file__
quick = ["study.trials=2", "train.epochs=2", "space.hidden_size=8"]
summary = hpo.launch("waves.npz", workers=1, overrides=quick)
predictions = hpo.load(summary["model"]["path"]).predict(hpo.read("waves.npz"))
print(sum(summary["trials"].values()), *sorted(set(predictions.classes)))
"""


@the_wheel
def test_from_a_wheel_launch_load_and_predict_work_beside_a_users_own_models_and_storage(
    wheel: Path, data: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    # The packages that we depend on are those of this environment; a folder in a .pth file lends only its packages.
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    folder = tmp_path / "script"
    (folder / "models").mkdir(parents=True)
    for name in ("models/__init__.py", "storage.py"):
        (folder / name).write_text("raise SystemExit('the wrong module')\n")
    (folder / "script.py").write_text(SCRIPT)
    data.rename(folder / data.name)
    done = run(python, "script.py", cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 fast slow"


@the_wheel
def test_from_a_wheel_the_demo_runs_in_an_empty_folder_with_an_empty_home(
    wheel: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The embedded server is left out: the database is the test's own."""
    target, folder, home = tmp_path / "target", tmp_path / "empty", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    installed = run(*pip)
    assert installed.returncode == 0, installed.stderr
    given = environment | {"PYTHONPATH": str(target), "HOME": str(home), "HPO_HOME": str(home / "hpo")}
    done = run(sys.executable, "-P", "-m", "hpo", "demo", "--trials", "2", "--workers", "1", cwd=folder, env=given)
    assert done.returncode == 0, done.stderr
    assert "test AUROC" in done.stdout
    assert "target/hpo/examples/vowels.toml" in done.stdout
    assert list(folder.iterdir()) == []


def test_every_imported_package_is_a_declared_dependency() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    declared = PYPROJECT["project"]["dependencies"] + optional
    names = {_canonical(re.split(r"[<>=!;\[ ]", line)[0]) for line in declared}
    owners = packages_distributions()
    for module, path in sorted(_imports()):
        given = {_canonical(name) for name in owners.get(module, [module])}
        assert given & names, f"{path} imports {module}, which pyproject.toml does not name"


def _imports() -> set[tuple[str, str]]:
    """(top-level module, importing file) of all imports that are neither ours nor Python's own."""
    found = set()
    for path in (ROOT / source for source in _sources(ROOT) if source.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            found |= {(module.split(".")[0], str(path.relative_to(ROOT))) for module in modules}
    return {item for item in found if item[0] not in {"hpo", *sys.stdlib_module_names, "_typeshed"}}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# The console script


def test_the_console_script_and_the_module_are_the_same_program(tmp_path: Path) -> None:
    assert PYPROJECT["project"]["scripts"] == {"hpo": "hpo.__main__:main"}
    by_script = run(Path(sys.executable).with_name("hpo"), "--help", cwd=tmp_path)
    by_module = run(sys.executable, "-P", "-m", "hpo", "--help", cwd=tmp_path)
    assert by_script.returncode == by_module.returncode == 0
    commands = by_script.stdout.partition("Commands")[2]
    assert commands == by_module.stdout.partition("Commands")[2]
    assert all(command in commands for command in COMMANDS)


def test_the_users_own_folders_named_like_ours_are_left_alone(tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    for command in (
        (Path(sys.executable).with_name("hpo"),),
        (sys.executable, "-P", "-m", "hpo"),
    ):
        shown = run(*command, "--help", cwd=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, "")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda c: " ".join(c) or "hpo")
def test_help_imports_no_heavy_package(command: tuple[str, ...]) -> None:
    shown = run(sys.executable, "-X", "importtime", "-P", "-m", "hpo", *command, "--help")
    assert shown.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & HEAVY


def test_the_version_is_printed_on_request() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "hpo", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"hpo {PYPROJECT['project']['version']}\n")


def test_the_installed_version_is_the_one_in_pyproject() -> None:
    assert distribution("hpo").version == PYPROJECT["project"]["version"]


# Set-up


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pip's only source: the stub's torch in several builds."""
    folder = tmp_path_factory.mktemp("sources")
    for version in ("2.10.0+cpu", "2.12.0", "2.12.0+cpu", "2.13.0", "2.14.0+cpu"):
        offer_torch(folder, version)
    return folder


@pytest.fixture(scope="module")
def plain(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source without CPU builds, as PyPI is one for Linux on x86-64."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(sources, folder, ignore=shutil.ignore_patterns("*+cpu*"), dirs_exist_ok=True)
    return folder


def offer_torch(folder: Path, version: str) -> None:
    """A wheel of a torch that says what it is built for where the real one says it."""
    cuda = None if version.endswith("+cpu") else "13.0"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        info = f"torch-{version}.dist-info"
        wheel.writestr("torch/__init__.py", "from torch.version import __version__\n")
        facts = f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
        wheel.writestr("torch/version.py", f"{facts}hip: Optional[str] = None\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a stub project, in a folder with a space, with our set-up script."""
    return stub_checkout(tmp_path / "a checkout")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    """A checkout that is set up; tests leave it so."""
    folder = stub_checkout(tmp_path_factory.mktemp("ready") / "checkout")
    done = set_up(folder, sources)
    assert done.returncode == 0, done.stderr
    return folder


def stub_checkout(folder: Path) -> Path:
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/setup.sh", folder / "tools")
    (folder / "pyproject.toml").write_text(STUB)
    (folder / "backend.py").write_text(BACKEND)
    return folder


def set_up(checkout: Path, sources: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up with an empty home, no terminal and no index but `sources`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    own = {
        "HOME": str(checkout.parent / "home"),
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(sources),
        "PIP_NO_CACHE_DIR": "1",
        "CI": "true",
    }
    return run("sh", "tools/setup.sh", cwd=checkout, env=kept | own | settings)


def torch_in(checkout: Path) -> str:
    shown = run(checkout / ".venv/bin/python", "-c", "import torch; print(torch.__version__)", cwd=checkout)
    return shown.stdout.strip()


def test_a_failed_set_up_says_why_and_the_next_one_repairs_it(checkout: Path, sources: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    failed = set_up(checkout, empty)
    assert failed.returncode != 0
    assert "No matching distribution found for torch" in failed.stderr
    assert "pip could not install the packages" in failed.stderr
    (checkout / ".venv/half-made").touch()
    repaired = set_up(checkout, sources)
    assert repaired.returncode == 0, repaired.stderr
    assert not (checkout / ".venv/half-made").exists()
    assert torch_in(checkout)


@a_ready_checkout
def test_set_up_is_done_again_only_when_pyproject_changes(ready: Path) -> None:
    again = set_up(ready, Path("/nowhere"))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    before = torch_in(ready)
    (ready / "pyproject.toml").write_text(STUB + "# changed\n")
    changed = set_up(ready, Path("/nowhere"))
    assert changed.stdout.startswith("setup: installing")
    assert torch_in(ready) == before


@a_ready_checkout
def test_the_build_of_torch_follows_the_machine_and_what_the_sources_offer(
    ready: Path, sources: Path, plain: Path
) -> None:
    for wanted, offered, version in (
        ("cpu", sources, "2.12.0+cpu"),  # 2.13.0 is newer and not a CPU build, 2.14.0 is out of range
        ("cuda", sources, "2.13.0"),
        ("cpu", plain, "2.13.0"),
    ):
        run(ready / ".venv/bin/python", "-m", "pip", "uninstall", "-y", "torch", cwd=ready)
        (ready / ".venv/.ready-core").unlink()
        done = set_up(ready, offered, HPO_TORCH=wanted)
        assert done.returncode == 0, done.stderr
        assert torch_in(ready) == version


@a_ready_checkout
def test_another_build_of_torch_replaces_the_one_that_is_there_only_when_asked_for(
    ready: Path, sources: Path, plain: Path, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    newer.mkdir()
    offer_torch(newer, "2.13.0+cu126")
    for wanted, offered, version in (
        ("cpu", sources, "2.12.0+cpu"),
        ("cuda", sources, "2.13.0"),
        ("cpu", sources, "2.12.0+cpu"),
        ("cuda", plain, "2.13.0"),  # no source of CPU builds is needed for that
        ("cpu", sources, "2.12.0+cpu"),
        ("cuda", newer, "2.13.0+cu126"),
    ):
        done = set_up(ready, offered, HPO_TORCH=wanted)
        assert done.returncode == 0, done.stderr
        assert torch_in(ready) == version
        for settings in ({}, {"HPO_TORCH": wanted}):
            again = set_up(ready, sources, **settings)
            assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert torch_in(ready) == "2.13.0+cu126"


@a_ready_checkout
def test_where_no_source_has_the_build_that_is_asked_for_the_other_one_stays_and_the_way_out_is_named(
    ready: Path, sources: Path, plain: Path
) -> None:
    set_up(ready, sources, HPO_TORCH="cuda")
    before = torch_in(ready)
    assert "+cpu" not in before
    kept = set_up(ready, plain, HPO_TORCH="cpu")
    assert kept.returncode == 0
    assert "pip's sources offer no cpu build of torch>=2.11,<2.14, so the cuda build in .venv stays" in kept.stderr
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in kept.stderr
    assert torch_in(ready) == before


@a_ready_checkout
def test_another_kind_of_torch_is_an_error_with_the_rule_and_the_value(ready: Path, sources: Path) -> None:
    failed = set_up(ready, sources, HPO_TORCH="gpu")
    assert failed.returncode == 1
    assert "HPO_TORCH must be cpu or cuda, got 'gpu'" in failed.stderr


@a_ready_checkout
def test_an_interrupted_broken_or_moved_environment_is_not_used(ready: Path) -> None:
    def used(checkout: Path) -> bool:
        """Without a Python to make another environment with, a set-up that needs one fails."""
        return set_up(checkout, Path("/nowhere"), PYTHON="/nowhere/python3").returncode == 0

    venv = ready / ".venv"
    assert used(ready)
    (venv / ".unfinished").touch()
    assert not used(ready)
    (venv / ".unfinished").unlink()
    python = (venv / "bin/python").rename(venv / "bin/gone")
    assert not used(ready)
    python.rename(venv / "bin/python")
    moved = ready.rename(ready.with_name("moved"))
    assert not used(moved)
    moved.rename(ready)
    assert used(ready)


def test_a_missing_python_is_named_with_what_was_tried(checkout: Path, sources: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "dirname", "tail", "head", "cat", "cmp"):
        (programs / name).symlink_to(str(shutil.which(name)))
    shim = programs / "python3.13"
    shim.write_text("#!/bin/sh\necho 'python3.13: command not found here' >&2\nexit 127\n")
    shim.chmod(0o755)
    old = programs / "python3"
    old.write_text("#!/bin/sh\necho 'is Python 3.9' >&2\nexit 1\n")
    old.chmod(0o755)
    failed = set_up(checkout, sources, PATH=str(programs), PYTHON="")
    assert failed.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 with its venv module is missing" in failed.stderr
    for line in (
        "python3: is Python 3.9",
        "python3.13: python3.13: command not found here",
        "python3.12: not found",
    ):
        assert line in failed.stderr
    assert not (checkout / ".venv").exists()


def test_continuous_integration_runs_make_test_and_nothing_else(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$PWD: make $* CI=$CI"\n')
    make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = run(ROOT / ".ci/run", cwd=tmp_path, env={**os.environ, "PATH": path})
    assert ran.stdout == f"{ROOT}: make test CI=true\n"


@pytest.mark.parametrize(("target", "tests"), [("check", "loadgroup tests/unit"), ("test", "loadgroup")])
def test_make_checks_format_lint_types_and_layers_and_runs_the_tests(target: str, tests: str) -> None:
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "TESTS")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    planned = [line.strip() for line in run("make", "-n", target, env=env).stdout.splitlines()]
    steps = (
        "tools/setup.sh dev",
        "ruff format --check .",
        "ruff check .",
        "mypy",
        "lint-imports --no-cache --no-logo",
        tests,
    )
    assert [step for line in planned for step in steps if line.endswith(step)] == list(steps)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    (block,) = re.findall(r"```\n(hpo/ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shown = {line.split()[0] for line in block.splitlines()}
    assert all((ROOT / name).exists() for name in shown)
    made = {"build", "dist", "hpo.egg-info"}
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name not in made}
    assert {name for name in shown if name.endswith("/")} == {name for name in folders if name[0] not in "._"}
