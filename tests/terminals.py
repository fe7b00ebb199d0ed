"""`dmax` in a terminal: what it shows, what is typed, and how it ends."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyte

PROCESSES: Any = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dmax.llm"])  # torch is loaded once for all commands
PATIENCE = 60.0  # seconds for anything to appear on a busy machine
LINES_KEPT = 1000  # that have scrolled away


def command(
    terminal: DupFd,
    words: Sequence[str],
    environment: Mapping[str, str],
    constants: Mapping[str, Any],
) -> None:
    """`dmax` in a process that a terminal controls, so that Ctrl-C reaches it."""
    its = terminal.detach()
    os.setsid()
    fcntl.ioctl(its, termios.TIOCSCTTY, 0)
    for stream in (0, 1, 2):
        os.dup2(its, stream)
    os.close(its)
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    os.environ.update({"TERM": "xterm-256color", **environment})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # until the exit
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8") for stream in (1, 2))
    sys.argv = ["dmax", *words]
    import dmax_command  # its console looks at the terminal only once

    for path, value in constants.items():
        module, _, name = path.rpartition(".")
        setattr(import_module(module), name, value)
    dmax_command.main()


class Terminal:
    """A terminal in which a command runs; a context, at whose end the command is ended.

    Args:
        words: of the command, without "dmax".
        width, height: of the terminal.
        environment: variables that the command has besides those of the test.
        constants: of modules, by their path, that are others in the command.
    """

    def __init__(
        self,
        *words: str,
        width: int = 80,
        height: int = 24,
        environment: Mapping[str, str] = {},
        constants: Mapping[str, Any] = {},
    ) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=LINES_KEPT, ratio=0.1)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._ours, its = pty.openpty()
        self._set_size(width, height)
        arguments = (DupFd(its), words, dict(environment), dict(constants))
        self._process = PROCESSES.Process(target=command, args=arguments)
        self._process.start()
        os.close(its)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C once the command waits.

        Python heeds it at once only while it runs or once it waits: between its prompt and its
        waiting for keys there is a moment in which Ctrl-C waits for the next key.
        """
        stat = Path(f"/proc/{self._process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] == "R":
            self._read(0)
        self.type("\x03")

    def resize(self, width: int, height: int) -> None:
        """Change the size of the window."""
        self.screen.resize(height, width)
        self._set_size(width, height)

    def lines(self) -> list[str]:
        """What is on the screen and what has scrolled away, without the spaces at the ends."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return [line.rstrip() for line in [*above, *self.screen.display]]

    def text(self) -> str:
        """The lines, one below another, without the empty ones at the end."""
        return "\n".join(self.lines()).rstrip()

    def until(self, text: str, times: int = 1) -> str:
        """Wait until a text is shown so many times; what is shown then."""
        return self.until_true(lambda shown: shown.count(text) >= times, repr(text))

    def until_prompt(self) -> str:
        """Wait until the command waits for input; what is shown then."""
        return self.until_true(lambda shown: shown.endswith("\n>"), "prompt")

    def until_written(self, sequence: bytes) -> None:
        """Wait until the command has written something."""
        self.until_true(lambda _: sequence in self.written, repr(sequence))

    def until_true(self, is_met: Callable[[str], bool], what: str) -> str:
        """Wait until what is shown meets a condition."""
        deadline = time.monotonic() + PATIENCE
        while not is_met(self.text()):
            left = deadline - time.monotonic()
            if left < 0 or not self._read(left):
                raise AssertionError(f"no {what} in:\n{self.text()}")
        return self.text()

    def echoes(self) -> bool:
        """Whether keys that are pressed are shown."""
        return bool(termios.tcgetattr(self._ours)[3] & termios.ECHO)

    def terminate(self) -> None:
        """Tell the command to end, as a system does that shuts down."""
        self._process.terminate()

    def end(self) -> int:
        """Wait until the command ends; its exit code."""
        while self._read(PATIENCE):
            pass
        self._process.join(PATIENCE)
        return self._process.exitcode

    def _read(self, seconds: float) -> bool:
        """Take what the command writes; False once it has ended, or says nothing for so long."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            part = os.read(self._ours, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.written += part
        self._stream.feed(part)
        return bool(part)

    def _set_size(self, width: int, height: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
