"""Sweeps as the studies here make them: the same unseen problems, and every line as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dmax.evaluation.sweep import Curve, run_sweep
from dmax.llm import LLM
from dmax.tasks import get_task

SEED = 7  # of the problems
BATCH_SIZE = 64


def open_llm(name: str) -> LLM:
    """A model, for the batches of a sweep."""
    return LLM(name, max_batch_size=BATCH_SIZE)


def sweep(
    curves: Iterable[Curve],
    output: Path,
    limit: int,
    *,
    task: str = "word_problems",
    seed: int = SEED,
    open_model: Callable[[str], LLM] = open_llm,
) -> dict[str, Any]:
    """Decode what a record does not have yet; each point is written as soon as it is there.

    Args:
        curves: to measure.
        output: of the record.
        limit: problems of a point.
        task: they are of.
        seed: of the problems.
        open_model: gives the model of a curve.
    """
    return run_sweep(
        list(curves),
        get_task(task),
        output,
        limit=limit,
        seed=seed,
        open_model=open_model,
        report=partial(print, flush=True),
    )


def present(curves: Iterable[Curve]) -> list[Curve]:
    """Those whose model comes with the package, or lies under `runs/`."""
    return [c for c in curves if not c.model.startswith("runs/") or Path(c.model).is_dir()]
