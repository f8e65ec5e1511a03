"""replace_folder: the destination is whole or untouched, whatever fails and whenever."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from convrot_quant.folders import check_place, replace_file, replace_folder

OLD = '{"_class_name": "FluxTransformer2DModel"}'


def tree(root: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(OLD)
    (folder / "part").mkdir()
    (folder / "part" / "x").write_text("old")
    return folder


def test_appears_under_its_name_with_everything_in_it(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with replace_folder(target) as building:
        assert building.parent == target.parent
        (building / "part").mkdir()
        (building / "part" / "x").write_text("new")
        assert not target.exists()
    assert tree(tmp_path) == {"a/b/part/x": b"new"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_new_behind(tmp_path: Path, overwrite: bool, error: BaseException) -> None:
    def write() -> None:
        with replace_folder(tmp_path / "model", overwrite=overwrite) as building:
            (building / "config.json").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_old_folder_survives_a_failure(old: Path) -> None:
    before = tree(old.parent)

    def write() -> None:
        with replace_folder(old, overwrite=True) as building:
            (building / "config.json").write_text("new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write()
    assert tree(old.parent) == before


def test_overwrite_replaces_the_whole_folder(old: Path) -> None:
    with replace_folder(old, overwrite=True) as building:
        (building / "config.json").write_text("new")
        assert tree(old) == {"config.json": OLD.encode(), "part/x": b"old"}
    assert tree(old.parent) == {"model/config.json": b"new"}
    assert [path.name for path in old.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_the_old_folder_comes_back_if_a_rename_fails(old: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(old.parent)
    calls = []
    rename = os.rename

    def unreliable(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", unreliable)
    with pytest.raises(OSError, match="disk gone"), replace_folder(old, overwrite=True) as building:
        (building / "config.json").write_text("new")
    assert tree(old.parent) == before


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with replace_folder(tmp_path / "model") as building:
        (building / "config.json").write_text("new")
    synced = ["fsync", "fsync", "rename", "fsync"]  # file, folder; then the parent
    assert events[events.index("fsync") :] == synced


def test_refuses_what_it_should_not_replace(tmp_path: Path, old: Path) -> None:
    file, foreign, link = tmp_path / "file", tmp_path / "foreign", tmp_path / "link"
    file.write_text("x")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    link.symlink_to(old)
    before = tree(tmp_path)
    cases = [
        (old, False, "exists; choose another destination, or overwrite it"),
        (file, True, "exists and is not a folder"),
        (link, True, "exists and is not a folder"),
        (foreign, True, "not a model folder of diffusers, so it is not overwritten"),
    ]
    for target, overwrite, message in cases:
        with pytest.raises(FileExistsError, match=message), replace_folder(target, overwrite=overwrite):
            raise AssertionError("the body must not run")
    assert tree(tmp_path) == before


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with replace_folder(tmp_path / "model") as building:
        (building / "x").write_text("new")
    assert tree(tmp_path) == {"model/x": b"new"}


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
@pytest.mark.parametrize("content", ['{"name": "my-site"}', "[1]", '{"_class_name": 3}', "{", "\xff"])
def test_a_config_json_of_something_else_makes_no_model_folder(tmp_path: Path, name: str, content: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / name).write_text(content, encoding="latin-1")
    (site / "index.html").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="not a model folder"), replace_folder(site, overwrite=True):
        raise AssertionError("the body must not run")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
def test_overwrite_takes_either_mark_of_diffusers(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(OLD)
    with replace_folder(tmp_path / "model", overwrite=True) as building:
        (building / "x").write_text("new")
    assert tree(tmp_path) == {"model/x": b"new"}


def test_of_two_runs_without_overwrite_the_later_one_fails_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with replace_folder(tmp_path / "model") as mine:
            (mine / "config.json").write_text("second")
            with replace_folder(tmp_path / "model") as first:
                (first / "config.json").write_text(OLD)

    with pytest.raises(FileExistsError, match="exists; choose another destination, or overwrite it"):
        write()
    assert tree(tmp_path) == {"model/config.json": OLD.encode()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_just_before_the_rename_is_kept(
    tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def beaten(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text(OLD)
        rename(source, target)

    def write() -> None:
        with replace_folder(tmp_path / "model", overwrite=overwrite) as building:
            (building / "config.json").write_text("second")
            monkeypatch.setattr(os, "rename", beaten)

    with pytest.raises(FileExistsError, match="exists; choose another destination"):
        write()
    assert tree(tmp_path) == {"model/config.json": OLD.encode()}


def test_of_two_overwriting_runs_one_is_whole_and_no_rest_is_left(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def beaten(source: Path, target: Path) -> None:
        if target == old:  # the old folder has stepped aside
            target.mkdir()
            (target / "config.json").write_text("theirs")
        rename(source, target)

    def write() -> None:
        with replace_folder(old, overwrite=True) as building:
            (building / "config.json").write_text("ours")
            monkeypatch.setattr(os, "rename", beaten)

    with pytest.raises(OSError, match="not empty"):
        write()
    assert tree(old.parent) == {"model/config.json": b"theirs"}


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_one(old: Path, replace: Any) -> None:
    target = old if replace is replace_folder else old / "config.json"
    before = tree(old.parent)

    def write() -> None:
        with replace(target, overwrite=True):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"^{target} was not written: No space left on device; make room") as caught:
        write()
    assert caught.value.__cause__ is not None
    assert tree(old.parent) == before


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_place_that_cannot_be_written_is_named_first(
    tmp_path: Path, replace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(target: Path, error: type[OSError], message: str) -> None:
        with pytest.raises(error, match=message), replace(target):
            raise AssertionError("the body must not run")

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "a" / "b", NotADirectoryError, f"b cannot be made: {tmp_path / 'file'} is not a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write where others may not
    refused(tmp_path / "a" / "b", PermissionError, f"{tmp_path} is not yours to write; choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    check_place(tmp_path / "a" / "b")
