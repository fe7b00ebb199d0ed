"""The folder of a job, which is locked while the job lives, and what killed processes have left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

if sys.platform != "win32":  # where the sandbox refuses to run, with a sentence of its own
    import fcntl

PREFIX = "dmax-sandbox-"
LOCK = "dmax-sandbox.lock"  # in the folder; without it, a folder of that name is somebody else's


@contextmanager
def job_folder() -> Iterator[Path]:
    """A fresh folder for a job, which is removed in the end.

    A process that was killed could not remove its folders, so the first job of the next one does.
    """
    remove_leftovers(tempfile.gettempdir())
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


@cache
def remove_leftovers(parent: str) -> None:
    """Remove this user's job folders whose owners have ended, once in the life of a process."""
    with suppress(PermissionError), os.scandir(parent) as entries:
        for entry in entries:
            # One that is in use, is somebody else's, or goes away meanwhile is left alone.
            with suppress(OSError, subprocess.CalledProcessError):
                if entry.name.startswith(PREFIX) and _is_own_folder(entry):
                    _remove_if_unlocked(Path(entry.path))


def remove(folder: Path) -> None:
    """Delete a job folder, the lock last: a removal that is cut short can then be taken up."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
        _delete(path)
    folder.rmdir()


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the descriptor that keeps it locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        with suppress(OSError):  # a file system without locks: this folder is never a left-over one
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)  # before the lock was taken, another process removed the folder


def _is_own_folder(entry: os.DirEntry[str]) -> bool:
    is_own = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    return is_own and entry.is_dir(follow_symlinks=False)


def _remove_if_unlocked(folder: Path) -> None:
    """Remove a job folder; raises `OSError` if its owner lives or it is no job folder."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(folder)
    finally:
        os.close(lock)


def _delete(path: Path) -> None:
    """Delete a file or a folder, whatever the depth and the rights in it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", path], check=True)
        subprocess.run(["rm", "-rf", path], check=True)
