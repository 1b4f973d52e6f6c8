"""What the tests against a database share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpo.storage.leases import Leases
from hpo.storage.trials import TrialStorage, trial_storage


@pytest.fixture
def storage(database_url: str) -> Iterator[TrialStorage]:
    """On the test's own database."""
    made = trial_storage(database_url)
    yield made
    made.close()


@pytest.fixture
def leases(storage: TrialStorage) -> Leases:
    return Leases(storage)


@pytest.fixture
def elsewhere(database_url: str) -> Iterator[Leases]:
    """The same database as another worker sees it."""
    made = trial_storage(database_url)
    yield Leases(made)
    made.close()
