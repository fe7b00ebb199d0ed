"""What tests of the sandbox share: the isolation that works here, and attempts in and outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache

import pytest

from dmax.sandbox import KINDS, Limits, run_python, works

HELD = [kind for kind in KINDS if works(kind)]  # every isolation that this machine has is attacked
NO_KERNEL = (
    "needs libseccomp, and bubblewrap, user namespaces or Landlock 3 (Linux 6.2); "
    "these do not work here"
)
every_isolation = pytest.mark.parametrize("kind", HELD)

LONG = 120.0  # seconds; not reached, however busy the machine is
TRY = """
import ctypes, fcntl, mmap, os, resource, socket, struct, subprocess, sys, termios
def succeeds(action):
    try:
        action()
    except (OSError, RuntimeError):
        return False
    return True
def system(*arguments):
    if ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments)) == -1:
        raise OSError
"""


def attempts(actions: str, **names: object) -> str:
    """A program that prints those expressions, one a line, that raise no error."""
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    lines += [
        f"if succeeds(lambda: {action}): print({action!r})"
        for action in actions.split("\n")
        if action
    ]
    return TRY + "\n".join(lines)


def successes(kind: str, actions: str, **names: object) -> list[str]:
    """The expressions, one a line, that a sandboxed program evaluates without an error."""
    program = attempts(actions, **names)
    outcome = run_python(program, isolation=kind, limits=Limits(seconds=LONG))
    assert outcome.passed, outcome
    return outcome.stdout.splitlines()


@cache
def run_outside(program: str, memory: int | None = None) -> str:
    """What a program prints without a sandbox, with no limit but one on its address space."""
    if memory is not None:
        limit = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))\n"
        program = limit + program
    command = [sys.executable, "-I", "-S", "-c", program]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=LONG, check=True
        ).stdout


def assert_only_outside(kind: str, actions: str, **names: object) -> None:
    """Each expression, one a line, works in a plain process, and none does in the sandbox."""
    expected = [action for action in actions.split("\n") if action]
    assert run_outside(attempts(actions, **names)).splitlines() == expected
    assert successes(kind, actions, **names) == []
