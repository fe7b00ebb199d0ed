"""The kinds of isolation, the limits of one process, and the command that starts it."""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dmax.errors import InputError

BUBBLEWRAP = "bubblewrap"  # the tool bwrap builds a root folder that holds only what is needed
NAMESPACES = "namespaces"  # the process builds the same by itself
LANDLOCK = "landlock"  # the process keeps its root folder, and the kernel refuses most files
WEAK = "limits only"  # holds accidents rather than attacks
KINDS = (BUBBLEWRAP, NAMESPACES, LANDLOCK, WEAK)  # strongest first

# Without /dev/zero: mapped, it is shared memory that no limit counts once it is unmapped in part.
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
SCRATCH = "/scratch"  # the writable folder where the process has a root folder of its own
MAX_ENTRIES = 4096  # files and folders in the writable folder
READY = b"\0ready\n"  # written to stderr after rights are given up, before untrusted code runs

BOOT = f"""
import json, os, sys
config = json.loads(os.read(0, int(sys.argv.pop())))
jail = dict(__name__="jail")
remote = dict(__name__="remote")
exec(config["jail_source"], jail)
exec(config["remote_source"], remote)
jail["confine"](config["jail"])
os.write(2, {READY!r})
remote["main"](config)
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process may use; every limit is positive.

    Attributes:
        seconds: wall-clock time, counted from when untrusted code may start.
        cpu_seconds: processor time, rounded up to whole seconds.
        memory: bytes of address space, and of memory together with page tables.
        disk: bytes in the writable folder, which holds at most 4,096 files and folders.
        output: bytes on each of stdout and stderr.
        threads: threads at the same time.

    Raises:
        InputError: a limit is not a positive number.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    output: int = 1 << 20
    threads: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_whole = field.type == "int"
            is_number = isinstance(value, int if is_whole else int | float)
            if not is_number or isinstance(value, bool) or not 0 < value < math.inf:
                kind = "whole number" if is_whole else "number"
                raise InputError(f"`{field.name}` must be a positive {kind}, got {value!r}")


def readable_paths() -> list[str]:
    """What untrusted code may read: the libraries of the interpreter and of the system."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    python = [os.path.join(prefix, name) for prefix in prefixes for name in ("lib", sys.platlibdir)]
    return [path for path in dict.fromkeys(system + python) if os.path.exists(path)]


def command(kind: str) -> list[str]:
    """The command that starts an interpreter on `BOOT` in this kind of isolation."""
    # The interpreter itself, since a virtual environment only has a link to it.
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    python = [interpreter, "-I", "-S", "-B", "-u", "-X", "utf8", "-c", BOOT]
    if kind != BUBBLEWRAP:
        return python
    options = ["--unshare-all", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"]
    options += ["--cap-add", "CAP_SYS_ADMIN"]  # to mount the writable folder; `jail` gives it up
    for path in (*readable_paths(), interpreter):
        options += ["--ro-bind", path, path]
    for path in DEVICES:
        options += ["--dev-bind-try", path, path]
    options += ["--dir", SCRATCH, "--remount-ro", "/"]
    return [shutil.which("bwrap") or "bwrap", *options, "--", *python]


def jail_settings(kind: str, limits: Limits, folder: Path) -> dict[str, Any]:
    """What `jail.confine` has to know.

    `folder` becomes the writable folder, or the root folder that the writable one lies in.
    """
    has_own_root = kind in (BUBBLEWRAP, NAMESPACES)
    return {
        "kind": kind,
        "root": str(folder),
        "scratch": SCRATCH if has_own_root else str(folder),
        "readable": readable_paths(),
        "devices": [path for path in DEVICES if os.path.exists(path)],
        "cpu_seconds": math.ceil(limits.cpu_seconds),
        "memory": limits.memory,
        "disk": limits.disk,
        "entries": MAX_ENTRIES,
    }
