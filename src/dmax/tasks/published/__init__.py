"""`scoring: published`: the lenient scoring of the authors' evaluation, beside our strict one.

It is re-implemented from its description, so that numbers can be compared with published ones. A
scorer is a pure function of a completion and its example. docs/reproduce.md says where each of them
differs from the strict scoring, and from the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from dmax.errors import InputError, show
from dmax.tasks import Example

Scorer = Callable[[str, Example], bool]
"""Whether a completion answers an example."""

_SCORERS = {
    "asdiv": "word_problems",
    "gsm8k": "word_problems",
    "humaneval": "programs",
    "math500": "mathematics",
    "mbpp": "programs",
    "minerva_algebra": "mathematics",
}


def published_tasks() -> tuple[str, ...]:
    """Names of the tasks that have a published scoring."""
    return tuple(_SCORERS)


def published_scorer(task: str) -> Scorer:
    """The published scoring of a task.

    Raises:
        InputError: the task has none.
    """
    if task not in _SCORERS:
        raise InputError(
            f"the task {show(task)} has no published scoring; {', '.join(_SCORERS)} have one"
        )
    module = import_module(f"dmax.tasks.published.{_SCORERS[task]}")
    scorer: Scorer = module.is_correct
    return scorer
