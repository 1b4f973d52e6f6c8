"""docker-compose.yml and Dockerfile: valid, pinned, without default passwords; and their commands do their work."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kubernetes_validate import ValidationError, latest_version, validate
from sqlalchemy import make_url

from tools.containers import interpolated

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name in SERVICES if name != "postgres"]


def check(compose: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_file_follows_the_compose_schema(tmp_path: Path) -> None:
    checked = check(ROOT / "docker-compose.yml")
    assert checked.returncode == 0, checked.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(yaml.safe_dump(COMPOSE | {"services": {"worker": {"imagee": "hpo"}}}))
    assert check(broken).returncode == 1


def test_the_dockerfile_passes_the_linter(tmp_path: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python:latest\nUSER root\n")
    assert subprocess.run([linter, careless], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("given", "build"), [({}, "cpu"), ({"HPO_TORCH": "cpu"}, "cpu"), ({"HPO_TORCH": "cuda"}, "cuda")]
)
def test_images_are_pinned_and_ours_is_one_of_the_packages_version_and_the_wanted_build(
    given: dict[str, str], build: str
) -> None:
    assert re.fullmatch(r"postgres:\d+\.\d+-[a-z]+", SERVICES["postgres"]["image"])
    ours = [interpolated(SERVICES[name], PASSWORDS | given) for name in OURS]
    assert {service["image"] for service in ours} == {f"hpo:{version('hpo')}-{build}"}
    assert {service["build"]["args"]["TORCH"] for service in ours} == {build}
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.1[123]\.\d+-slim-[a-z]+$", dockerfile(), re.MULTILINE)


def test_passwords_come_from_the_environment_without_a_default() -> None:
    given = {
        (service, key): value
        for service, settings in SERVICES.items()
        for key, value in settings["environment"].items()
        if "PASSWORD" in key
    }
    assert {key for _, key in given} == {"POSTGRES_PASSWORD", "PGPASSWORD"}
    for value in given.values():
        assert re.fullmatch(r"\$\{HPO_[A-Z]+_PASSWORD:\?[^}]+\}", value)
    for settings in SERVICES.values():
        assert "PASSWORD" not in str([settings.get(key) for key in ("command", "entrypoint", "healthcheck")])
    with pytest.raises(ValueError, match="set HPO_DB_PASSWORD"):
        interpolated(COMPOSE, {})


def test_every_service_has_a_health_check_and_none_is_root() -> None:
    for name, settings in SERVICES.items():
        assert settings["healthcheck"]["test"][0] == "CMD", name
        assert settings["security_opt"] == ["no-new-privileges:true"], name
        assert settings.get("privileged") is None, name
    assert SERVICES["postgres"]["user"] == "postgres"
    users = re.findall(r"^USER (.+)$", dockerfile(), re.MULTILINE)
    assert users
    assert int(users[-1]) > 0
    assert "\nHEALTHCHECK" in dockerfile()


def test_ours_write_to_their_volumes_only_and_share_nothing_but_the_store() -> None:
    for name in OURS:
        assert SERVICES[name]["read_only"] is True, name
        assert SERVICES[name]["volumes"] == ["artifacts:/artifacts", "/home/hpo", "/tmp"], name
        assert SERVICES[name]["cap_drop"] == ["ALL"], name
    assert "--owner=hpo --group=hpo /artifacts" in dockerfile()  # a new volume belongs to whom the image's folder does


def test_only_the_service_is_published_and_on_loopback_unless_told_otherwise() -> None:
    assert {name for name, settings in SERVICES.items() if "ports" in settings} == {"serve"}
    assert interpolated(SERVICES["serve"], PASSWORDS)["ports"] == ["127.0.0.1:8080:8080"]


def test_workers_have_a_cpu_and_a_gpu_profile() -> None:
    assert SERVICES["worker"]["profiles"] == ["cpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    (devices,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices["driver"] == "nvidia"
    assert devices["capabilities"] == ["gpu"]
    assert SERVICES["worker-gpu"]["command"] == SERVICES["worker"]["command"]
    given = {name: settings["environment"].get("HPO_DEVICE") for name, settings in SERVICES.items()}
    assert given == {"postgres": None, "serve": None, "worker": "cpu", "worker-gpu": "cuda"}
    shared = {"HPO_DEVICE": None}
    assert SERVICES["worker-gpu"]["environment"] | shared == SERVICES["worker"]["environment"] | shared
    assert "container_name" not in SERVICES["worker"]  # that would forbid --scale


def test_the_image_gets_every_file_that_it_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in re.findall(r"^COPY (.+)$", dockerfile(), re.MULTILINE) for source in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_image_finds_the_packages_whose_code_is_copied_after_they_were_installed(tmp_path: Path) -> None:
    """The Dockerfile's own steps in a folder of their own, with the installation of what we depend on left out."""
    image, installed = tmp_path / "app", tmp_path / "installed"
    image.mkdir()
    before, _, after = dockerfile().partition("sh tools/setup.sh")
    (folders,) = re.findall(r"^RUN mkdir -p (.+?)&&", before.replace("\\\n", ""), re.MULTILINE)
    for name in re.findall(r"^COPY (.+) \./$", before, re.MULTILINE)[0].split():
        shutil.copy(ROOT / name, image)
    for name in folders.split():
        (image / name).mkdir(parents=True)
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=image, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("hpo-*.whl"))) as wheel:
        wheel.extractall(installed)
    for name in ("hpo", "models", "storage"):
        assert f"\nCOPY {name} {name}\n" in after
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, image / name, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    use = (
        f"import site, sys; site.addsitedir({str(installed)!r}); sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "import hpo.cli, hpo.dashboard.server, hpo.models.data, hpo.storage.leases; print(hpo.storage.leases.__file__)"
    )
    used = subprocess.run([sys.executable, "-S", "-P", "-c", use], cwd=tmp_path, capture_output=True, text=True)
    assert used.stdout.startswith(str(image)), used.stderr


def test_the_image_has_a_compiler_for_the_kernel_that_trains_on_a_cpu() -> None:
    (packages,) = re.findall(r"apt-get install --yes --no-install-recommends (.+) \\$", dockerfile(), re.MULTILINE)
    names = {name: release for name, _, release in (package.partition("=") for package in packages.split())}
    assert names.keys() == {"gcc", "libc6-dev"}  # the compiler, and what it links with
    assert all(names.values()), "a package without a version"
    assert dockerfile().index("apt-get install") < dockerfile().index("\nUSER ")


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


# The same commands as plain processes

PASSWORDS = {"HPO_DB_PASSWORD": "not 'a' default"}


class Container:
    """One service's command as a plain process: the container's paths, names and port mapped to this machine's."""

    def __init__(self, name: str, folder: Path, database_url: str, port: int) -> None:
        url = make_url(database_url)
        self.folder = folder / name
        self.folder.mkdir()
        self.map = {
            "postgres:5432/hpo": f"{url.host}:{url.port}/{url.database}",
            "/artifacts": str(folder / "artifacts"),
            "8080": str(port),
        }
        settings = interpolated(SERVICES[name.partition("#")[0]], PASSWORDS | {"HPO_DB_PASSWORD": str(url.password)})
        self.command = [self._mapped(word) for word in settings["command"]]
        self.health = [self._mapped(word) for word in settings["healthcheck"]["test"][1:]]
        self.grace_s = float(settings["stop_grace_period"].removesuffix("s"))
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            **{key: self._mapped(value) for key, value in settings["environment"].items()},
        }

    def _mapped(self, text: str) -> str:
        for inside, outside in self.map.items():
            text = text.replace(inside, outside)
        return text

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )

    def healthy(self) -> bool:
        return self.run(*self.health).returncode == 0

    @contextmanager
    def up(self) -> Iterator["subprocess.Popen[bytes]"]:
        """The running command; ended by SIGTERM, and it must obey with status 0 within the grace period."""
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["hpo", *self.command], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        try:
            yield process
            assert process.poll() is None, self.log()
            process.send_signal(signal.SIGTERM)
            assert process.wait(self.grace_s) == 0, self.log()
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        return (self.folder / "log").read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], containers: list[Container], timeout_s: float = 240) -> None:
    """Fails with the containers' logs after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "\n".join(container.log() for container in containers)
        time.sleep(0.3)


def fetched(port: int, path: str, token: str | None) -> tuple[int, str]:
    """Status and text of one request to the service."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def write_study(folder: Path) -> Path:
    """Two classes of noisy waves, told apart by their frequency, and a study of a few short trials."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    phase = rng.uniform(0, 6, size=(80, 1))
    waves = np.sin(phase + np.linspace(0, 6, 12) * (1 + labels[:, None])) + rng.normal(0, 0.1, (80, 12))
    np.savez(folder / "waves.npz", X=waves[:, :, None].astype(np.float32), y=labels)
    path = folder / "study.toml"
    path.write_text(
        '[study]\nname = "waves"\ntrials = 4\n[data]\ntrain = "waves.npz"\nvalidation = 0.25\n'
        "[train]\nepochs = 3\n[space]\nhidden_size = [4, 8]\n"
    )
    return path


def test_the_commands_of_the_services_run_a_study_over_tcp_with_a_password(tmp_path: Path, database_url: str) -> None:
    port = free_port()
    study = write_study(tmp_path)
    names = ("serve", "worker#1", "worker#2", "worker#run")
    serve, *workers, run = [Container(name, tmp_path, database_url, port) for name in names]
    password = str(make_url(database_url).password)
    assert run.run("hpo", "status").returncode == 0  # a database without studies
    assert not serve.healthy()
    with ExitStack() as stack:
        stack.enter_context(serve.up())
        for worker in workers:
            stack.enter_context(worker.up())
        token = run.run("hpo", "token", "create", "--role", "admin", "--owner", "ada").stdout.strip()
        detached = run.run("hpo", "launch", "--detach", str(study))
        assert detached.returncode == 0, detached.stderr
        wait_until(lambda: "waves" in run.run("hpo", "models", "--json").stdout, workers)
        wait_until(serve.healthy, [serve])
        assert all(worker.healthy() for worker in workers)
        assert fetched(port, "/v1/studies", None)[0] == 401
        assert fetched(port, "/v1/studies", f"{token[:-1]}!")[0] == 401
        assert "waves" in fetched(port, "/v1/studies", token)[1]
    logs = [container.log() for container in (serve, *workers)]
    assert not any(secret in log for secret in (password, token) for log in [*logs, detached.stdout, detached.stderr])
    assert not serve.healthy()


def test_a_wrong_database_password_is_unhealthy_and_not_shown(tmp_path: Path, database_url: str) -> None:
    worker = Container("worker", tmp_path, database_url, free_port())
    assert worker.healthy()
    worker.environment["PGPASSWORD"] = "a wrong secret"
    assert not worker.healthy()
    refused = worker.run("hpo", *worker.command)
    assert refused.returncode == 1
    assert "authentication failed" in refused.stderr
    assert "a wrong secret" not in refused.stderr


def test_a_gpu_worker_without_a_card_ends_with_the_reason(tmp_path: Path, database_url: str) -> None:
    worker = Container("worker-gpu", tmp_path, database_url, free_port())
    worker.environment["CUDA_VISIBLE_DEVICES"] = ""
    refused = worker.run("hpo", *worker.command)
    assert refused.returncode == 1
    assert "HPO_DEVICE=cuda requires a card: " in refused.stderr


# The same workers under other schedulers

SBATCH = ROOT / "examples/slurm/worker.sbatch"
KUBERNETES = ROOT / "examples/kubernetes"
JOB: dict[str, Any] = yaml.safe_load((KUBERNETES / "worker-job.yaml").read_text())
SERVICE, DEPLOYMENT = yaml.safe_load_all((KUBERNETES / "service.yaml").read_text())
JOB_POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
SERVE_POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
PODS = pytest.mark.parametrize("pod", [JOB_POD, SERVE_POD], ids=["job", "service"])
END_S = 10  # a worker that is asked to stop has so long


def test_the_slurm_script_is_a_worker_that_a_signal_ends_in_time(tmp_path: Path, database_url: str) -> None:
    assert subprocess.run(["bash", "-n", SBATCH], capture_output=True, text=True).stderr == ""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.+)$", SBATCH.read_text(), re.MULTILINE))
    kind, _, before_s = options["signal"].partition("@")
    assert kind == "B:TERM"  # to the batch process, which the script turns into the worker
    assert int(before_s) > END_S
    assert {"array", "time", "mem", "cpus-per-task"} <= options.keys()
    assert "%a" in options["output"]
    environment = {
        "PATH": os.environ["PATH"],
        "HPO": str(Path(sys.executable).with_name("hpo")),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "HPO_ARTIFACTS": str(tmp_path / "artifacts"),
    }
    lacking = subprocess.run(["bash", SBATCH], env=environment, capture_output=True, text=True)
    assert lacking.returncode != 0
    assert "HPO_DATABASE_URL: postgresql://" in lacking.stderr
    url = make_url(database_url)
    password = tmp_path / ".config/hpo/password"
    password.parent.mkdir(parents=True)
    password.write_text(f"{url.password}\n")
    environment["HPO_DATABASE_URL"] = f"postgresql://hpo@{url.host}:{url.port}/{url.database}"
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(["bash", SBATCH], env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        ready = f"worker {socket.gethostname()}-{worker.pid} on "  # no shell in between that would get the signal
        deadline = time.monotonic() + 120
        while ready not in (said := (tmp_path / "log").read_text()):
            assert worker.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        worker.terminate()
        assert worker.wait(END_S) == 0, (tmp_path / "log").read_text()
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("version", ["1.29", latest_version()])
@pytest.mark.parametrize("resource", [JOB, SERVICE, DEPLOYMENT], ids=lambda resource: resource["kind"])
def test_the_kubernetes_examples_follow_the_schemas_of_its_api(resource: dict[str, Any], version: str) -> None:
    validate(resource, version, strict=True)
    with pytest.raises(ValidationError, match="'replica' was unexpected"):
        validate(resource | {"spec": resource["spec"] | {"replica": 2}}, version, strict=True)


def test_the_kubernetes_job_runs_workers_until_its_study_is_over() -> None:
    spec = JOB["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] > spec["parallelism"] > 1  # an evicted worker ends its index: the next one follows
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in spec[
        "podFailurePolicy"
    ]["rules"]
    assert JOB_POD["restartPolicy"] == "Never"
    (worker,) = JOB_POD["containers"]
    assert worker["args"] == [*SERVICES["worker"]["command"], "--study", "$(HPO_STUDY)"]
    assert value_of(worker, "HPO_STUDY")


def test_the_kubernetes_service_leads_to_two_pods_that_come_and_go_unnoticed() -> None:
    spec = DEPLOYMENT["spec"]
    assert spec["replicas"] == 2
    labels = spec["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == spec["selector"]["matchLabels"] == labels
    assert labels != JOB["spec"]["template"]["metadata"]["labels"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (serve,) = SERVE_POD["containers"]
    *command, port = serve["args"]
    assert command == SERVICES["serve"]["command"][:-1]
    assert serve["ports"] == [{"name": SERVICE["spec"]["ports"][0]["targetPort"], "containerPort": int(port)}]
    for probe in ("startupProbe", "livenessProbe"):
        assert serve[probe]["httpGet"] == {"path": "/healthz", "port": "http"}  # the one route that asks nobody
    assert f'"127.0.0.1", {port}' in str(serve["readinessProbe"]["exec"])
    before_s = float(serve["lifecycle"]["preStop"]["exec"]["command"][1])
    assert SERVE_POD["terminationGracePeriodSeconds"] > before_s + END_S


@PODS
def test_kubernetes_pods_have_what_they_need_and_no_more(pod: dict[str, Any]) -> None:
    assert pod["terminationGracePeriodSeconds"] > END_S
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    (user,) = re.findall(r"^USER (\d+)$", dockerfile(), re.MULTILINE)
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    (container,) = pod["containers"]
    assert container["image"] == interpolated(SERVICES["worker"]["image"], {})
    assert container["image"].replace("-cpu", "-cuda") in (KUBERNETES / "worker-job.yaml").read_text()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"home": "/home/hpo", "scratch": "/tmp"}
    assert {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]} == {"home": {}, "scratch": {}}


@PODS
def test_kubernetes_pods_have_their_addresses_and_take_their_secrets_from_a_secret(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    secret = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry}
    assert {"HPO_DATABASE_URL", "PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= secret.keys()
    assert {reference["name"] for reference in secret.values()} == {"hpo"}
    assert value_of(container, "HPO_ARTIFACTS").startswith("s3://")  # pods share no folder
    asked = re.findall(r"--from-(?:literal|file)=([a-z0-9-]+)=", (KUBERNETES / "README.md").read_text())
    needed = {reference["key"] for reference in secret.values() if not reference.get("optional")}
    assert needed == set(asked)


def value_of(container: dict[str, Any], name: str) -> str:
    """What the pod gives its container in plain sight."""
    (value,) = (entry["value"] for entry in container["env"] if entry["name"] == name)
    return str(value)
