"""The demo from its first picture to what to do next."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from dmax.cli.terminal import doing, progress_bar
from dmax.completers import after
from dmax.demo.recording import REPEATS, find_story
from dmax.demo.replay import show
from dmax.demo.settings import SETTINGS
from dmax.demo.story import Story
from dmax.demo.table import TPF, Measured, caption, closing, table
from dmax.evaluation.run import evaluate
from dmax.llm import LLM
from dmax.outputs import as_record
from dmax.tasks import Task, get_task

COMMAND = "dmax"


def load() -> dict[str, LLM]:
    """The bundled models by name, each for one sequence at a time."""
    names = dict.fromkeys(setting.model for setting in SETTINGS)
    return {name: LLM(name, device="cpu", max_batch_size=1) for name in names}


def present(
    console: Console, models: Mapping[str, LLM], num_problems: int, seed: int, seconds: float
) -> dict[str, Any]:
    """Decode, show and measure.

    Args:
        console: where it is shown.
        models: by name, as `load` gives them.
        num_problems: how many problems are solved.
        seed: of the problems.
        seconds: that the replay takes; 0 shows nothing but progress.

    Returns:
        `rows`, the summary of each setting; `watched`, the problem that was replayed; `closing`,
        the sentence that it comes to.
    """
    task = get_task("word_problems")
    with one_thread():  # as fast with one sequence, and steady where the cores are shared
        with doing("looking for a problem that shows the difference"):
            story = find_story(models, task, task.examples(num_problems, seed))
        if seconds:
            show(console, story, seconds)
            console.print()
            console.print(footnote(story, console))
            console.print()
        measured = measure(models, task, num_problems, seed)
    if seconds:
        console.print(table(console, measured))
        console.print(Text(caption(measured), style="dim"))
        console.print(TPF)
        console.print()
        console.print(Text(closing(measured), style="bold"))
        console.print()
        console.print(next_steps(command_name(sys.argv[0])))
    return as_json(story, measured)


def measure(models: Mapping[str, LLM], task: Task, limit: int, seed: int) -> list[Measured]:
    """All settings on the same problems."""
    measured = []
    with progress_bar("measuring") as progress:
        for index, setting in enumerate(SETTINGS):
            summary, samples = evaluate(
                models[setting.model],
                task,
                replace(setting.params, max_new_tokens=task.max_new_tokens),
                limit=limit,
                seed=seed,
                model_name=setting.model,
                progress=after(index * limit, len(SETTINGS) * limit, progress),
            )
            correct = tuple(sample.is_correct for sample in samples)
            measured.append(Measured(setting, summary, correct))
    return measured


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def footnote(story: Story, console: Console) -> Text:
    """What was revised, why it is this problem, and how it was timed."""
    arrow = "->" if console.options.ascii_only else "→"
    sentences = [
        *(
            f"{recording.setting.label} revised {_listed(recording.revisions, arrow)}."
            for recording in story.recordings
            if recording.revisions
        ),
        f"This problem is {story.choice}.",
        f"Times are those of one sequence on one thread, the fastest of {REPEATS}.",
    ]
    return Text(" ".join(sentences), style="dim")


def _listed(revisions: Sequence[tuple[str, str]], arrow: str) -> str:
    return ", ".join(f"{before} {arrow} {after}" for before, after in revisions)


def next_steps(command: str) -> Text:
    """What to try now."""
    steps = {
        f"{command} serve": "watch it in a browser, and call it as you call OpenAI",
        f"{command} chat": "talk to it here",
        f"{command} generate --help": "a problem of your own",
        f"{command} eval --limit 200": "more problems, so narrower intervals",
        f"{command} bench --quick": "speed on this machine",
        "README.md": "use it from Python, train your own",
    }
    width = max(map(len, steps))
    return Text("\n").join(
        [Text("Next:"), *(Text(f"  {step:{width}}  {what}") for step, what in steps.items())]
    )


def command_name(program: str) -> str:
    """How this shell calls the running command: by its name, if that leads to the same file."""
    path = Path(program)
    if path.name != COMMAND:  # called from Python
        return COMMAND
    found = shutil.which(COMMAND)
    if found and path.exists() and path.samefile(found):
        return COMMAND
    return min(program, os.path.relpath(path), key=len)


def as_json(story: Story, measured: Sequence[Measured]) -> dict[str, Any]:
    """What `dmax demo --json` gives."""
    rows = [{"label": each.setting.label, **as_record(each.summary)} for each in measured]
    watched = {
        "problem": story.example.prompt,
        "expected": story.example.answer,
        "choice": story.choice,
        "answers": [
            {
                "label": recording.setting.label,
                "output": recording.output.text,
                "is_correct": recording.is_correct,
                "num_forwards": recording.output.num_forwards,
                "seconds": recording.seconds,
                "revisions": recording.revisions,
            }
            for recording in story.recordings
        ],
    }
    return {"rows": rows, "watched": watched, "closing": closing(measured)}
