"""Choose the strongest isolation that works on this machine, and warn if it is not the best."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from functools import cache

from dmax.errors import InputError, did_you_mean
from dmax.sandbox.isolation import BUBBLEWRAP, KINDS, WEAK, Limits
from dmax.sandbox.process import Job, supervise

# A program that fails if one of five attempts to get out succeeds; {outside!r} is a file outside.
TRIAL = """
import os, socket
escapes = []
for attempt in (
    lambda: open({outside!r}),
    lambda: open({outside!r}, "a"),
    lambda: open({outside!r} + ".new", "w"),
    socket.socket,
    os.fork,
):
    try:
        attempt()
        escapes.append(attempt)
    except OSError:
        pass
open("file", "w").close()
assert not escapes
"""

log = logging.getLogger(__name__)


def choose(kind: str | None, allow_weak: bool) -> str:
    """The strongest isolation that works here, or `kind` if that one works.

    Raises:
        InputError: `kind` is unknown or does not work here, or only the weak one works and it is
            not allowed.
    """
    if os.name != "posix":
        raise InputError("model-written code runs on Linux and macOS only")
    if kind is not None and kind not in KINDS:
        raise InputError(
            f"unknown isolation {kind!r}; choose from {', '.join(KINDS)}",
            hint=did_you_mean(kind, KINDS),
        )
    chosen = kind or next((name for name in KINDS if works(name)), WEAK)
    if chosen == WEAK and not allow_weak:
        raise InputError(
            f"model-written code is not run with {WEAK}, and nothing stronger was found to work",
            hint="install libseccomp and bubblewrap, or pass allow_weak=True if you trust the code",
        )
    if chosen != WEAK and not works(chosen):
        raise InputError(
            f"isolation {chosen!r} does not work on this machine", hint="leave the choice to dmax"
        )
    announce(chosen)
    return chosen


@cache
def works(kind: str) -> bool:
    """Whether a kind of isolation holds a small program that tries to get out."""
    if sys.platform != "linux" or kind == WEAK:
        return False
    if kind == BUBBLEWRAP and not shutil.which("bwrap"):
        return False
    limits = Limits()
    config = {"role": "run", "program": TRIAL.format(outside=os.path.realpath(__file__))}
    with Job(kind, limits, config) as job:
        try:
            exceeded = supervise([job], limits)
        except RuntimeError:
            return False
        return exceeded is None and job.code == 0


@cache
def announce(kind: str) -> None:
    """Warn once if the isolation is not the strongest one."""
    if kind == WEAK:
        log.warning(
            "MODEL-WRITTEN CODE IS NOT ISOLATED: %s; files, network and processes are open to it",
            kind,
        )
    elif kind != BUBBLEWRAP:
        log.warning(
            "bubblewrap is missing or does not work: "
            "the weaker fallback %r holds model-written code",
            kind,
        )
