"""Whether two mathematical answers are equal, by math-verify in a process of its own.

math-verify limits its own time with signals. Only a main thread can take them, and they do not
reach a long computation inside one operation. A process of its own can simply be killed, so that
the evaluation goes on whatever an answer does to the parser.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from dmax import extras
from dmax.errors import InputError

START_SECONDS = 300  # it imports sympy, which takes seconds, on a busy machine a minute
COMPARE_SECONDS = 30  # math-verify stops itself after 5 in each of its steps


def require_math_verify() -> None:
    """Raise `InputError` unless math-verify is installed."""
    extras.require("math_verify", "eval", "scoring mathematical answers")


def equal(gold: str, answer: str) -> bool:
    """Whether an answer, LaTeX or plain, equals the gold one.

    What cannot be read, or not compared in time, is not equal.

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

    def __init__(self) -> None:
        self._limit: float = COMPARE_SECONDS
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # one question at a time, whichever thread asks

    def compare(self, gold: str, answer: str) -> bool:
        """Whether the process says that they are equal.

        False if the process dies over the question, or says nothing in time.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.stop()
            process = self._process or self._start()
            reply = ""
            try:
                reply = _ask(process, json.dumps([gold, answer]), self._limit)
            finally:
                # Dead or interrupted: what it says now would be taken for the next reply.
                if not reply:
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
        # -P keeps the folder of the script off the path: no file in it may hide a module.
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
            reason = json.loads(reply) if reply else "no reply"
            raise InputError(
                f"math-verify does not start: {reason}", hint=extras.install_hint("eval")
            )
        return self._process


def _ask(process: subprocess.Popen[str], line: str, seconds: float) -> str:
    """The line that a process writes after it was given one.

    Empty if the process ends first. After so many seconds it is killed.
    """
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
