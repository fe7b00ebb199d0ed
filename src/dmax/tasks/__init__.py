"""Tasks: where prompts come from and how an answer is scored. Names resolve lazily; plugins add their own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Protocol

from dmax.errors import InputError, did_you_mean

_TASKS = {
    "asdiv": "dmax.tasks.maths:Asdiv",
    "gsm8k": "dmax.tasks.maths:Gsm8k",
    "humaneval": "dmax.tasks.python_code:HumanEval",
    "humaneval_plus": "dmax.tasks.python_code:HumanEvalPlus",
    "math500": "dmax.tasks.maths:Math500",
    "mbpp": "dmax.tasks.python_code:Mbpp",
    "mbpp_plus": "dmax.tasks.python_code:MbppPlus",
    "minerva_algebra": "dmax.tasks.maths:MinervaAlgebra",
    "word_problems": "dmax.tasks.word_problems:WordProblems",
}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, the expected answer, and a worked reference where there is one."""

    prompt: str
    answer: str
    reference: str | None = None


class Task(Protocol):
    """What the evaluation asks of a task."""

    name: str
    max_new_tokens: int

    def examples(self, limit: int, seed: int) -> list[Example]:
        """The examples to solve, at most `limit`, the same for the same seed."""

    def extract(self, text: str) -> str | None:
        """The answer in a completion, or None."""

    def score(self, text: str, example: Example) -> bool:
        """Whether a completion answers the example."""


def _classes() -> dict[str, str]:
    return _TASKS | {entry.name: entry.value for entry in entry_points(group="dmax.tasks")}


def task_names() -> tuple[str, ...]:
    """Names of all tasks, those of plugins (entry-point group `dmax.tasks`) included."""
    return tuple(sorted(_classes()))


def get_task(name: str, data: Path | None = None) -> Task:
    """The task of that name, over the rows of the JSONL file `data` if one is given.

    Raises:
        InputError: there is no such task, it reads no file, or its rows cannot be read.
    """
    table = _classes()
    if name not in table:
        choices = task_names()
        raise InputError(
            f"unknown task {name!r}; choose from {', '.join(choices)}",
            hint=did_you_mean(name, choices),
        )
    module, _, attribute = table[name].partition(":")
    make = getattr(import_module(module), attribute)
    if data is not None and not signature(make).parameters:
        raise InputError(
            f"the task {name!r} makes its own examples and reads no file", hint="leave out --data"
        )
    task: Task = make() if data is None else make(data)
    return task
