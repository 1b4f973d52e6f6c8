"""What the tests against a database share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpo.storage.trials import TrialStorage, trial_storage


@pytest.fixture
def storage(database_url: str) -> Iterator[TrialStorage]:
    """On the test's own database."""
    made = trial_storage(database_url)
    yield made
    made.close()
