"""Start sandboxed processes, read what they print within bounds, and end them without fail."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from dmax.sandbox.folder import job_folder
from dmax.sandbox.isolation import MAX_ENTRIES, READY, Limits, command, jail_settings
from dmax.sandbox.usage import content, family, memory, nameless, threads

STDOUT = 1
STDERR = 2
POLL_SECONDS = 0.02  # between looks at disk use and threads
START_SECONDS = 60.0  # for an interpreter to come up on a busy machine
BYTES_OF_READ = 1 << 16
MAX_LINE = 200  # characters
SOURCES = {
    f"{name}_source": Path(__file__).with_name(f"{name}.py").read_text("utf-8")
    for name in ("jail", "remote")
}


class Job:
    """One sandboxed process; as a context manager it leaves neither process nor folder behind.

    Attributes:
        kind: its isolation, one of `KINDS`.
        limits: what it may use.
        pid: of the process, or of the tool that isolates it.
        streams: the descriptors from which stdout (1) and stderr (2) are read.
        printed: bytes of stdout (1) and stderr (2), at most `limits.output` and one read more.
        is_ready: whether it has given up its rights; untrusted code runs only after that.
        code: its exit status, negative for a signal; None while it runs.
        cpu_seconds: the processor time that it used, known when it has ended.
    """

    def __init__(
        self,
        kind: str,
        limits: Limits,
        config: dict[str, Any],
        stdin: bytes = b"",
        channel: int | None = None,
    ) -> None:
        """Start it; `remote.main` gets `config`, and `channel` is a descriptor that it keeps."""
        self.kind = kind
        self.limits = limits
        self.printed = {STDOUT: bytearray(), STDERR: bytearray()}
        self.is_ready = False
        self.code: int | None = None
        self.cpu_seconds = 0.0
        with ExitStack() as resources:
            base = resources.enter_context(job_folder())
            self._folder = base / "scratch"
            self._folder.mkdir()
            self._process = self._start(config, stdin, channel)
            resources.enter_context(self._process)  # closes the pipes
            self._resources = resources.pop_all()
        self.pid = self._process.pid
        assert self._process.stdout and self._process.stderr
        self.streams = {
            STDOUT: self._process.stdout.fileno(),
            STDERR: self._process.stderr.fileno(),
        }
        for descriptor in self.streams.values():
            os.set_blocking(descriptor, False)

    def _start(
        self, config: dict[str, Any], stdin: bytes, channel: int | None
    ) -> subprocess.Popen[bytes]:
        settings = jail_settings(self.kind, self.limits, self._folder)
        everything = {**config, **SOURCES, "jail": settings, "channel": channel}
        head = json.dumps(everything).encode()
        # A file needs no thread that feeds it, and untrusted code can only read it.
        source = self._folder.with_name("stdin")
        source.write_bytes(head + stdin)
        with source.open("rb") as stream:
            return subprocess.Popen(
                [*command(self.kind), str(len(head))],
                stdin=stream,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._folder,
                env={},
                pass_fds=() if channel is None else (channel,),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._resources:
            self.stop()

    def text(self, number: int) -> str:
        """What it printed on stdout (1) or stderr (2)."""
        return self.printed[number][: self.limits.output].decode("utf-8", "replace")

    def read(self, number: int) -> bool:
        """Take one piece of output; False at its end, or if there is none yet."""
        try:
            piece = os.read(self.streams[number], BYTES_OF_READ)
        except BlockingIOError:
            return False
        self.printed[number] += piece
        if number == STDERR and not self.is_ready:
            before, mark, after = self.printed[STDERR].partition(READY)
            self.is_ready = bool(mark)
            self.printed[STDERR] = after if mark else before
        return bool(piece)

    def has_ended(self, wait: bool = False) -> bool:
        """Whether the process has ended; with `wait`, after waiting until it has."""
        if self.code is None:
            pid, status, used = os.wait4(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._process.returncode = self.code
                self.cpu_seconds = used.ru_utime + used.ru_stime
        return self.code is not None

    def stop(self) -> None:
        """Kill the process group if it still runs, and take the last of its output."""
        if not self.has_ended():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.has_ended(wait=True)
        for number in self.streams:
            while not self.prints_too_much() and self.read(number):
                pass

    def prints_too_much(self) -> bool:
        """Whether it has printed more than it may."""
        return any(len(printed) > self.limits.output for printed in self.printed.values())

    def exceeded(self) -> str | None:
        """The limit that it exceeds while it runs, if there is one."""
        if self.code is not None:
            return None
        if self.prints_too_much():
            return "output"
        members = list(family(self.pid))
        if any(len(threads(pid)) > self.limits.threads for pid in members):
            return "threads"
        if self.is_ready and any(memory(pid) > self.limits.memory for pid in members):
            return "memory"
        size, entries = content(self._folder)
        size += sum(nameless(pid, self._folder) for pid in members)
        if size > self.limits.disk or entries > MAX_ENTRIES:
            return "disk"
        return None


def supervise(jobs: Sequence[Job], limits: Limits) -> str | None:
    """Run jobs until the first one ends or a limit is exceeded, stop them all, return that limit.

    Raises:
        RuntimeError: isolation could not be set up, so no untrusted code ran.
    """
    exceeded = _watch(jobs, limits)
    for job in jobs:
        job.stop()
    # With any other limit, it is the untrusted code of another job that has exceeded it.
    if exceeded in (None, "timeout"):
        for job in jobs:
            if not job.is_ready:
                reason = last_line(job.text(STDERR)) or "no reason given"
                raise RuntimeError(f"the sandbox could not be set up: {reason}")
    if exceeded is None and any(job.prints_too_much() for job in jobs):
        return "output"
    return exceeded


def _watch(jobs: Sequence[Job], limits: Limits) -> str | None:
    """Read what jobs print until the first one ends, or until one exceeds a limit: that limit."""
    deadline = time.monotonic() + START_SECONDS
    are_ready = False
    with selectors.DefaultSelector() as selector:
        for job in jobs:
            for number, descriptor in job.streams.items():
                selector.register(descriptor, selectors.EVENT_READ, (job, number))
        while not jobs[0].has_ended():
            is_silent = not selector.get_map()  # all streams are closed, so nothing wakes us
            for key, _ in selector.select(POLL_SECONDS / 10 if is_silent else POLL_SECONDS):
                job, number = key.data
                if not job.read(number):
                    selector.unregister(key.fd)
            if not are_ready and all(job.is_ready for job in jobs):
                are_ready = True
                deadline = time.monotonic() + limits.seconds
            for job in jobs:
                if exceeded := job.exceeded():
                    return exceeded
            if time.monotonic() > deadline:
                return "timeout"
    return None


def last_line(text: str) -> str:
    """The last line that has something on it, cut and made fit to print; empty if there is none."""
    line = text.strip().rpartition("\n")[2][:MAX_LINE]
    return "".join(letter if letter.isprintable() else "?" for letter in line)
