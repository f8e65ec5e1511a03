"""replace_folder: write a folder beside its destination, then rename it into place: no half-written one exists."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKS = ("config.json", "model_index.json")  # a folder with none of these is not ours to delete


@contextmanager
def replace_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder; on success it becomes `folder`, on any error it vanishes.

    An existing folder is refused without overwrite. With it, the old folder stays in place until the new one is
    complete and synced to disk, and comes back if the last rename fails.
    """
    target = Path(os.path.abspath(folder))
    _refuse(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    building.mkdir()
    try:
        yield building
        _sync(building)
        _swap(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _refuse(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"{target} exists and is not a folder; choose another destination")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists; choose another destination, or overwrite it (overwrite=True, --overwrite)"
        )
    if not any((target / mark).is_file() for mark in MARKS):
        raise FileExistsError(
            f"{target} holds neither {' nor '.join(MARKS)}: not a model folder, so it is not overwritten"
        )


def _swap(building: Path, target: Path) -> None:
    """Rename the new folder into place; an old one steps aside first and is deleted last."""
    if not target.exists():
        os.rename(building, target)
        return
    aside = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    os.rename(target, aside)
    try:
        os.rename(building, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
