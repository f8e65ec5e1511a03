"""What killed runs leave beside a destination: the next run removes it, and nothing that may still be written."""

import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from convrot_quant import leftovers
from convrot_quant.folders import replace_file, replace_folder

pytestmark = pytest.mark.skipif(leftovers.START is None, reason="this system has no locks or no name of its start")

OLD = '{"_class_name": "FluxTransformer2DModel"}'
WRITING = """
import os, signal, sys
from convrot_quant import folders
target, kind, dying_at = sys.argv[1:]
rename, calls = os.rename, []
def dying(source, to):
    calls.append(to)
    if dying_at == str(len(calls)):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, to)
os.rename = dying
replace = folders.replace_file if kind == "file" else folders.replace_folder
with replace(target, overwrite=True) as building:
    (building if kind == "file" else building / "config.json").write_text("new")
    if dying_at == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
    if dying_at == "never":
        print("writing", flush=True)
        sys.stdin.read()
"""


def start(target: Path, kind: str, dying_at: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITING, str(target), kind, dying_at]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(target: Path, kind: str, dying_at: str) -> None:
    process = start(target, kind, dying_at)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL


@contextmanager
def writer(target: Path, kind: str) -> Iterator[None]:
    """A process that is writing this target."""
    process = start(target, kind, "never")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield
    process.communicate(timeout=120)
    assert process.returncode == 0


def sweep(target: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leftovers.sweep(target)
    return [str(warning.message) for warning in caught]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a [b]* é"
    kill(target, kind, "inside")
    left = next(tmp_path.iterdir())
    replace = replace_file if kind == "file" else replace_folder
    message = re.escape(f"removed {left}, left by a run that was killed")

    def run_again() -> None:
        with replace(target) as building:
            (building if kind == "file" else building / "x").write_text("new")
            assert names(tmp_path) == [building.name]

    with pytest.warns(UserWarning, match=message):
        run_again()
    assert names(tmp_path) == [target.name]
    assert sweep(target) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_writes_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    with writer(target, kind):
        before = names(tmp_path)
        assert len(before) == 1
        assert sweep(target) == []
        assert names(tmp_path) == before
    assert names(tmp_path) == ["out"]
    assert (target if kind == "file" else target / "config.json").read_text() == "new"


def test_in_one_process_too(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out") as building:
        (building / "x").write_text("new")
        assert sweep(tmp_path / "out") == []
        assert (building / "x").read_text() == "new"


def test_what_may_be_somebody_elses_is_named_and_stays(tmp_path: Path) -> None:
    here = leftovers.START
    foreign = [".out.tmp-01234567", ".out.tmp-01234567-0123456789ab", f".out.old-0123456a-{here[::-1]}"]
    others = [f".out2.tmp-01234567-{here}", f".out.tmp-01234567-{here}.d", "out.tmp-01234567", f".out.tmp-x-{here}"]
    for name in (*foreign, *others):
        (tmp_path / name).mkdir()
    link = tmp_path / f".out.tmp-89abcdef-{here}"
    link.symlink_to(tmp_path / others[0])
    before = names(tmp_path)
    said = sweep(tmp_path / "out")
    assert names(tmp_path) == before
    assert [text.partition(" alone: ")[0] for text in said] == [f"left {tmp_path / name}" for name in sorted(foreign)]
    assert all(text.endswith("delete it if none does") for text in said)


def test_where_no_lock_is_had_nothing_claims_to_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(leftovers.fcntl, "flock", none)
    with replace_folder(tmp_path / "out") as building:
        assert re.fullmatch(r"\.out\.tmp-[0-9a-f]{8}", building.name)
        (building / "x").write_text("new")
        assert [text.startswith(f"left {building} alone") for text in sweep(tmp_path / "out")] == [True]
    assert names(tmp_path) == ["out"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(OLD)
    return tmp_path / "out"


def test_killed_between_the_renames_the_old_folder_comes_back(old: Path) -> None:
    kill(old, "folder", "3")  # after the name with the start, and the step aside
    assert not old.exists()
    said = sorted(sweep(old))
    assert said[0] == f"put {old} back: a run that was killed had moved it aside"
    assert said[1].startswith(f"removed {old.parent}")
    assert len(said) == 2
    assert names(old.parent) == ["out"]
    assert (old / "config.json").read_text() == OLD


def test_killed_after_the_renames_the_new_folder_stays(old: Path) -> None:
    kill(old, "folder", "4")  # the old one, aside, was to be deleted
    assert (old / "config.json").read_text() == "new"
    assert len(sweep(old)) == 1
    assert names(old.parent) == ["out"]
    assert (old / "config.json").read_text() == "new"


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(tmp_path / "out", "file", "inside")
    left = next(tmp_path.iterdir())

    def denied(path: Path, *, missing_ok: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", denied)
    assert sweep(tmp_path / "out") == [f"cannot remove {left}: Permission denied"]
    assert names(tmp_path) == [left.name]
