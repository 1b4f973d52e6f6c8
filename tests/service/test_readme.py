"""The service's part of the README, run as it stands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.storage.access import TOKEN
from tests.service.conftest import environment_of
from tests.service.processes import command_lines

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def test_from_data_to_predictions_with_curl(tmp_path: Path, database_url: str, free_port: int) -> None:
    """Shortened to a few epochs; the port is a free one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    people, curl = (block for block in blocks if "hpo serve &" in block or "curl -" in block)
    assert curl.count("curl ") == 7
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hpo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m hpo "$@"\n')
    (tmp_path / "bin" / "hpo").chmod(0o755)
    environment = environment_of(tmp_path, database_url)
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    end = "trap 'kill $(jobs -p); wait' EXIT\n"
    ready = "until curl -s http://127.0.0.1:8000/healthz > /dev/null; do sleep 0.1; done\n"
    script = end + people + ready + curl.replace('"trials": 10}', '"trials": 2}, "train": {"epochs": 2}')
    script = script.replace("hpo serve &", f"hpo serve --port {free_port} > serve.log &")
    script = script.replace("hpo worker &", "hpo worker 2> worker.log &").replace(":8000", f":{free_port}")
    command = ["bash", "-euo", "pipefail", "-c", script]
    with command_lines() as seen:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any("curl -sNH @ada.token" in line for line in seen)
    (token,) = TOKEN.finditer((tmp_path / "ada.token").read_text())
    assert not any(token[0] in line for line in seen)  # `ps` shows it to nobody
    assert "event: end" in done.stdout
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["model"], last["version"], len(last["labels"])) == ("demand", 1, 1029)
    assert (tmp_path / "demand.md").read_text().startswith("# demand\n")
    assert (tmp_path / "demand.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "demand.zip").read_bytes().startswith(b"PK")
