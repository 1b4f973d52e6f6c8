"""Optuna's own suite for storages, every case, here and in a time zone far from UTC."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from optuna.testing.pytest_storages import StorageTestCase

from hpo.storage.trials import TrialStorage, trial_storage


class TestTrialStorage(StorageTestCase):
    @pytest.fixture
    def storage(self, database_url: str) -> Iterator[TrialStorage]:
        made = trial_storage(database_url)
        yield made
        made.close()


def test_the_contract_holds_in_a_time_zone_far_from_utc() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-k", "TestTrialStorage"]
    tokyo = {**os.environ, "TZ": "JST-9"}  # as Asia/Tokyo, but needs no time zone files
    run = subprocess.run(command, env=tokyo, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
