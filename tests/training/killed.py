"""Training runs in processes of their own that are killed with SIGKILL at a chosen moment.

The moment is a number of calls, of Python functions and of functions written in C, so no clock is
looked at. One process imports what training needs and is forked for every run.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["accelerate", "dmax.recipe.run", "matplotlib.figure", __name__])


@dataclass(frozen=True, slots=True)
class Moment:
    """When a run is killed.

    Attributes:
        calls: how many calls are made before.
        in_saving: only calls while a checkpoint or the result is written are counted, and the run
            waits for its death there. Otherwise it goes on until the signal arrives, wherever that
            finds it, in the middle of a write too.
    """

    calls: int
    in_saving: bool


def train(recipe: Path) -> None:
    """Run a recipe to its end in a process of its own."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_train, args=(recipe, theirs, None))
    process.start()
    process.join()
    assert process.exitcode == 0


def count_calls(recipe: Path, *, in_saving: bool) -> int:
    """How many calls a run makes from its beginning to its end."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_train, args=(recipe, theirs, Moment(sys.maxsize, in_saving)))
    process.start()
    calls = ours.recv()
    process.join()
    assert process.exitcode == 0
    return calls


def train_and_kill(recipe: Path, moment: Moment) -> None:
    """Run a recipe until a moment, and kill its process there."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_train, args=(recipe, theirs, moment))
    process.start()
    assert ours.recv() == moment.calls
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _train(recipe: Path, parent: Connection, moment: Moment | None) -> None:
    """What a process does; it tells its parent when the moment has come, or all its calls."""
    import torch

    from dmax.recipe import run
    from dmax.recipe.sections import load_recipe
    from dmax.training.trainer import DMaxTrainer

    torch.set_num_threads(1)
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls == moment.calls:
                sys.setprofile(None)
                parent.send(calls)
                if moment.in_saving:
                    signal.pause()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def save(*args: Any, **kwargs: Any) -> Any:
            sys.setprofile(count)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return save

    if moment is None:
        run.run_recipe(load_recipe(recipe))
        return
    if moment.in_saving:
        DMaxTrainer._save_checkpoint = counted(DMaxTrainer._save_checkpoint)
        run.save_checkpoint = counted(run.save_checkpoint)
        run.run_recipe(load_recipe(recipe))
    else:
        counted(run.run_recipe)(load_recipe(recipe))
    parent.send(calls)
