"""Tasks: where prompts come from, and how an answer is scored.

A task is loaded when somebody asks for it by name. Plugins add tasks of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Protocol

from dmax.errors import InputError, did_you_mean, load_plugin, show

_TASKS = {
    "asdiv": "dmax.tasks.maths:Asdiv",
    "gsm8k": "dmax.tasks.maths:Gsm8k",
    "humaneval": "dmax.tasks.python_code:HumanEval",
    "humaneval_plus": "dmax.tasks.python_code:HumanEvalPlus",
    "math500": "dmax.tasks.maths:Math500",
    "mbpp": "dmax.tasks.python_code:Mbpp",
    "mbpp_plus": "dmax.tasks.python_code:MbppPlus",
    "minerva_algebra": "dmax.tasks.maths:MinervaAlgebra",
    "short_word_problems": "dmax.tasks.word_problems:ShortWordProblems",
    "word_problems": "dmax.tasks.word_problems:WordProblems",
}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its expected answer.

    Attributes:
        prompt: what the model is asked.
        answer: what it should answer.
        reference: a worked solution, or the answer as its source has it, if there is one.
    """

    prompt: str
    answer: str
    reference: str | None = None


class Task(Protocol):
    """What the evaluation asks of a task."""

    name: str
    max_new_tokens: int

    def examples(self, limit: int, seed: int) -> list[Example]:
        """The examples to solve, at most `limit`; the same seed gives the same examples."""

    def extract(self, text: str) -> str | None:
        """The answer in a completion; None if there is none."""

    def score(self, text: str, example: Example) -> bool:
        """Whether a completion answers the example."""


def _classes() -> dict[str, str]:
    """Where the class of every task is, as "module:name", by the name of the task."""
    plugins = {entry.name: entry.value for entry in entry_points(group="dmax.tasks")}
    return plugins | _TASKS  # no plugin changes what a published name means


def task_names() -> tuple[str, ...]:
    """Names of all tasks, with those of plugins (entry-point group `dmax.tasks`)."""
    return tuple(sorted(_classes()))


def get_task(name: str, data: str | Path | None = None) -> Task:
    """The task of that name.

    Args:
        name: one of `task_names()`.
        data: JSONL file of the task's rows. None: the task's own examples, or the hub's rows.

    Raises:
        InputError: there is no such task, a plugin's cannot be loaded, it reads no file, or its
            rows cannot be read.
    """
    classes = _classes()
    if not isinstance(name, str) or name not in classes:
        choices = task_names()
        raise InputError(
            f"unknown task {show(name)}; choose from {', '.join(choices)}",
            hint=did_you_mean(name, choices),
        )
    make: Callable[..., Task] = load_plugin(name, classes[name])
    if data is None:
        return make()
    if not signature(make).parameters:
        raise InputError(
            f"the task {show(name)} makes its own examples and reads no file",
            hint="leave out --data",
        )
    return make(Path(data))
