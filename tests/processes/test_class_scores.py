"""From a launch to where the model is weak: by class and by group, on the terminal, as JSON, and not in the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

import hpo
from tests.conftest import Cli

STUDY = """
[study]
name = "gait"
trials = 2
metric = "accuracy"
[data]
train = "train.npz"
test = "test.npz"
validation = { folds = 3 }
[train]
epochs = 4
[space]
hidden_size = 8
layers = 1
batch_size = 32
"""


def write(path: Path, patients: list[str], seed: int) -> None:
    """360 noisy sines of three frequencies, of which walk and limp are one, of some patients."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 3, 360)
    X = np.sin(np.arange(12) * np.array([0.4, 1.2, 1.2])[kind][:, None] + random.uniform(0, 6, (360, 1)))
    groups = np.array(patients)[np.arange(360) % len(patients)]
    y = np.array(["sit", "walk", "limp"])[kind]
    np.savez(path, X=X + 0.1 * random.normal(size=X.shape), y=y, groups=groups)


def test_a_launch_says_where_its_model_is_weak_and_the_folder_tells_no_group(cli: Cli, tmp_path: Path) -> None:
    write(tmp_path / "train.npz", [f"Patient {i}" for i in range(12)], 0)
    write(tmp_path / "test.npz", ["Ada", "Bob", "Cyd"], 1)
    (tmp_path / "gait.toml").write_text(STUDY)
    done = cli("launch", "gait.toml", "--workers", 1, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    (row,) = json.loads(cli("status", "gait", "--json").stdout)
    validation, test = row["scores"]["validation"], row["scores"]["test"]
    assert validation["accuracy"] == summary["validation"]["accuracy"]
    assert {each["name"] for each in validation["by_group"]} == {f"Patient {i}" for i in range(12)}
    assert all(each["sequences"] == 30 for each in validation["by_group"])  # the folds together are all of them
    assert sum(each["right"] for each in validation["by_group"]) == round(360 * validation["accuracy"])

    evaluated = json.loads(cli("evaluate", "gait", "test.npz", "--json").stdout)
    assert {each["name"] for each in evaluated["by_group"]} == {"Ada", "Bob", "Cyd"}
    for name in ("by_class", "groups", "by_group"):
        assert evaluated[name] == test[name], name

    weak = summary["weak"]
    assert (weak["part"], weak["accuracy"]) == ("test", test["accuracy"])
    first = weak["classes"][0]
    line = rf"  class '{first['name']}': recall {first['recall']:.4f} \(\d\.\d+ to \d\.\d+\) of {first['sequences']}"
    told = rf"version 1 on the test part: accuracy {test['accuracy']:.4f} of 360 sequences, weaker on\n{line}, \d+ "
    assert re.search(told, cli("status", "gait").stdout)
    assert re.search(told, cli("status", "gait", "--watch").stdout)
    assert re.search(told, cli("launch", "gait.toml").stdout)
    (whole,) = json.loads(cli("status", "--json").stdout)
    assert whole["scores"] is None  # one named study has them
    assert "weaker on" not in cli("status").stdout

    folder = Path(summary["model"]["path"])
    for file in [*folder.iterdir(), *(tmp_path / "artifacts").glob("model-*")]:
        assert not re.search(rb"Patient|Ada|Bob|Cyd", file.read_bytes()), file
    assert cli("export", "gait", "--out", "out").returncode == 0
    assert "### Test part" in (tmp_path / "out" / "README.md").read_text()
    config = hpo.load(folder).config
    assert config.test is not None
    assert config.test.groups is not None
    assert config.test.groups.counts == tuple((each["sequences"], each["right"]) for each in test["by_group"])
