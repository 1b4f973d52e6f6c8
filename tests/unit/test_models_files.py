"""A file or folder is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.models.files import whole_file, whole_folder


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with whole_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as beside:
        beside.write_text("half\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [[], ["old"]])
def test_a_folder_replaces_the_one_that_is_there(tmp_path: Path, before: list[str]) -> None:
    path = tmp_path / "a"
    path.mkdir()
    for name in before:
        (path / name).touch()
    with whole_folder(path) as beside:
        (beside / "new").touch()
        assert [found.name for found in path.iterdir()] == before
    assert [found.name for found in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(UnicodeEncodeError), whole_folder(path) as beside:
        (beside / "half").write_text("half\ud800", encoding="utf-8")
    assert [found.name for found in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "b") as beside:
        (beside / "new").touch()
    assert (tmp_path / "a" / "b" / "new").exists()
