"""Whether two mathematical answers are equal, by math-verify in a process of its own.

math-verify limits its own time by signals, which only a main thread can take and which do not reach
a long computation inside one operation. A separate process needs neither: a comparison that does
not come back is killed with it, and whatever an answer does to the parser, the evaluation goes on.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dmax.errors import InputError

START_SECONDS = 300  # it imports sympy, which takes seconds, on a busy machine a minute
COMPARE_SECONDS = 30  # math-verify stops itself after 5 in each of its steps
INSTALL = 'pip install "dmax[eval]"'


def require_math_verify() -> None:
    """Raise `InputError` unless math-verify is installed."""
    if find_spec("math_verify") is None:
        raise InputError(
            "scoring mathematical answers needs the package `math-verify`", hint=INSTALL
        )


def equal(gold: str, answer: str) -> bool:
    """Whether an answer, LaTeX or plain, equals the gold one; what cannot be read or compared in time is not equal.

    Raises:
        InputError: math-verify is missing or does not start.
    """
    return _comparer().compare(gold, answer)


@cache
def _comparer() -> Comparer:
    comparer = Comparer()
    atexit.register(comparer.stop)
    return comparer


class Comparer:
    """A process that compares answers, started when first needed and again after it was killed."""

    def __init__(self, limit: float = COMPARE_SECONDS) -> None:
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # one question at a time, whichever thread asks

    def compare(self, gold: str, answer: str) -> bool:
        """Whether the process says that they are equal; False if it dies over it or says nothing in time."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.stop()
            process = self._process or self._start()
            reply = ""
            try:
                reply = _ask(process, json.dumps([gold, answer]), self._limit)
            finally:
                if not reply:  # dead, or interrupted: a reply that comes now must not be taken for the next one
                    self.stop()
            return reply == "true"

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        require_math_verify()
        # -P: the folder of the script stays off the path, so that no file in it hides a module of
        # the same name.
        command = [sys.executable, "-P", str(Path(__file__).with_name("equality_worker.py"))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        reply = _ask(self._process, "", START_SECONDS)
        if reply != "null":
            self.stop()
            raise InputError(
                f"math-verify does not start: {json.loads(reply) if reply else 'no reply'}",
                hint=INSTALL,
            )
        return self._process


def _ask(process: subprocess.Popen[str], line: str, seconds: float) -> str:
    """The line a process writes after it was given one; empty if it ends first, which it must after some seconds."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        if line:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return process.stdout.readline().strip()
    except OSError:  # it ended before it read the line
        return ""
    finally:
        timer.cancel()
