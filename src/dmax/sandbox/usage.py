"""What a process and its folder take up, as /proc and the folder show it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dmax.sandbox.isolation import MAX_ENTRIES

BYTES_OF_BLOCK = 512  # the unit of `st_blocks`


def family(pid: int) -> Iterator[int]:
    """A process and all below it, since a tool that isolates has the untrusted code as a child."""
    yield pid
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def threads(pid: int) -> list[str]:
    """The folder in /proc of each thread of a process; none where they cannot be seen."""
    folder = f"/proc/{pid}/task"
    try:
        return [f"{folder}/{thread}" for thread in os.listdir(folder)]
    except OSError:
        return []


def memory(pid: int) -> int:
    """Bytes in the memory of a process and in its page tables; 0 where they cannot be seen.

    The kernel's limit on address space leaves out page tables, and these can take twice as much as
    the pages if all of them lie far apart. A thread that has ended shows none of it.
    """
    return max((_memory_of_thread(thread) for thread in threads(pid)), default=0)


def _memory_of_thread(thread: str) -> int:
    kibibytes = 0
    with suppress(OSError):
        for line in Path(f"{thread}/status").read_text().splitlines():
            if line.startswith(("VmRSS:", "VmPTE:")):
                kibibytes += int(line.split()[1])
    return kibibytes * 1024


def content(folder: Path) -> tuple[int, int]:
    """Bytes and entries in a folder and below it.

    What cannot be looked into, because of its rights or its depth, counts as too many entries.
    """
    size = 0
    entries = 0
    pending = [str(folder)]
    while pending and entries <= MAX_ENTRIES:
        try:
            with os.scandir(pending.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * BYTES_OF_BLOCK
        except FileNotFoundError:
            continue  # it is gone since it was listed
        except OSError:
            return size, MAX_ENTRIES + 1
    return size, entries


def nameless(pid: int, folder: Path) -> int:
    """Bytes in the files without a name that a process holds open.

    Each thread is asked, since each may have descriptors of its own, and one that has ended hides
    those that the others share. The size of a file of `folder` that is mapped and no longer open
    cannot be seen, so it counts as more than any limit.
    """
    mapped: set[int] = set()  # inodes
    size_of: dict[int, int] = {}  # inode -> bytes
    for thread in threads(pid):
        mapped |= _mapped_nameless(thread, folder)
        with suppress(OSError), os.scandir(f"{thread}/fd") as descriptors:
            for descriptor in descriptors:
                with suppress(OSError):
                    info = descriptor.stat()
                    if stat.S_ISREG(info.st_mode) and info.st_nlink == 0:
                        size_of[info.st_ino] = info.st_blocks * BYTES_OF_BLOCK
    if mapped - size_of.keys():
        return sys.maxsize
    return sum(size_of.values())


def _mapped_nameless(thread: str, folder: Path) -> set[int]:
    """Inodes of the files of a folder that a thread has mapped and that have no name any more."""
    inodes = set()
    with suppress(OSError):
        for line in Path(f"{thread}/maps").read_bytes().splitlines():
            if line.endswith(b" (deleted)"):
                *_, inode, path = line.split(maxsplit=5)
                if path.startswith(os.fsencode(folder) + b"/"):
                    inodes.add(int(inode))
    return inodes
