"""Tasks: where prompts come from and how an answer is scored. Names resolve lazily; plugins add their own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

from dmax.errors import InputError, did_you_mean

_TASKS = {"word_problems": "dmax.tasks.word_problems:WordProblems"}


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


def _table() -> dict[str, str]:
    return _TASKS | {entry.name: entry.value for entry in entry_points(group="dmax.tasks")}


def task_names() -> tuple[str, ...]:
    """Names of all tasks, those of plugins (entry-point group `dmax.tasks`) included."""
    return tuple(sorted(_table()))


def get_task(name: str) -> Task:
    """The task of that name; raises `InputError` with the valid names otherwise."""
    table = _table()
    if name not in table:
        choices = task_names()
        raise InputError(f"unknown task {name!r}; choose from {', '.join(choices)}", hint=did_you_mean(name, choices))
    module, _, attribute = table[name].partition(":")
    task: Task = getattr(import_module(module), attribute)()
    return task
