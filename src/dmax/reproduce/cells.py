"""One cell: decode its benchmark, score the completions, and compare with what was published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dmax.errors import InputError
from dmax.evaluation.statistics import wilson_interval
from dmax.outputs import Cost, ratio
from dmax.reproduce.plan import Plan
from dmax.reproduce.table import MEASURED, Cell
from dmax.reproduce.verdicts import compare_tpf, score
from dmax.tasks import Example, Task
from dmax.tasks.published import published_scorer, published_tasks

if TYPE_CHECKING:
    from dmax.completers import Completer
    from dmax.evaluation.results import ResultFiles
    from dmax.evaluation.run import Sample, Summary


class Unscored:
    """A task whose completions are scored later, so that a run takes the time of decoding alone."""

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.max_new_tokens = task.max_new_tokens
        self.examples = task.examples

    def extract(self, text: str) -> str | None:
        """No answer yet."""
        return None

    def score(self, text: str, example: Example) -> bool:
        """Not right yet."""
        return False


def examples_of(plan: Plan, cell: Cell, task: Task) -> list[Example]:
    """The examples of a cell: as many as the published figures were measured on, or fewer."""
    published = plan.table.benchmarks[cell.benchmark].examples
    return task.examples(published if plan.limit is None else plan.limit, seed=0)


def decode(
    completer: Completer,
    plan: Plan,
    cell: Cell,
    task: Task,
    files: ResultFiles,
    progress: Callable[[int, int], None],
) -> None:
    """Decode the benchmark of a cell and write down what came out, scored strictly.

    Raises:
        InputError: a prompt cannot be decoded, or the files cannot be written.
    """
    from dmax.evaluation.run import evaluate

    examples = examples_of(plan, cell, task)
    summary, samples = evaluate(
        completer,
        Unscored(task),
        plan.params(cell),
        limit=len(examples),
        seed=0,
        model_name=plan.model(cell) or "",
        progress=progress,
        journal=files,
    )
    pairs = zip(samples, examples, strict=True)
    scored = [_scored(task, sample, example) for sample, example in pairs]
    files.finish(_with_score(summary, scored), scored)


def _scored(task: Task, sample: Sample, example: Example) -> Sample:
    return replace(
        sample,
        extracted=task.extract(sample.output),
        is_correct=task.score(sample.output, example),
    )


def _with_score(summary: Summary, samples: Sequence[Sample]) -> Summary:
    correct = sum(sample.is_correct for sample in samples)
    return replace(
        summary,
        accuracy=ratio(correct, len(samples)),
        correct=correct,
        interval=wilson_interval(correct, len(samples)),
    )


def measured(
    plan: Plan,
    cell: Cell,
    task: Task,
    summary: dict[str, Any],
    samples: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What a cell says, from the summary and the samples of its evaluation.

    `wrong` has the numbers of the examples that are wrong under each scoring, so that one can look
    where the two differ.

    Raises:
        InputError: the samples are not those of the examples.
    """
    examples = examples_of(plan, cell, task)
    if [sample["prompt"] for sample in samples] != [example.prompt for example in examples]:
        raise InputError(
            f"what was decoded for cell `{cell.name}` are other examples than those of now",
            hint="start anew with --overwrite",
        )
    published = plan.table.rows[cell.row].published[cell.benchmark]
    right = {"strict": [sample["is_correct"] for sample in samples]}
    if cell.benchmark in published_tasks():
        is_correct = published_scorer(cell.benchmark)
        pairs = zip(samples, examples, strict=True)
        right["published"] = [is_correct(sample["output"], example) for sample, example in pairs]
    costs = [Cost(sample["num_forwards"], sample["num_prefill_forwards"]) for sample in samples]
    ratios = [
        ratio(sample["generated_tokens"], cost.num_forwards_paper)
        for sample, cost in zip(samples, costs, strict=True)
    ]
    return {
        "status": MEASURED,
        "trial": plan.trial(cell, len(examples)),
        "scoring": plan.table.scoring,
        "scores": {name: asdict(score(each, published.accuracy)) for name, each in right.items()},
        "wrong": {name: _numbers_of_wrong(each) for name, each in right.items()},
        "tpf": summary["tpf"],
        "tpf_paper": asdict(compare_tpf(ratios, published.tpf)),
        "tokens_per_second": summary["tokens_per_second"],
        "hardware": hardware(plan, summary["environment"]),
        "summary": summary,
    }


def _numbers_of_wrong(is_correct: Sequence[bool]) -> list[int]:
    return [number for number, each in enumerate(is_correct) if not each]


def hardware(plan: Plan, environment: dict[str, Any]) -> str:
    """What a cell was decoded on and with, in words."""
    threads = environment.get("threads", "?")
    machine = f"{environment.get('cpu', 'a CPU')}, {threads} thread{'' if threads == 1 else 's'}"
    if "gpu" in environment:
        machine = f"{plan.engine.tensor_parallel} × {environment['gpu']}"
    engine = environment.get("engine", f"dmax {environment.get('dmax') or ''}".strip())
    return f"{machine}, {engine}"
