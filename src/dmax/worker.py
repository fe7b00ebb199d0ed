"""A script in a process of its own: for work that may hang, crash or take all memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from dmax.errors import InputError

START_SECONDS = 300  # imports take seconds, on a busy machine a minute


class Worker:
    """A process that answers a line with a line, started when it is first asked.

    The script writes `null` once it is ready, or a JSON text that says why it cannot be. It is
    started again after it died or was killed. Any thread may ask.

    Args:
        script: run by its path.
        name: what errors call it.
        seconds: how long an answer may take.
        hint: what may help if it does not start.
    """

    def __init__(self, script: Path, name: str, seconds: float, hint: str | None = None) -> None:
        self._script = script
        self._name = name
        self._limit = seconds
        self._hint = hint
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()  # one question at a time, whichever thread asks

    def ask(self, question: str) -> str:
        """The answer; empty if the process dies over the question, or says nothing in time.

        Raises:
            InputError: the process does not start.
        """
        with self._lock:
            if self._owner != os.getpid():  # after a fork, the parent's process is not ours to ask
                self._process = None
            if self._process is not None and self._process.poll() is not None:
                self.stop()
            process = self._process or self._start()
            answer = ""
            try:
                answer = _ask(process, question, self._limit)
            finally:
                # Dead or interrupted: what it says now would be taken for the next answer.
                if not answer:
                    self.stop()
            return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps the folder of the script off the path: no file in it may hide a module.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        answer = _ask(self._process, "", START_SECONDS)
        if answer != "null":
            self.stop()
            reason = json.loads(answer) if answer else "no reply"
            raise InputError(f"{self._name} does not start: {reason}", self._hint)
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
