"""The imports of every source file, at the top, inside functions and under TYPE_CHECKING.

Which part of the project may import which is stated in pyproject.toml and checked by import-linter (`make check`).
Here: no file imports one that imports it, however indirectly; and an import inside a function has a reason.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"hpo": "hpo", "models": "hpo.models", "storage": "hpo.storage"}  # where it lies, what it is imported as
# What takes long to load, as `hpo --help` must not wait for torch; and what is optional or not on every system.
HEAVY = {
    "alembic", "fastapi", "httpx", "numpy", "optuna", "optuna_dashboard", "psycopg2", "pydantic", "rich",
    "safetensors", "scipy", "sqlalchemy", "torch", "uvicorn", "waitress",
}  # fmt: skip
OPTIONAL = {"boto3", "botocore", "fcntl", "mlflow", "onnx", "onnxruntime", "pandas", "pyarrow", "ray", "resource"}


class Import(NamedTuple):
    module: str
    line: int
    in_function: bool
    for_types: bool  # under TYPE_CHECKING


def find_imports(tree: ast.AST, importer: str, known: Mapping[str, object]) -> Iterator[Import]:
    """All imports below a node. `from package import name` is of the module package.name where that is one."""

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno} is a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield Import(name if name in known else node.module or "", node.lineno, in_function, for_types)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from visit(statement, in_function, True)
            for statement in node.orelse:
                yield from visit(statement, in_function, for_types)
        else:
            in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, in_function, for_types)

    return visit(tree, False, False)


@cache
def source_files() -> dict[str, Path]:
    """Module name -> file. The links hpo/models and hpo/storage are not followed: they are walked where they lie."""
    found = {}
    for folder, package in FOLDERS.items():
        for parent, folders, files in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if not Path(parent, name).is_symlink()]
            for file in (Path(parent, name) for name in files if name.endswith(".py")):
                parts = file.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


FIRST = ("hpo", "hpo.__main__")  # they import next to nothing at their top: from their end on a Ctrl-C is heard


@cache
def imports() -> dict[str, list[Import]]:
    """Module name -> its imports."""
    files = source_files()
    return {name: list(find_imports(ast.parse(file.read_text()), name, files)) for name, file in files.items()}


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of a cycle, each importing the next one; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle[::-1]
    return []


def loads_late(module: str) -> bool:
    """Whether it is a heavy or optional package, or a module of ours that imports one at its top."""
    todo, seen = [module], set[str]()
    while todo:
        name = todo.pop()
        if name.partition(".")[0] in HEAVY | OPTIONAL:
            return True
        if name not in seen:
            seen.add(name)
            todo += [i.module for i in imports().get(name, []) if not i.in_function and not i.for_types]
    return False


def test_all_folders_are_read() -> None:
    for module in ("hpo.cli", "hpo.models", "hpo.storage", "hpo.dashboard.server"):
        assert module in source_files()
    assert "hpo.study" in {found.module.rpartition(".")[0] for found in imports()["hpo.cli"]}


def test_imports_are_found_wherever_they_stand() -> None:
    code = """
import a
from hpo import cli, launch
if TYPE_CHECKING:
    import b
class C:
    def method(self):
        import c
        def inner():
            from hpo.cli import main
try:
    import d
except ImportError:
    pass
"""
    found = list(find_imports(ast.parse(code), "code", {"hpo.cli": None}))
    assert [i.module for i in found] == ["a", "hpo.cli", "hpo", "b", "c", "hpo.cli", "d"]
    assert [i.module for i in found if i.in_function] == ["c", "hpo.cli"]
    assert [i.module for i in found if i.for_types] == ["b"]


def test_a_cycle_is_named() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


def test_no_file_imports_one_that_imports_it() -> None:
    graph = {name: {found.module for found in all_found} for name, all_found in imports().items()}
    cycle = find_cycle(graph)
    assert not cycle, " imports ".join(cycle)


def test_a_function_imports_only_what_is_heavy_or_optional() -> None:
    others = {
        f"{source_files()[importer].relative_to(ROOT)}:{found.line} imports {found.module}": None
        for importer, all_found in imports().items()
        for found in all_found
        if found.in_function and not loads_late(found.module) and importer not in FIRST
    }
    assert not others, "\n".join(["these imports belong at the top of their file:", *others])
