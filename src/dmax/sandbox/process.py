"""Start sandboxed processes, read what they print within bounds, and end them without fail."""

from __future__ import annotations

import json
import os
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dmax.sandbox.isolation import MAX_ENTRIES, READY, Limits, command, jail_settings

POLL_SECONDS = 0.02  # between looks at disk use and threads
START_SECONDS = 60.0  # for an interpreter to come up on a busy machine
CHUNK = 1 << 16  # bytes
SOURCES = {
    f"{name}_source": Path(__file__).with_name(f"{name}.py").read_text("utf-8")
    for name in ("jail", "remote")
}


class Job:
    """One sandboxed process; a context manager that leaves neither the process nor its folder behind.

    Attributes:
        pid: of the process, or of the tool that isolates it.
        streams: descriptors from which stdout (1) and stderr (2) are read.
        printed: bytes of stdout (1) and stderr (2), at most `limits.output` and one read more.
        is_ready: whether it has given up its rights; foreign code runs only after that.
        code: exit status, negative for a signal; None while it runs.
        cpu_seconds: processor time used, known when it has ended.
    """

    def __init__(
        self,
        kind: str,
        limits: Limits,
        config: dict[str, Any],
        stdin: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        self.limits = limits
        self.printed = {1: bytearray(), 2: bytearray()}
        self.is_ready = False
        self.code: int | None = None
        self.cpu_seconds = 0.0
        self._base = Path(tempfile.mkdtemp(prefix="dmax-sandbox-")).resolve()
        self._folder = self._base / "scratch"
        self._folder.mkdir()
        everything = {
            **config,
            **SOURCES,
            "jail": jail_settings(kind, limits, self._folder),
        }
        head = json.dumps(everything).encode()
        source = (
            self._base / "stdin"
        )  # a file: needs no thread to feed it, and foreign code gets it read-only
        source.write_bytes(head + stdin)
        with source.open("rb") as stream:
            source.unlink()
            self._stdin = os.fstat(stream.fileno())
            try:
                self._process = subprocess.Popen(
                    [*command(kind, limits), str(len(head))],
                    stdin=stream,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=self._folder,
                    env={},
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            except OSError:
                remove(self._base)
                raise
        self.pid = self._process.pid
        assert self._process.stdout and self._process.stderr
        self.streams = {1: self._process.stdout.fileno(), 2: self._process.stderr.fileno()}
        for descriptor in self.streams.values():
            os.set_blocking(descriptor, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()
        with self._process:  # closes the pipes
            remove(self._base)

    def text(self, number: int) -> str:
        """What it printed on stdout (1) or stderr (2)."""
        return self.printed[number][: self.limits.output].decode("utf-8", "replace")

    def read(self, number: int) -> bool:
        """Take one piece of output; False at its end, or if none is there yet."""
        try:
            piece = os.read(self.streams[number], CHUNK)
        except BlockingIOError:
            return False
        self.printed[number] += piece
        if number == 2 and not self.is_ready:
            before, mark, after = self.printed[2].partition(READY)
            self.is_ready = bool(mark)
            self.printed[2] = after if mark else before
        return bool(piece)

    def has_ended(self, wait: bool = False) -> bool:
        """Whether the process has ended, or that it has with `wait`."""
        if self.code is None:
            pid, status, used = os.wait4(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = used.ru_utime + used.ru_stime
        return self.code is not None

    def stop(self) -> None:
        """Kill the process group if it still runs, and take the last of its output."""
        if not self.has_ended():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.has_ended(wait=True)
        for number in self.streams:
            while not self.is_verbose() and self.read(number):
                pass

    def is_verbose(self) -> bool:
        """Whether it has printed more than it may."""
        return any(len(piece) > self.limits.output for piece in self.printed.values())

    def exceeded(self) -> str | None:
        """The limit that a running process exceeds, if it does."""
        members = list(family(self.pid))
        if self.is_verbose():
            return "output"
        if any(len(tasks(pid)) > self.limits.threads for pid in members):
            return "threads"
        size, entries = usage(self._folder)
        size += sum(nameless(pid, self._folder, self._stdin) for pid in members)
        return "disk" if size > self.limits.disk or entries > MAX_ENTRIES else None


def supervise(jobs: Sequence[Job], limits: Limits) -> tuple[str | None, float]:
    """Run until the first job ends or a limit is exceeded, then stop all; the limit, and seconds of foreign code.

    Raises:
        RuntimeError: isolation could not be set up, so no foreign code ran.
    """
    began = time.monotonic()
    deadline = began + START_SECONDS
    is_ready = False
    exceeded = None
    with selectors.DefaultSelector() as selector:
        for job in jobs:
            for number, descriptor in job.streams.items():
                selector.register(descriptor, selectors.EVENT_READ, (job, number))
        while exceeded is None and not jobs[0].has_ended():
            for key, _ in selector.select(
                POLL_SECONDS if selector.get_map() else POLL_SECONDS / 10
            ):
                job, number = key.data
                if not job.read(number):
                    selector.unregister(key.fd)
            if not is_ready and all(job.is_ready for job in jobs):
                is_ready = True
                began = time.monotonic()
                deadline = began + limits.seconds
            exceeded = next(
                (limit for job in jobs if job.code is None and (limit := job.exceeded())), None
            )
            if exceeded is None and time.monotonic() > deadline:
                exceeded = "timeout"
    for job in jobs:
        job.stop()
    for job in jobs:
        if not job.is_ready and exceeded in (
            None,
            "timeout",
        ):  # other limits are those of foreign code in another job
            raise RuntimeError(
                f"the sandbox could not be set up: {last_line(job.text(2)) or 'no reason given'}"
            )
    if exceeded is None and any(job.is_verbose() for job in jobs):
        exceeded = "output"
    return exceeded, time.monotonic() - began


def last_line(text: str) -> str:
    """The last line with something on it, empty if there is none."""
    return text.strip().rpartition("\n")[2]


def usage(folder: Path) -> tuple[int, int]:
    """Bytes and entries in a folder; more than any limit where it cannot be looked into."""
    size = entries = 0
    pending = [str(folder)]
    while pending and entries <= MAX_ENTRIES:
        try:
            with os.scandir(pending.pop()) as content:
                for entry in content:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError:  # hidden from us by its rights or its depth
            return size, MAX_ENTRIES + 1
    return size, entries


def nameless(pid: int, folder: Path, stdin: os.stat_result) -> int:
    """Bytes in files without a name that a process holds open, its own stdin left out.

    Each thread may have descriptors of its own, and one that has ended hides what the others share.
    A file of `folder` that is mapped and no longer open has a size that cannot be seen, so it
    counts as more than any limit.
    """
    # inodes, and their bytes
    mapped = set[int]()
    found = dict[int, int]()
    for task in tasks(pid):
        mapped |= mapped_nameless(task, folder)
        with suppress(OSError), os.scandir(f"{task}/fd") as content:
            for entry in content:
                with suppress(OSError):
                    info = entry.stat()
                    if (
                        stat.S_ISREG(info.st_mode)
                        and info.st_nlink == 0
                        and not os.path.samestat(info, stdin)
                    ):
                        found[info.st_ino] = info.st_blocks * 512
    return sys.maxsize if mapped - found.keys() else sum(found.values())


def mapped_nameless(task: str, folder: Path) -> set[int]:
    """Inodes of the files that were in a folder, have no name any more, and are mapped into memory."""
    try:
        lines = Path(f"{task}/maps").read_bytes().splitlines()
    except OSError:
        return set()
    start = os.fsencode(folder) + b"/"
    end = b" (deleted)"
    fields = (line.split(maxsplit=5) for line in lines if line.endswith(end))
    return {int(inode) for *_, inode, path in fields if path.startswith(start)}


def family(pid: int) -> Iterator[int]:
    """A process and those below it: the tool that isolates has the foreign code as a child."""
    yield pid
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def tasks(pid: int) -> list[str]:
    """Folders of /proc, one for each thread of a process; none where they cannot be seen."""
    folder = f"/proc/{pid}/task"
    try:
        return [f"{folder}/{thread}" for thread in os.listdir(folder)]
    except OSError:
        return []


def remove(base: Path) -> None:
    """Delete a job's folders, whatever their depth and rights: each moves up before its content is looked at."""
    pending = [str(base / "scratch")]
    count = 0
    while pending:
        folder = pending.pop()
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                count += 1
                pending.append(str(base / str(count)))
                os.rename(entry.path, pending[-1])
            else:
                os.unlink(entry.path)
        os.rmdir(folder)
    base.rmdir()
