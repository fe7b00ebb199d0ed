"""Whether two mathematical answers are equal, by math-verify in a process of its own.

math-verify limits its own time with signals. Only a main thread can take them, and they do not
reach a long computation inside one operation. A process of its own can simply be killed, so that
the evaluation goes on whatever an answer does to the parser.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from dmax import extras
from dmax.worker import Worker

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


def equal_any(golds: Sequence[str], answers: Sequence[str]) -> bool:
    """Whether any answer equals any gold one, by sympy as arithmetic or by math-verify.

    Unlike in `equal`, an answer may be a sentence: math-verify looks for a formula in it. What
    cannot be read, or not compared in time, is not equal.

    Raises:
        InputError: math-verify is missing or does not start.
    """
    return _comparer().compare_any(golds, answers)


@cache
def _comparer() -> Comparer:
    comparer = Comparer()
    atexit.register(comparer.stop)
    return comparer


class Comparer(Worker):
    """A process that compares answers."""

    def __init__(self) -> None:
        require_math_verify()
        script = Path(__file__).with_name("equality_worker.py")
        super().__init__(script, "math-verify", COMPARE_SECONDS, extras.install_hint("eval"))

    def compare(self, gold: str, answer: str) -> bool:
        """Whether the process says that they are equal; False if it says nothing."""
        return self.ask(json.dumps([gold, answer])) == "true"

    def compare_any(self, golds: Sequence[str], answers: Sequence[str]) -> bool:
        """Whether the process says that any are equal; False if it says nothing."""
        return self.ask(json.dumps({"golds": golds, "answers": answers})) == "true"
