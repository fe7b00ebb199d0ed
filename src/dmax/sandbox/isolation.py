"""What holds a process: its limits, and for each kind of isolation the command that starts it and its settings."""

from __future__ import annotations

import math
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dmax.errors import InputError

# Strongest first. `namespaces` builds by itself what bubblewrap builds, `landlock` filters files
# and system calls in place, and the last one stops accidents rather than attacks.
KINDS = ("bubblewrap", "namespaces", "landlock", "limits only")
BUBBLEWRAP = KINDS[0]
WEAK = KINDS[-1]
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SCRATCH = "/scratch"  # the writable folder, where the process has a root of its own
MAX_ENTRIES = 4096  # files and folders in it
READY = "\0ready\n"  # on stderr between giving up rights and running foreign code

BOOT = """
import json, os, sys
config = json.loads(os.read(0, int(sys.argv[1])))
sys.argv[1:] = []
jail, remote = {"__name__": "jail"}, {"__name__": "remote"}
exec(config["jail_source"], jail)
exec(config["remote_source"], remote)
jail["confine"](config["jail"])
os.write(2, config["ready"].encode())
remote["main"](config)
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process may use; all positive.

    Attributes:
        seconds: wall-clock time from when foreign code may start.
        cpu_seconds: processor time, rounded up to whole seconds.
        memory: bytes of address space.
        disk: bytes in the temporary folder, which holds at most 4,096 files and folders.
        output: bytes on each of stdout and stderr.
        threads: threads at once; there is one process.

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
            number = int if field.type == "int" else int | float
            if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
                kind = "whole number" if number is int else "number"
                raise InputError(f"`{field.name}` must be a positive {kind}, got {value!r}")


def readable() -> list[str]:
    """What foreign code may read: the interpreter's library and the system's."""
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    folders = ("lib", sys.platlibdir)
    library = [os.path.join(prefix, folder) for prefix in prefixes for folder in folders]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    paths: list[str] = []
    for path in (*system, *library, sysconfig.get_path("stdlib")):
        if os.path.exists(path) and not any(Path(path).is_relative_to(other) for other in paths):
            paths.append(path)
    return paths


def interpreter() -> str:
    """The interpreter itself rather than a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def command(kind: str, limits: Limits) -> list[str]:
    """The command that starts an interpreter on `BOOT` in this kind of isolation."""
    python = [interpreter(), "-I", "-S", "-B", "-u", "-X", "utf8", "-c"]
    if kind != BUBBLEWRAP:
        return [*python, BOOT]
    readables = [*readable(), interpreter()]
    devices = filter(os.path.exists, DEVICES)
    options = ["--unshare-all", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"]
    options += [word for path in readables for word in ("--ro-bind", path, path)]
    options += [word for path in devices for word in ("--dev-bind", path, path)]
    options += [
        "--size",
        str(limits.disk),
        "--tmpfs",
        SCRATCH,
        "--chdir",
        SCRATCH,
        "--remount-ro",
        "/",
    ]
    return [shutil.which("bwrap") or "bwrap", *options, "--", *python, BOOT]


def settings(kind: str, limits: Limits, folder: Path) -> dict[str, Any]:
    """What `jail.confine` does; `folder` is the writable one, or where the root is made that will hold it."""
    return {
        "namespaces": kind == "namespaces",
        "landlock": kind == "landlock",  # required rather than one more layer
        "is_weak": kind == WEAK,
        "readable": readable(),
        "devices": [path for path in DEVICES if os.path.exists(path)],
        "folder": str(folder),
        "scratch": str(folder) if kind in ("landlock", WEAK) else SCRATCH,
        "cpu_seconds": math.ceil(limits.cpu_seconds),
        "memory": limits.memory,
        "disk": limits.disk,
        "entries": MAX_ENTRIES,
    }
