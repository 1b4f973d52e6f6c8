"""What a trial asks of the database: of one that is far away each question takes a round trip."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import pytest
from optuna.trial import TrialState

from hpo.storage.artifacts import artifact_store
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import load
from hpo.study.lifecycle import create_or_open, open_study
from tests.proxy import proxied

STUDY = """[study]
name = "waves"
trials = 99
sampler = "{sampler}"
pruner = "hyperband"
[data]
train = "waves.npz"
[train]
epochs = 30
"""
DRAW, RUNG = 4, 1  # questions; one of a draw's may be that what was held back is written meanwhile


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_a_draw_goes_by_one_look_at_the_study_and_a_rung_by_another(
    storage: TrialStorage, tmp_path: Path, sampler: str
) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "waves.npz", X=random.normal(size=(60, 8, 2)), y=np.arange(60) % 2)
    (tmp_path / "waves.toml").write_text(STUDY.format(sampler=sampler))
    create_or_open(load(tmp_path / "waves.toml"), storage, artifact_store(str(tmp_path / "artifacts")))
    with proxied(storage.url) as (proxy, url):
        far = trial_storage(url)
        study, draws, rungs = open_study("waves", far), [], []
        for number in range(28):
            lease = study.leases.acquire(study.study_id, "tester", "cpu")
            assert lease is not None
            before = proxy.queries
            study.sampler.parameters(lease.trial_id)
            draws.append(proxy.queries - before)
            for epoch in range(1, 30):
                far.set_trial_intermediate_value(lease.trial_id, epoch, float(random.normal()))
                if not study.may_prune(number, epoch):
                    continue
                before = proxy.queries
                ends = study.should_prune(lease.trial_id)
                rungs.append(proxy.queries - before)
                if ends:
                    break
            far.finish_trial(lease.trial_id, TrialState.COMPLETE, [float(number)], {"seed": 0})
        far.close()
    assert median(draws) <= DRAW  # a parameter's first draw in a process is compared with what is stored of it
    assert median(rungs) == RUNG
