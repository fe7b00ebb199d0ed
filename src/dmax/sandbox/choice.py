"""Which isolation works on this machine: the strongest is taken, and a fallback is named loudly."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from functools import cache

from dmax.errors import InputError, did_you_mean
from dmax.sandbox.isolation import BUBBLEWRAP, KINDS, WEAK, Limits
from dmax.sandbox.process import Job, supervise

PROBE = """
import os, socket
def is_denied(action):
    try:
        action()
    except OSError:
        return True
attempts = (lambda: open({0!r}), lambda: open({0!r}, "a"), lambda: open({0!r} + ".x", "w"), socket.socket, os.fork)
print(all([is_denied(action) for action in attempts]), open("scratch", "w").write("x"))
"""

log = logging.getLogger(__name__)


def choose(kind: str | None, allow_weak: bool) -> str:
    """The strongest isolation that works here, or `kind` if that does.

    Raises:
        InputError: unknown `kind`, one that does not work here, or only the weak one works and it
            is not allowed.
    """
    if os.name != "posix":
        raise InputError("model-written code runs on Linux and macOS only")
    if kind is not None and kind not in KINDS:
        raise InputError(
            f"unknown isolation {kind!r}; choose from {', '.join(KINDS)}", did_you_mean(kind, KINDS)
        )
    found = kind or next((name for name in KINDS if works(name)), WEAK)
    if found == WEAK and not allow_weak:
        hint = "install libseccomp and bubblewrap, or pass allow_weak=True if you trust the code"
        raise InputError(
            f"model-written code is not run with {WEAK}, and nothing stronger was found to work",
            hint,
        )
    if found != WEAK and not works(found):
        raise InputError(
            f"isolation {found!r} does not work on this machine", "leave the choice to dmax"
        )
    announce(found)
    return found


@cache
def works(kind: str) -> bool:
    """Whether a kind of isolation holds here, seen by a small program that tries to get out."""
    if (
        sys.platform != "linux"
        or kind == WEAK
        or (kind == BUBBLEWRAP and not shutil.which("bwrap"))
    ):
        return False
    config = {"role": "run", "program": PROBE.format(os.path.realpath(__file__))}
    with Job(kind, limits := Limits(), config) as job:
        try:
            return supervise([job], limits)[0] is None and job.text(1) == "True 1\n"
        except RuntimeError:
            return False


@cache
def announce(kind: str) -> None:
    """Say once if a fallback is active, and which."""
    if kind == WEAK:
        log.warning(
            "MODEL-WRITTEN CODE IS NOT ISOLATED: %s; files, network and processes are open to it",
            kind,
        )
    elif kind != BUBBLEWRAP:
        log.warning(
            "bubblewrap is missing or does not work: the weaker fallback %r holds model-written code",
            kind,
        )
