"""Names beside a destination that runs write under, and what killed runs leave of them: the next run removes it.

A run writes as `.NAME.tmp-RANDOM-START`, and the folder that it replaces steps aside as `.NAME.old-RANDOM-START`. While
it lives it holds a lock (flock) on that file or folder itself, which the system lets go of however the process ends.
START is one start of one system, and in the name only where the lock is held. On a network file system locks of other
hosts may not be seen here, so what has another START, or none, is left alone: somebody may be writing it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows opens no folder, so there is nothing to lock: nothing is removed there
    fcntl = None  # type: ignore[assignment]


def _start() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").replace("-", "")[:12]
    except OSError:
        return None


FULL = (errno.ENOSPC, errno.EDQUOT)
START = None if fcntl is None else _start()


def beside(target: Path, kind: Literal["tmp", "old"], start: str | None = None) -> Path:
    """A new hidden name in the target's folder."""
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}" + (f"-{start}" if start else ""))


@contextmanager
def temporary(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a path beside the target where `make` made a file or folder, held; on any error it vanishes."""
    bare = path = beside(target, "tmp")
    try:
        make(bare)  # inside, since a signal may come right after it
        with held(bare) as start:
            if start:
                path = beside(target, "tmp", start)
                os.rename(bare, path)
            yield path
    except BaseException as error:
        discard(bare)
        discard(path)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(
                f"{target} was not written: {os.strerror(error.errno)}; make room, or choose another destination"
            ) from error
        raise


@contextmanager
def held(path: Path) -> Iterator[str | None]:
    """Hold the lock of a file or folder, which follows it through renames. Yields START, or None without a lock."""
    try:
        handle = _lock(path) if START else None
    except OSError:  # somebody has it, or the file system has no locks
        handle = None
    try:
        yield None if handle is None else START
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path) -> int:
    """A handle that has the lock. BlockingIOError: a living process has it; OSError: it cannot be had here."""
    # NFS locks only what is open for writing, and no folder can be: folders there are never removed
    handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


def discard(path: Path) -> None:
    """Remove a file or folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(target: Path) -> None:
    """Remove what killed runs for this target left; an old folder without a successor gets its name back."""
    for path, kind, start in _leftovers(target):
        try:
            handle = _lock(path) if START and start == START else None
        except (BlockingIOError, FileNotFoundError):
            continue  # a run for the same target that lives, or has just ended
        except OSError:
            handle = None
        if handle is None:
            _say(f"left {path} alone: a run of another host, or before a restart, may own it; delete it if none does")
            continue
        try:
            _clear(path, kind, target)
        finally:
            os.close(handle)


def _leftovers(target: Path) -> list[tuple[Path, str, str | None]]:
    """(path, kind, START or None) of each; links are none of ours."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-[0-9a-f]{{8}}(?:-([0-9a-f]+))?")
    try:
        entries = sorted(os.scandir(target.parent), key=lambda entry: entry.name)
    except OSError:
        return []  # the run itself will say what is wrong with the folder
    found = [(entry, ours.fullmatch(entry.name)) for entry in entries if not entry.is_symlink()]
    return [(Path(entry.path), match[1], match[2]) for entry, match in found if match]


def _clear(path: Path, kind: str, target: Path) -> None:
    try:
        if kind == "old" and not os.path.lexists(target):
            os.rename(path, target)
            _say(f"put {target} back: a run that was killed had moved it aside")
        elif path.exists():  # it may have got its name while the lock was waited for
            discard(path)
            _say(f"removed {path}, left by a run that was killed" if not path.exists() else f"cannot remove {path}")
    except OSError as error:
        _say(f"cannot remove {path}: {error.strerror}")


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=2)
