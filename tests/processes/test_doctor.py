"""`hpo doctor` as a command, on machines that lack this or that; launches and workers where a card cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.unit.test_devices import STUB

ROOT = Path(__file__).resolve().parents[2]
Doctor = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def env(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a machine whose cards, if it has any, are hidden."""
    kept = {name: value for name, value in environment.items() if not name.startswith(("CUDA_", "HPO_DEVICE"))}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def doctor(cli: Cli, env: dict[str, str]) -> Doctor:
    """doctor(HPO_DEVICE="cuda", …) runs the command with that environment; None removes a variable."""

    def run(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        changed = {**env, **changes}
        return cli("doctor", *arguments, env={name: value for name, value in changed.items() if value is not None})

    return run


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """What was looked at: its state, and the detail."""
    found = {}
    for line in done.stdout.splitlines():
        state, (what, _, detail) = line[:4].strip(), line[4:].partition(": ")
        assert state in ("ok", "NO", "--"), done.stdout
        found[what] = (state, detail)
    return found


@pytest.fixture
def stub(tmp_path: Path, env: dict[str, str]) -> dict[str, str]:
    """Variables for a machine whose torch is a stub with two cards."""
    (tmp_path / "stub/torch").mkdir(parents=True)
    (tmp_path / "stub/torch/__init__.py").write_text(STUB)
    path = f"{tmp_path / 'stub'}{os.pathsep}{ROOT}"
    return {"PYTHONPATH": path, "STUB_CUDA": "13.0", "CUDA_VISIBLE_DEVICES": "0,1", "HPO_DEVICE": "cuda"}


def test_where_all_is_well_each_line_says_what_was_found_and_the_status_is_0(
    doctor: Doctor, env: dict[str, str]
) -> None:
    done = doctor()
    found = findings(done)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "NO" not in {state for state, _ in found.values()}
    for what in ("python", "torch", "device", "database connection", "database tables", "artifacts", "cores", "memory"):
        assert found[what][0] == "ok", what
    assert found["card"] == ("--", "none is used: CUDA_VISIBLE_DEVICES=")
    assert env["HPO_ARTIFACTS"] in found["artifacts"][1]
    assert list(Path(env["HPO_ARTIFACTS"]).iterdir()) == []
    assert found["disk of HPO_ARTIFACTS"][1].endswith(env["HPO_ARTIFACTS"])


def test_json_has_the_same_findings(doctor: Doctor) -> None:
    done = doctor("--json")
    assert done.returncode == 0
    content = json.loads(done.stdout)
    assert content["ok"] is True
    assert {finding["what"] for finding in content["findings"]} == findings(doctor()).keys()
    assert all(finding.keys() == {"what", "state", "detail"} for finding in content["findings"])


def test_a_database_that_is_away_is_a_finding_without_its_password(doctor: Doctor) -> None:
    done = doctor(HPO_DATABASE_URL="postgresql://me:not-to-be-seen@127.0.0.1:1/x")
    assert done.returncode == 1
    state, detail = findings(done)["database connection"]
    assert state == "NO"
    assert "Connection refused" in detail
    assert "not-to-be-seen" not in done.stdout + done.stderr
    assert findings(done)["artifacts"][0] == "ok"


def test_an_address_that_is_none_is_a_finding(doctor: Doctor) -> None:
    done = doctor(HPO_DATABASE_URL="mysql://me:not-to-be-seen@host/x", HPO_ARTIFACTS="ftp://me:not-to-be-seen@host")
    assert done.returncode == 1
    assert findings(done)["database"][0] == findings(done)["artifacts"][0] == "NO"
    assert "not-to-be-seen" not in done.stdout + done.stderr


def test_an_embedded_server_that_does_not_run_is_not_started(doctor: Doctor, env: dict[str, str]) -> None:
    done = doctor(HPO_DATABASE_URL=None)
    assert done.returncode == 0, done.stdout
    state, detail = findings(done)["database"]
    assert state == "--"
    assert detail.startswith("embedded, not running; it starts at first use")
    assert not list(Path(env["HPO_HOME"]).rglob("server.json"))


def test_a_store_that_cannot_be_written_is_a_finding_with_the_way_out(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor(HPO_ARTIFACTS=str(tmp_path / "file/not-to-be-seen"), PGPASSWORD="not-to-be-seen")
    assert done.returncode == 1
    assert "not-to-be-seen" not in done.stdout + done.stderr
    state, detail = findings(done)["artifacts"]
    assert state == "NO"
    assert detail.endswith(
        "cannot be made: Not a directory; set HPO_ARTIFACTS to a folder that can be made, or to s3://bucket/prefix"
    )


def test_a_home_that_cannot_be_made_is_a_finding(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor(HPO_HOME=str(tmp_path / "file/home"), HPO_DATABASE_URL=None)
    assert done.returncode == 1
    assert findings(done)["disk of HPO_HOME"][0] == findings(done)["database"][0] == "NO"
    assert "set HPO_HOME to another folder" in done.stdout


def test_a_torch_that_cannot_be_imported_is_a_finding_and_the_rest_is_looked_at(
    doctor: Doctor, stub: dict[str, str], tmp_path: Path
) -> None:
    reason = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "stub/torch/__init__.py").write_text(f"raise ImportError({reason!r})")
    done = doctor(**stub | {"HPO_DEVICE": "auto"})
    assert done.returncode == 1
    found = findings(done)
    assert found["torch"][0] == found["kernel"][0] == "NO"
    assert reason in found["torch"][1]
    assert found["database connection"][0] == found["artifacts"][0] == "ok"


@pytest.mark.parametrize(
    ("variables", "state", "text"),
    [
        ({"CC": "/nowhere/cc"}, "NO", "HPO_NATIVE=0 does without it"),
        ({"HPO_NATIVE": "0", "CC": "/nowhere/cc"}, "--", "HPO_NATIVE=0"),
        ({"HPO_NATIVE": "yes"}, "NO", "HPO_NATIVE must be 0"),
        ({"PATH": "/nowhere"}, "--", "no C compiler found"),
    ],
)
def test_a_kernel_that_cannot_be_built_is_needed_only_with_a_compiler(
    doctor: Doctor, variables: dict[str, str], state: str, text: str
) -> None:
    done = doctor(**variables)
    assert findings(done)["kernel"][0] == state
    assert text in findings(done)["kernel"][1]
    assert done.returncode == (1 if state == "NO" else 0)


# Cards


def test_each_card_is_tried_on_its_own(doctor: Doctor, stub: dict[str, str]) -> None:
    found = findings(doctor(**stub))
    assert found["torch"] == ("ok", "2.13.0+cu130, CUDA 13.0, built for sm_75 sm_90")
    for number in (0, 1):
        assert found[f"card {number}"] == ("ok", f"Stub {number}, compute capability 9.0, 16.0 GiB: a kernel ran")
    assert found["CUDA graphs"][0] == "ok"
    assert found["device"] == ("ok", "HPO_DEVICE=cuda: workers train on 2 of 2 cards")


def test_a_driver_that_crashes_on_one_card_takes_neither_the_command_nor_the_other_card_down(
    doctor: Doctor, stub: dict[str, str]
) -> None:
    done = doctor(**stub, STUB_CRASH="0")
    found = findings(done)
    assert done.returncode == 1
    assert found["card 0"][0] == "NO"
    assert "it was ended by SIGABRT" in found["card 0"][1]
    assert found["card 1"][0] == found["CUDA graphs"][0] == "ok"
    assert found["device"][1].endswith("1 of 2 cards")


def test_a_card_that_no_kernel_runs_on_fails_only_where_it_may_be_used(doctor: Doctor, stub: dict[str, str]) -> None:
    broken = {**stub, "STUB_FAIL": "1"}
    assert findings(doctor(**broken))["card 1"][0] == "NO"
    only = findings(doctor(**broken | {"HPO_DEVICE": "cuda:0"}))
    assert "card 1" not in only
    assert only["card 0"][0] == only["device"][0] == "ok"
    unused = findings(doctor(**broken | {"HPO_DEVICE": "cpu"}))
    assert unused["card"] == ("--", "none is used: HPO_DEVICE=cpu")
    assert unused["device"] == ("ok", "cpu")


def test_several_mig_instances_are_tried_one_by_one(doctor: Doctor, stub: dict[str, str]) -> None:
    found = findings(doctor(**stub | {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b,MIG-c", "STUB_CARDS": "1"}))
    assert [found[f"card {number}"][0] for number in range(3)] == ["ok"] * 3
    assert found["device"][1].endswith("3 of 3 cards")


@pytest.mark.parametrize(
    ("value", "what", "text"),
    [
        ("gpu", "device", "HPO_DEVICE must be auto"),
        ("cuda:2", "card", "the last one is cuda:1"),
    ],
)
def test_a_device_that_is_none_is_a_finding(
    doctor: Doctor, stub: dict[str, str], value: str, what: str, text: str
) -> None:
    done = doctor(**stub | {"HPO_DEVICE": value})
    assert done.returncode == 1
    assert findings(done)[what][0] == "NO"
    assert text in findings(done)[what][1]


SMI = """#!/bin/sh
echo '| NVIDIA-SMI 535.104.05    Driver Version: 535.104.05    CUDA Version: 12.2     |'
"""


def test_a_driver_older_than_what_torch_was_built_for_is_a_finding(
    doctor: Doctor, stub: dict[str, str], tmp_path: Path, env: dict[str, str]
) -> None:
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI)
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}{os.pathsep}{env['PATH']}"}
    says = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update …"
    done = doctor(**stub, **path, STUB_CARDS="0", STUB_SAYS=says)
    found = findings(done)
    assert done.returncode == 1
    assert found["driver"][0] == found["card"][0] == found["device"][0] == "NO"
    assert found["driver"][1].startswith("535.104.05, up to CUDA 12.2: torch 2.13.0+cu130 (CUDA 13.0) needs a newer")
    assert "is too old (found version 12020); update the driver" in found["card"][1]
    assert findings(doctor(**stub | path | {"STUB_CUDA": "12.6"}))["driver"] == ("ok", "535.104.05, up to CUDA 12.2")


# Launches and workers


def test_where_a_card_is_required_a_launch_and_a_worker_end_with_the_reason(
    cli: Cli, env: dict[str, str], study_file: Callable[..., Path]
) -> None:
    required = env | {"HPO_DEVICE": "cuda"}
    for arguments in (("launch", study_file(), "--workers", 2), ("launch", study_file()), ("worker",)):
        done = cli(*arguments, env=required)
        assert done.returncode == 1
        assert "hpo: HPO_DEVICE=cuda requires a card: CUDA_VISIBLE_DEVICES='' hides every card; unset it" in done.stderr
    assert cli("status", "--json", env=env).stdout.strip() == "[]"


SHOWS_A_CARD = """
from hpo.trial import cards

cards.traces = lambda *_: ["/dev/nvidia0"]
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_where_a_card_cannot_be_used_the_launch_says_so_once_and_so_does_each_workers_log(
    start: str, cli: Cli, env: dict[str, str], study_file: Callable[..., Path], tmp_path: Path
) -> None:
    """A machine that shows a card to a torch which cannot use it: a CPU build, or one without a driver."""
    (tmp_path / "shows").mkdir()
    (tmp_path / "shows/sitecustomize.py").write_text(SHOWS_A_CARD)
    path = f"{tmp_path / 'shows'}{os.pathsep}{ROOT}"
    machine = {**env, "PYTHONPATH": path, "HPO_START": start, "HPO_DEVICE": "auto"}
    del machine["CUDA_VISIBLE_DEVICES"]
    seen = subprocess.run(
        [sys.executable, "-P", "-m", "hpo.trial.survey", "--list"], env=machine, capture_output=True, text=True
    )
    if json.loads(seen.stdout)["cards"]:
        pytest.skip("this machine's cards can be used")
    done = cli("launch", study_file(trials=2, epochs=2), "--quiet", env=machine)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("one worker a core, though this machine has a card: torch ") == 1
    logs = cli("logs", "waves", "-n", 100, env=machine).stdout
    assert "WARNING training on the CPU, though this machine has a card: torch " in logs
    silent = cli("launch", study_file(trials=3, epochs=2), "--quiet", env=machine | {"HPO_DEVICE": "cpu"})
    assert (silent.returncode, silent.stderr) == (0, "")
