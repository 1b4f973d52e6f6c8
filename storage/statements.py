"""The statements of sql/*.sql, by name.

A file holds statements and the fragments that they share, each after its header:

    -- name: study_name                            or  -- fragment: utc_now
    -- What it does, in a line or two.
    -- types: study int, key text                  of its %(parameters)s; a line that goes on is indented
    SELECT study_name FROM studies WHERE {a_fragment} AND study_id = %(study)s

`prepared:` instead of `types:` asks the server to plan the statement once in a connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "sql"
_HEAD = re.compile(r"^-- (name|fragment): (\w+)\n", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement with %(parameters)s."""

    name: str
    text: str
    types: Mapping[str, str] = field(default_factory=dict)  # parameter -> SQL type
    prepared: bool = False  # planned once in a connection
    description: str = ""

    @cached_property
    def prepare(self) -> str:
        """The PREPARE statement."""
        numbers = {parameter: f"${number}" for number, parameter in enumerate(self.types, 1)}
        types = f" ({', '.join(self.types.values())})" if self.types else ""
        return f"PREPARE hpo_{self.name}{types} AS {self.text % numbers}"

    @cached_property
    def execute(self) -> str:
        """What runs it, with %(parameters)s: the text itself, or EXECUTE of what was prepared."""
        if not self.prepared:
            return self.text
        values = ", ".join(f"%({parameter})s::{kind}" for parameter, kind in self.types.items())
        return f"EXECUTE hpo_{self.name} ({values})"

    @cached_property
    def direct(self) -> str:
        """The text with %(parameters)s where nothing can be prepared."""
        if not self.prepared:
            return self.text
        return self.text % {parameter: f"(%({parameter})s::{kind})" for parameter, kind in self.types.items()}


BoundStatement = tuple[Statement | str, Any]  # with its parameters


def statement(name: str) -> Statement:
    """The statement of that name. Raises KeyError."""
    return STATEMENTS[name]


def _load(folder: Path) -> dict[str, Statement]:
    """Every statement of the folder's files, with its fragments put in."""
    found, fragments = {}, {}
    for path in sorted(folder.glob("*.sql")):
        pieces = _HEAD.split(path.read_text(encoding="utf-8"))[1:]
        for kind, name, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
            if name in found or name in fragments:
                raise ValueError(f"{path.name}: the name {name!r} is given twice")
            if kind == "name":
                found[name] = _parse(name, body)
            else:
                fragments[name] = _parse(name, body).text
    return {name: _completed(each, fragments) for name, each in found.items()}


def _parse(name: str, body: str) -> Statement:
    """A statement from the lines after its name: comments, then SQL."""
    lines = body.splitlines()
    text = "\n".join(line for line in lines if not line.startswith("--")).strip()
    header = "\n".join(line for line in lines[: _header_length(lines)])
    header = re.sub(r"\n-- {2,}", " ", header)  # lines that go on
    described = [line.removeprefix("-- ") for line in header.splitlines()]
    typed = [line for line in described if line.startswith(("types: ", "prepared: "))]
    types = dict(pair.split(" ", 1) for line in typed for pair in line.partition(": ")[2].split(", "))
    description = " ".join(line for line in described if line not in typed)
    return Statement(name, text, types, any(line.startswith("prepared: ") for line in typed), description)


def _header_length(lines: list[str]) -> int:
    return next((index for index, line in enumerate(lines) if not line.startswith("--")), len(lines))


def _completed(given: Statement, fragments: Mapping[str, str]) -> Statement:
    text = given.text
    while re.search(r"\{[a-z]\w*\}", text):
        text = re.sub(r"\{([a-z]\w*)\}", lambda match: fragments[match[1]], text)
    return Statement(given.name, text, given.types, given.prepared, given.description)


STATEMENTS = _load(FOLDER)
