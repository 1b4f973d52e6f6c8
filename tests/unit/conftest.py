"""tests/unit needs nothing but Python and the packages that we depend on."""

import pytest


@pytest.fixture(scope="session")
def server() -> str:
    return pytest.fail("a test that needs PostgreSQL belongs in tests/postgres")
