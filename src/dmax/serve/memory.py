"""Memory that was freed and that malloc keeps, given back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import sys

SECONDS_BETWEEN = 10.0


async def give_back_freed_memory() -> None:
    """Give it back every ten seconds, for as long as a server runs; takes some 3 ms each time.

    In bfloat16 a CPU compiles code for every new shape of a product. oneDNN keeps the last thousand
    of them, half a MiB each, and the gaps between those that go and those that come are what makes
    a server grow for hours.
    """
    trim = _trim()
    while trim is not None:
        await asyncio.sleep(SECONDS_BETWEEN)
        trim(0)


def _trim() -> ctypes._NamedFuncPointer | None:
    """The `malloc_trim` of glibc; None where there is another malloc."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
