"""Optuna's own suite for storages, every case, here and in a time zone far from UTC."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from optuna.testing.pytest_storages import StorageTestCase

from storage.trials import TrialStorage, trial_storage


class TestTrialStorage(StorageTestCase):
    @pytest.fixture
    def storage(self, database_url: str) -> Iterator[TrialStorage]:
        made = trial_storage(database_url)
        yield made
        made.close()
