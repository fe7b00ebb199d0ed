"""Where the prompts come from, and which of them a process answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dmax.distill.filters import Filters
from dmax.distill.responses import Prompt
from dmax.errors import InputError, show
from dmax.params import MOST
from dmax.records.readers import Reader
from dmax.records.sources import Source, read_prompts
from dmax.tasks import Example, Task, get_task
from dmax.tasks.word_problems import WordProblems, problems

MOST_PARTS = 100_000
NUM_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """One of several shares of the prompts: every `count`-th, beginning with number `index`."""

    index: int = 0
    count: int = 1

    def __contains__(self, number: int) -> bool:
        return number >= 0 and number % self.count == self.index

    def numbers(self, num_prompts: int) -> range:
        """The numbers of its prompts."""
        return range(self.index, num_prompts, self.count)


WHOLE = Part()


def read_part(text: str) -> Part:
    """The part that a text `INDEX/COUNT` names, counted from 0.

    Raises:
        InputError: it names none.
    """
    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    index, count = map(int, numbers.groups()) if numbers else (0, 0)
    if not index < count <= MOST_PARTS:
        raise InputError(
            f"`--part` must be INDEX/COUNT, counted from 0, got {show(text)}",
            hint="the first of eight is 0/8, the last 7/8",
        )
    return Part(index, count)


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked, and who knows the answers.

    Attributes:
        prompts: texts and chats.
        task: scores responses; None if nobody can.
        examples: the expected answers of a task, one for each prompt.
    """

    prompts: Sequence[Prompt]
    task: Task | None = None
    examples: Sequence[Example] = ()

    def scored(self, filters: Filters) -> Filters:
        """The same filters, which also drop what the task scores as wrong.

        Raises:
            InputError: there is no task.
        """
        task = self.task
        if task is None:
            raise InputError(
                "`--filter-score` needs a task that knows the answers",
                hint="give the prompts as --task NAME --data FILE",
            )

        def score(index: int, text: str) -> bool:
            return task.score(text, self.examples[index])

        return replace(filters, score=score, scorer=task.name)


def read_questions(
    source: Source | None,
    reader: Reader | None,
    task: str | None,
    data: Path | None,
    *,
    num: int | None,
    seed: int,
) -> Questions:
    """The prompts of a file, of a data set or of a task, or arithmetic problems.

    Args:
        source: file, folder or data set on the hub, which training reads too; None: there is none.
        reader: of its columns; None recognises them.
        task: name of a task, in place of a source.
        data: its training rows.
        num: how many at most; None: all, or 1000 problems.
        seed: of the problems.

    Raises:
        InputError: both a source and a task, a task without training rows, or prompts that cannot
            be read.
    """
    if source is not None and (task is not None or data is not None):
        raise InputError("`--prompts` and `--task` are two sources of prompts; choose one")
    if source is not None:
        return Questions([each.prompt for each in islice(read_prompts(source, reader), num)])
    if task in (None, WordProblems.name) and data is None:
        drawn = problems(num or NUM_PROBLEMS, seed=seed)
        examples = [Example(problem.question, str(problem.answer)) for problem in drawn]
        return _of_task(WordProblems(), examples)
    if task is None or data is None:
        raise InputError(
            f"`--task {task}` needs --data" if task else "`--data` needs --task",
            hint="name a file of training rows: the task's own are what models are measured on",
        )
    chosen = get_task(task, data)
    examples = chosen.examples(MOST if num is None else num, seed)
    return _of_task(chosen, examples)


def _of_task(task: Task, examples: Sequence[Example]) -> Questions:
    return Questions([example.prompt for example in examples], task, examples)
