"""replace_folder, replace_file: write beside the destination, then rename into place: no half-written one exists."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convrot_quant.leftovers import beside, discard, held, sweep, temporary

MARKS = ("model_index.json", "config.json")  # one of these with diffusers' _class_name makes a model folder


@contextmanager
def replace_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder; on success it becomes `folder`, on any error it vanishes.

    An existing folder is refused without overwrite. With it, the old folder stays in place until the new one is
    complete and synced to disk, and comes back if the last rename fails. What is true of the destination is looked at
    again before the rename: of two runs without overwrite, the one that ends last fails.
    """
    target = Path(os.path.abspath(folder))
    sweep(target)
    _refuse(target, overwrite)
    check_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary(target, Path.mkdir) as building:
        yield building
        _sync(building)
        _refuse(target, overwrite)
        _swap(building, target, overwrite)
    _sync_folder(target.parent)


def check_place(path: str | Path) -> None:
    """Errors for a file or folder that cannot be made where it is to be, before there is anything to write."""
    nearest = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {nearest} is not a folder; choose another destination")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{path} cannot be made: {nearest} is not yours to write; choose another destination, or change its rights"
        )


def _refuse(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"{target} exists and is not a folder; choose another destination")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise _exists(target)
    if not any(_names_a_class(target / mark) for mark in MARKS):
        raise FileExistsError(
            f"{target} holds neither {' nor '.join(MARKS)} with a _class_name: not a model folder of diffusers, so it "
            "is not overwritten; choose another destination"
        )


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(
        f"{target} exists; choose another destination, or overwrite it (overwrite=True, --overwrite)"
    )


def _names_a_class(path: Path) -> bool:
    """Whether this is a JSON file that diffusers wrote: web projects and other tools have a config.json too."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and isinstance(data.get("_class_name"), str)


def _swap(building: Path, target: Path, overwrite: bool) -> None:
    """Rename the new folder into place; an old one steps aside first and is deleted last.

    A rename onto a folder with files in it fails, so nobody else's folder can be lost between a look and the rename.
    """
    if not overwrite or not target.exists():
        if os.name == "nt" and target.is_dir():
            target.rmdir()  # Windows renames onto nothing that exists, POSIX systems onto an empty folder
        try:
            os.rename(building, target)
        except OSError:
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise _exists(target) from None
            raise
        return
    with held(target) as start:
        aside = beside(target, "old", start)
        os.rename(target, aside)
        try:
            os.rename(building, target)
        finally:
            if target.exists():  # the new one, or that of another run which took the place
                rest = beside(target, "tmp", start)  # half-deleted it must never get its name back
                os.rename(aside, rest)
                discard(rest)
            else:
                os.rename(aside, target)


def _sync(folder: Path) -> None:
    """fsync every file and folder below, deepest first."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(file: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a sibling file to write; on success it becomes `file`, on any error it vanishes."""
    target = Path(os.path.abspath(file))
    sweep(target)
    _refuse_file(target, overwrite)
    check_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary(target, Path.touch) as building:
        yield building
        with building.open("rb+") as written:
            os.fsync(written.fileno())
        _refuse_file(target, overwrite)
        os.replace(building, target)
    _sync_folder(target.parent)


def _refuse_file(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise FileExistsError(f"{target} exists and is not a plain file; choose another destination")
    if target.exists() and not overwrite:
        raise _exists(target)
