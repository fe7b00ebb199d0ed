"""Run model-written code, and judge it by tests that it cannot reach.

Foreign code runs in a process of its own: no network, a fresh temporary folder as its only writable
place, limits on time, memory, disk, output and threads, no further processes, no inherited
environment or file descriptors; it is killed at the deadline. bubblewrap isolates it where it
works; otherwise namespaces, otherwise Landlock and seccomp do, and a warning says so.
docs/sandbox.md has the details, and what is not covered.
"""

from __future__ import annotations

import builtins
import signal
import socket
import symtable
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from dmax.errors import InputError
from dmax.sandbox.choice import choose, works
from dmax.sandbox.isolation import KINDS, Limits
from dmax.sandbox.process import Job, last_line, supervise

__all__ = ["KINDS", "Limits", "Outcome", "check", "run_python", "works"]

PASSED = 86  # the exit status by which the checker says so; no accident gives it
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # the second comes from a tool that isolates


@dataclass(frozen=True, slots=True)
class Outcome:
    """How foreign code ended.

    Attributes:
        status: "passed"; "failed"; or the limit that ended it: "timeout" (wall clock or processor
            time), "memory", "disk", "output", "threads".
        stdout: what it printed, at most `Limits.output` bytes; `stderr` likewise.
        detail: one line on why it did not pass; empty if it did.
        seconds: wall-clock time of the foreign code.
        isolation: what held it, one of `KINDS`.
    """

    status: str
    stdout: str
    stderr: str
    detail: str
    seconds: float
    isolation: str

    @property
    def passed(self) -> bool:
        """Whether the program ended without an error (`run_python`) or the tests ran to their end (`check`)."""
        return self.status == "passed"


def run_python(
    program: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    isolation: str | None = None,
    allow_weak: bool = False,
) -> Outcome:
    """Run a program. Passed means exit status 0, which any program can give itself: judge it by what it prints.

    Raises:
        InputError: no isolation works here and `allow_weak` is off, or `isolation` is none of
            `KINDS` or does not work.
        RuntimeError: isolation could not be set up, so no foreign code ran.
    """
    kind = choose(isolation, allow_weak)
    limits = limits or Limits()
    with Job(
        kind, limits, {"role": "run", "program": program}, stdin.encode("utf-8", "replace")
    ) as job:
        exceeded, seconds = supervise([job], limits)
    detail = last_line(job.text(2)) or f"exit status {job.code}"
    return conclude(job, [job], exceeded, job.code == 0, detail, seconds, kind)


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

    Tests and candidate run in two sandboxed processes, and plain data alone passes between them
    (`sandbox/remote.py`).

    Args:
        program: the candidate, source of a module.
        tests: trusted source, such as asserts; several are joined by line feeds. Passed means: it
            ran to its end.
        names: what the tests take from the candidate. None: every name they use that neither they
            nor `setup` define and that is no built-in and no standard module; a function with such
            a name has to be given here.
        setup: trusted source that runs before the tests, such as imports and helpers; `names`
            override what it defines.
        limits: for each of the two processes.
        isolation: one of `KINDS`; None for the strongest that works here.
        allow_weak: run the code even where nothing can hold it.

    Raises:
        InputError: tests and setup are not Python or take nothing from the candidate; and as
            `run_python`.
        RuntimeError: isolation could not be set up, so no foreign code ran.
    """
    kind = choose(isolation, allow_weak)
    limits = limits or Limits()
    text = tests if isinstance(tests, str) else "\n".join(tests)
    free = free_names(f"{setup}\n{text}") - set(names or ()) - set(dir(builtins))
    modules = free & sys.stdlib_module_names
    names = sorted(free - modules) if names is None else list(names)
    if not names:
        raise InputError(
            "the tests use nothing of the candidate",
            "name what they test: check(..., names=['function'])",
        )
    setup += "".join(f"\nimport {module}" for module in modules)
    trusted = {"role": "check", "tests": text, "setup": setup, "names": names, "passed": PASSED}
    untrusted = {"role": "serve", "program": program}
    checker_end, candidate_end = socket.socketpair()
    with checker_end, candidate_end, ExitStack() as stack:
        checker, candidate = (
            stack.enter_context(
                Job(kind, limits, {**config, "channel": end.fileno()}, b"", (end.fileno(),))
            )
            for config, end in ((trusted, checker_end), (untrusted, candidate_end))
        )
        # With no copy of the ends left here, each process sees it when the other one ends.
        checker_end.close()
        candidate_end.close()
        exceeded, seconds = supervise([checker, candidate], limits)
    detail = last_line(checker.text(2)) or f"the tests ended with exit status {checker.code}"
    return conclude(
        candidate, [checker, candidate], exceeded, checker.code == PASSED, detail, seconds, kind
    )


def free_names(source: str) -> set[str]:
    """Global names that source uses and does not bind; raises `InputError` if it is not Python."""
    try:
        top = symtable.symtable(source, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"the tests are not Python: {error}") from None
    bound = {
        s.get_name()
        for s in top.get_symbols()
        if s.is_assigned() or s.is_imported() or s.is_namespace()
    }
    used = {
        symbol.get_name()
        for table in tables(top)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table is top or symbol.is_global())
    }
    return used - bound


def tables(top: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """A table and all those within it."""
    yield top
    for child in top.get_children():
        yield from tables(child)


def conclude(
    shown: Job,
    jobs: Sequence[Job],
    exceeded: str | None,
    passed: bool,
    detail: str,
    seconds: float,
    kind: str,
) -> Outcome:
    """The outcome of jobs that have ended; `shown` is the one whose output it has."""
    limits = shown.limits
    status = exceeded or ("passed" if passed else "failed")
    if status == "failed" and any(_used_up_time(job) for job in jobs):
        status = "timeout"
    elif status == "failed" and detail.startswith("MemoryError"):
        status = "memory"
    told = {
        "passed": "",
        "timeout": f"took more than {limits.seconds:g} s, or {limits.cpu_seconds:g} s of processor time",
        "disk": f"wrote more than {limits.disk} bytes, too many files, or a folder that cannot be looked into",
        "output": f"printed more than {limits.output} bytes",
        "threads": f"ran more than {limits.threads} threads",
    }
    return Outcome(status, shown.text(1), shown.text(2), told.get(status, detail), seconds, kind)


def _used_up_time(job: Job) -> bool:
    """Whether the kernel killed a job for the processor time that it used.

    The kernel compares the limit with a coarser count than `cpu_seconds`, and on a busy machine the
    two differ.
    """
    return job.code in KILLED and job.cpu_seconds > job.limits.cpu_seconds / 2
