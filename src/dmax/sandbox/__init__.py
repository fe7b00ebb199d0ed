"""Run model-written code, and judge it by tests that it cannot reach.

Untrusted code runs in a process of its own. The process has no network, one fresh folder as its
only writable place, and no environment or file descriptors of ours. It has limits on time, memory,
disk, output and threads, it cannot start further processes, and it is killed at the deadline.
bubblewrap isolates it where that works. Otherwise a weaker kind of isolation does, and a warning
says so. docs/sandbox.md has the details, and what is not covered.
"""

from __future__ import annotations

import builtins
import signal
import socket
import symtable
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dmax.errors import InputError
from dmax.sandbox.choice import choose, works
from dmax.sandbox.isolation import KINDS, Limits
from dmax.sandbox.process import STDERR, STDOUT, Job, last_line, supervise

__all__ = ["KINDS", "Limits", "Outcome", "check", "run_python", "works"]

PASSED = 86  # the exit status of tests that passed; no accident gives it
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # the second comes from a tool that isolates


@dataclass(frozen=True, slots=True)
class Outcome:
    """How untrusted code ended.

    Attributes:
        status: "passed"; "failed"; or the limit that ended it: "timeout" (wall-clock or processor
            time), "memory", "disk", "output", "threads".
        stdout: what it printed, at most `Limits.output` bytes.
        stderr: what it printed there, at most as much.
        detail: one line on why it did not pass; empty if it did.
        isolation: the kind of isolation that held it, one of `KINDS`.
    """

    status: str
    stdout: str
    stderr: str
    detail: str
    isolation: str

    @property
    def passed(self) -> bool:
        """Whether the program ended without an error, or the tests ran to their end."""
        return self.status == "passed"


def run_python(
    program: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    isolation: str | None = None,
    allow_weak: bool = False,
) -> Outcome:
    """Run a program; it has passed if its exit status is 0.

    Any program can give itself that status, so judge one by what it prints, or use `check`.

    Args:
        program: source code.
        stdin: what the program can read.
        limits: what the process may use; None for the defaults of `Limits`.
        isolation: one of `KINDS`; None for the strongest that works here.
        allow_weak: run the code even where nothing can hold it.

    Raises:
        InputError: no isolation works here and `allow_weak` is off, or `isolation` is none of
            `KINDS` or does not work here.
        RuntimeError: isolation could not be set up, so no untrusted code ran.
    """
    kind = choose(isolation, allow_weak)
    limits = limits or Limits()
    config = {"role": "run", "program": program}
    with Job(kind, limits, config, stdin.encode("utf-8", "replace")) as job:
        exceeded = supervise([job], limits)
    detail = last_line(job.text(STDERR)) or f"exit status {job.code}"
    return _outcome([job], job, exceeded, job.code == 0, detail)


def check(
    program: str,
    tests: str | Sequence[str],
    *,
    names: Sequence[str] | None = None,
    setup: str = "",
    limits: Limits | None = None,
    isolation: str | None = None,
    allow_weak: bool = False,
) -> Outcome:
    """Whether tests pass with a candidate's functions; the candidate cannot forge the verdict.

    Tests and candidate run in two sandboxed processes, and only plain data passes between them
    (sandbox/remote.py).

    Args:
        program: the candidate, source of a module.
        tests: trusted source, such as asserts; several are joined by line feeds. They have passed
            if they ran to their end.
        names: what the tests take from the candidate. None for every name that they use, that
            neither they nor `setup` define, and that is no built-in and no standard module. A
            function with such a name has to be given here.
        setup: trusted source that runs before the tests, such as imports and helpers; `names`
            override what it defines.
        limits: what each of the two processes may use; None for the defaults of `Limits`.
        isolation: one of `KINDS`; None for the strongest that works here.
        allow_weak: run the code even where nothing can hold it.

    Raises:
        InputError: tests and setup are not Python or take nothing from the candidate; and as
            `run_python`.
        RuntimeError: isolation could not be set up, so no untrusted code ran.
    """
    kind = choose(isolation, allow_weak)
    limits = limits or Limits()
    text = tests if isinstance(tests, str) else "\n".join(tests)
    free = _free_names(f"{setup}\n{text}") - set(names or ()) - set(dir(builtins))
    modules = free & sys.stdlib_module_names
    names = sorted(free - modules) if names is None else list(names)
    if not names:
        raise InputError(
            "the tests use nothing of the candidate",
            hint="name what they test: check(..., names=['function'])",
        )
    setup += "".join(f"\nimport {module}" for module in modules)
    trusted = {"role": "check", "tests": text, "setup": setup, "names": names, "passed": PASSED}
    untrusted = {"role": "serve", "program": program}
    checker_end, candidate_end = socket.socketpair()
    with (
        checker_end,
        candidate_end,
        Job(kind, limits, trusted, channel=checker_end.fileno()) as checker,
        Job(kind, limits, untrusted, channel=candidate_end.fileno()) as candidate,
    ):
        # With no copy of the ends left here, each process sees it when the other one ends.
        checker_end.close()
        candidate_end.close()
        exceeded = supervise([checker, candidate], limits)
    detail = last_line(checker.text(STDERR)) or f"the tests ended with exit status {checker.code}"
    return _outcome([checker, candidate], candidate, exceeded, checker.code == PASSED, detail)


def _free_names(source: str) -> set[str]:
    """Global names that source uses and does not bind; raises `InputError` if it is not Python."""
    try:
        top = symtable.symtable(source, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"the tests are not Python: {error}") from None
    bound = {
        symbol.get_name()
        for symbol in top.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }
    used = {
        symbol.get_name()
        for scope in _scopes(top)
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and (scope is top or symbol.is_global())
    }
    return used - bound


def _scopes(top: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """A scope and all those inside it."""
    yield top
    for child in top.get_children():
        yield from _scopes(child)


def _outcome(
    jobs: Sequence[Job], shown: Job, exceeded: str | None, passed: bool, detail: str
) -> Outcome:
    """The outcome of jobs that have ended; `shown` is the one whose output it has."""
    limits = shown.limits
    status = exceeded or ("passed" if passed else "failed")
    if status == "failed":
        if any(_used_up_time(job) for job in jobs):
            status = "timeout"
        elif detail.startswith("MemoryError"):
            status = "memory"
    details = {
        "passed": "",
        "timeout": f"took more than {limits.seconds:g} s, "
        f"or {limits.cpu_seconds:g} s of processor time",
        "memory": f"took more than {limits.memory} bytes of memory",
        "disk": f"wrote more than {limits.disk} bytes, too many files, "
        "or a folder that cannot be looked into",
        "output": f"printed more than {limits.output} bytes",
        "threads": f"ran more than {limits.threads} threads",
    }
    detail = details.get(status, detail)
    return Outcome(status, shown.text(STDOUT), shown.text(STDERR), detail, shown.kind)


def _used_up_time(job: Job) -> bool:
    """Whether the kernel killed a job for the processor time that it used.

    The kernel compares the limit with a coarser count than `cpu_seconds`, and on a busy machine the
    two differ.
    """
    return job.code in KILLED and job.cpu_seconds > job.limits.cpu_seconds / 2
