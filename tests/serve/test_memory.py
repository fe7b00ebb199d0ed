"""Freed memory goes back to the system while a server runs."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from pathlib import Path

import pytest

from dmax.serve import memory

BLOCKS = 4096
SIZE = 65_536  # bytes; malloc takes such blocks from its heap


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_all_but_the_last() -> None:
    """Leave a gap of 256 MiB in the heap, below a block that is still used."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    blocks = [libc.malloc(SIZE) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks[:-1]:
        libc.free(block)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SECONDS_BETWEEN", 0.0)
    free_all_but_the_last()

    async def serve() -> int:
        before = resident()
        task = asyncio.create_task(memory.give_back_freed_memory())
        while before - resident() < BLOCKS * SIZE // 2 and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        return before - resident()

    assert asyncio.run(serve()) >= BLOCKS * SIZE // 2


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_trim", lambda: None)
    asyncio.run(memory.give_back_freed_memory())
