"""Files and folders that are written whole or not at all, and files that grow line by line.

New content is written beside its place under a hidden name and takes the place in one step, so an
interruption or a full disk leaves what was there before.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from dmax.errors import InputError, shorten

LEAST_SPACE = 2**20  # bytes free on a disk that is worth beginning to write on
MAX_SETTINGS = 16 * 2**20  # bytes of a file of settings; published ones have up to 2 MiB
LARGEST_RECORD = 2**24  # bytes that tell whose a file is

TO_UTF8 = "convert it, for example with iconv -t UTF-8"

LARGEST_FILE = 2 << 30
"""Bytes of a JSONL file that is read whole; its records take a multiple of them in memory."""
LONGEST_LINE = 8_000_000
"""Bytes of one of its lines: a conversation of two million tokens."""


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Say in one sentence that something cannot be written, whatever the library that writes it.

    On a full disk, torch and safetensors raise errors of their own.

    Raises:
        InputError: in place of the library's error.
    """
    try:
        yield
    except InputError:
        raise
    # A name with a NUL, or with a lone surrogate where the system takes UTF-8, is a ValueError.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(
            f"cannot write {shorten(str(what))}: {reason}",
            hint="choose another output, or free some space",
        ) from error


def check_writable(path: Path) -> None:
    """Make sure that a file can be made at `path`; asked before hours of computing, not after.

    Nothing is left behind: the folders above `path` are made when it is written.

    Raises:
        InputError: `path` is no file, nothing can be written there, or the disk is full.
    """
    with writing(path):
        _check_kind(path)
        check_new_folder(path)


def _check_kind(path: Path) -> None:
    """Refuse to replace what is not a file: a folder, a device, a pipe."""
    if path.is_dir():
        raise InputError(f"cannot write {shorten(str(path))}: it is a folder", hint="name a file")
    if path.exists() and not path.is_file():
        raise InputError(
            f"cannot write {shorten(str(path))}: it is a device or a pipe", hint="name a file"
        )


def check_new_folder(path: Path) -> None:
    """Make sure that `new_folder` can begin at `path`, or a file be made; nothing is left behind.

    No folder is made. A process that is killed here leaves at most an empty file, which
    `remove_leftovers` finds where the folder of `path` exists.

    Raises:
        OSError: nothing can be written beside `path`.
    """
    path = path.absolute()
    held = next(folder for folder in path.parents if folder.exists())
    for name in path.relative_to(held).parts:
        (held / name).exists()  # fails for a name that is too long
    probe = _beside(held / path.name)
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may have swept it
    if shutil.disk_usage(held).free < LEAST_SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_ours(path: Path, *keys: str) -> None:
    """Make sure that what stands at `path`, if anything does, is a record of ours.

    A record is a JSON object with these keys, in the whole file or in its first line. An empty file
    counts as ours, since nothing in it can be lost.

    Raises:
        InputError: it is something else, which has to stay as it is.
    """
    if not path.exists():
        return
    data = b"nothing that can be replaced"
    if path.is_file():
        with path.open("rb") as file:
            data = file.read(LARGEST_RECORD)
    records = [_json(text) for text in (data, data.partition(b"\n")[0])]
    if data and not any(isinstance(each, dict) and each.keys() >= set(keys) for each in records):
        raise InputError(
            f"{shorten(str(path))} exists and was not written by this command",
            hint="choose another output",
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; a text is written as UTF-8.

    Raises:
        InputError: the place cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = _beside(path)
    try:
        with writing(path):
            _check_kind(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
    finally:
        if partial.exists():
            partial.unlink()


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The JSON object that a file of at most so many bytes holds, with finite numbers only.

    Raises:
        InputError: it holds something else, or cannot be read.
    """
    shown = shorten(str(path))
    try:
        if not path.is_file():
            raise ValueError("no file")
        if path.stat().st_size > most:
            raise ValueError(f"more than {most} bytes")
        record = json.loads(path.read_bytes(), parse_constant=_not_finite)
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{shown} is damaged: {shorten(reason)}") from None
    return record


def read_lines(path: Path) -> tuple[list[bytes], bytes]:
    """The lines of a file that grows line by line, and what stands after the last of them.

    The rest is a line that was cut off by an interruption. Only a newline ends a line: texts may
    hold other separators. A file that does not exist has no lines.

    Raises:
        InputError: `path` is no file.
    """
    with writing(path):
        _check_kind(path)
        data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    return lines, rest


def check_readable(path: Path, largest: int | None = LARGEST_FILE) -> None:
    """Make sure that a file can be read to its end.

    Args:
        path: of the file.
        largest: bytes that it may have; None for a file that is read piece by piece.

    Raises:
        InputError: the file is missing or too large, or it is a device or a pipe, which may never
            end.
    """
    with _reading(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"cannot read {shorten(str(path))}: it is a device or a pipe", hint="name a file"
        )
    if largest is not None and status.st_size > largest:
        raise InputError(
            f"cannot read {shorten(str(path))}: it is larger than {largest >> 30} GiB",
            hint="split it into several files",
        )


def json_lines(path: Path, largest: int | None = LARGEST_FILE) -> Iterator[tuple[str, Any]]:
    """What stands in the lines of a JSONL file, each after its place, `path:number`.

    Blank lines are skipped. Only a newline ends a line, as in `read_lines`. One line is in memory
    at a time.

    Args:
        path: of the file.
        largest: as `check_readable` takes it.

    Raises:
        InputError: the file cannot be read (`check_readable`), or a line is too long or not JSON,
            when it is its turn.
    """
    check_readable(path, largest)
    for number, line in enumerate(_bounded_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > LONGEST_LINE:
            raise InputError(f"{where}: a line of more than {LONGEST_LINE:,} bytes")
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise InputError(f"{where}: not UTF-8 text", hint=TO_UTF8) from None
        except (ValueError, RecursionError) as error:  # not JSON, or nested too deep
            raise InputError(f"{where}: not a JSON object ({error})") from None
        yield where, record


def _bounded_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, only so much that one can see it."""
    with _reading(path), path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            yield line


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in one sentence that a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {shorten(str(path))}: {error.strerror}") from None
    except ValueError as error:  # a name with a NUL
        raise InputError(f"cannot read {shorten(str(path))}: {error}") from None


def drop_unfinished_line(path: Path) -> None:
    """Remove from a file of ours what stands after its last newline."""
    _, rest = read_lines(path)
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))


def append(path: Path, text: str) -> None:
    """Write a text to the end of a file; raises `InputError` if that cannot be done.

    The system is asked once, so that a process that is killed has written all of it or nothing;
    only a disk that fills up takes a part.
    """
    left = memoryview(text.encode())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            while left:
                left = left[file.write(left) :]


def changes(
    previous: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where settings that a file holds differ from those of now: dotted name, old and new value.

    What is missing counts as None.
    """
    for name in dict.fromkeys([*previous, *now]):
        old = previous.get(name)
        new = now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` once all of it is written.

    After an error or an interruption, `path` is as it was.

    Raises:
        OSError: the folder cannot be made or moved.
    """
    partial = _beside(path)
    old = _beside(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def leftovers(path: Path) -> list[Path]:
    """What writes of `path` that were killed have left beside it."""
    path = path.resolve()  # a link is written through
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    beside = path.parent.glob(".*.partial")  # none if there is no such folder
    return [entry for entry in beside if ours.fullmatch(entry.name)]


def remove_leftovers(path: Path) -> None:
    """Remove what writes of `path` that were killed have left; nobody may be writing it now."""
    with writing(path):
        for entry in leftovers(path):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def read_record(path: Path) -> Any:
    """What a JSON file of ours holds; None if it holds something else.

    Raises:
        InputError: the file cannot be read.
    """
    check_readable(path, None)
    with _reading(path), path.open("rb") as file:
        return _json(file.read(LARGEST_RECORD))


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _beside(path: Path) -> Path:
    """A name in the same folder that nothing has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
