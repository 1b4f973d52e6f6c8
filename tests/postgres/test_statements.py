"""Every statement of storage/sql, prepared by a real server, so that none is stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpo.storage.connection import Connection
from hpo.storage.statements import STATEMENTS, _load

NAMES = sorted(STATEMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_server_prepares_the_statement(name: str, database_url: str) -> None:
    connection = Connection(database_url)
    connection.execute(STATEMENTS[name].prepare)
    connection.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_header_describes_the_statement_and_types_its_parameters(name: str) -> None:
    statement = STATEMENTS[name]
    assert statement.description.endswith(".")
    assert set(statement.types) == set(re.findall(r"%\((\w+)\)s", statement.text))


def test_every_statement_is_used() -> None:
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "storage").rglob("*.py"))
    steps = {name for name in NAMES if name.startswith("take_")}  # named by their step
    assert [name for name in NAMES if f'"{name}"' not in sources and name not in steps] == []


def test_a_file_of_statements_is_read_with_its_fragments(tmp_path: Path) -> None:
    (tmp_path / "some.sql").write_text(
        "-- About the file.\n\n-- fragment: one\n-- A number.\n1\n\n-- name: two\n-- Adds.\n-- More of it.\n"
        "-- prepared: a int,\n--     b text\nSELECT {one} + %(a)s\n-- for %(b)s\n"
    )
    (two,) = _load(tmp_path).values()
    assert (two.name, two.description, two.text) == ("two", "Adds. More of it.", "SELECT 1 + %(a)s")
    assert (dict(two.types), two.prepared) == ({"a": "int", "b": "text"}, True)
    assert two.prepare == "PREPARE hpo_two (int, text) AS SELECT 1 + $1"
    assert two.execute == "EXECUTE hpo_two (%(a)s::int, %(b)s::text)"
    (tmp_path / "other.sql").write_text("-- name: two\nSELECT 2\n")
    with pytest.raises(ValueError, match="the name 'two' is given twice"):
        _load(tmp_path)
