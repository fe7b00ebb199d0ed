"""Accuracy against tokens per forward: models and methods over their settings, one record that grows point by point."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmax.checkpoint import weights_digest
from dmax.decoding import get_strategy
from dmax.environment import environment
from dmax.errors import InputError
from dmax.evaluation.run import Summary, evaluate
from dmax.evaluation.statistics import accuracy_under_parallelism
from dmax.files import check_writable, write_atomically
from dmax.llm import LLM
from dmax.outputs import as_record
from dmax.params import DecodingParams
from dmax.tasks import Task

# What is turned in methods without a threshold, from careful to bold.
KNOBS: dict[str, tuple[str, tuple[float, ...]]] = {
    "autoregressive": ("count", (1,)),
    "llada": ("steps", (32, 16, 11, 8, 6, 4)),
    "fast_dllm_factor": ("factor", (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)),
    "entropy_bound": ("bound", (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "demask": ("bound", (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "sched": ("margin", (9.0, 7.5, 6.0, 4.5, 3.0, 1.5)),
}
HEADS = ("demask", "learn2pd")  # methods with a trained head: the one that comes with the model
FIGURES = (
    "weights dtype accuracy correct total interval tpf tpf_paper generated_tokens num_forwards num_prefill_forwards "
    "num_commit_forwards num_positions tokens_per_second batch_size"
).split()
RECORD = "sweep.json"
PAGES = ("plot.svg", "plot.png", "report.html")  # what is drawn from the record
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Curve:
    """A model decoded with one method at several values of its knob.

    Attributes:
        label: name in tables and plots.
        model: bundled name, folder or hub id.
        strategy: name of the method.
        values: of its threshold, or of what stands in `KNOBS` for it.
        settings: further fields of `DecodingParams`.
    """

    label: str
    model: str
    strategy: str
    values: tuple[float, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def knob(self) -> str:
        """Name of what `values` set."""
        return KNOBS[self.strategy][0] if self.strategy in KNOBS else "threshold"

    def params(self, value: float, max_new_tokens: int) -> DecodingParams:
        """Decoding parameters at one value; raises `InputError` if the method does not take it."""
        chosen: dict[str, Any] = {
            "strategy": self.strategy,
            "max_new_tokens": max_new_tokens,
            **dict(self.settings),
        }
        if self.knob == "threshold":
            chosen["threshold"] = value
        elif (
            self.knob == "margin"
        ):  # both ends of the schedule, in the proportion the paper gives them
            chosen["options"] = {"high": value, "low": value / 3}
        elif self.knob != "count":
            chosen["options"] = {self.knob: int(value) if self.knob == "steps" else value}
        if self.strategy in HEADS:
            chosen["options"] = {"head": self.model, **chosen.get("options", {})}
        return DecodingParams(**chosen)


def curves_of(
    models: Sequence[str], strategies: Sequence[str], thresholds: Sequence[float]
) -> list[Curve]:
    """Every model with every method; a method without a threshold takes its own values.

    Labels have the last part of a model's path, or the whole one where two models would be called
    the same.
    """
    found = []
    names = [Path(model).name for model in dict.fromkeys(models)]
    for model in dict.fromkeys(models):
        name = Path(model).name if names.count(Path(model).name) == 1 else model
        for strategy in dict.fromkeys(strategies):
            values = KNOBS[strategy][1] if strategy in KNOBS else tuple(thresholds)
            found.append(Curve(f"{name}, {strategy}", model, strategy, values))
            for value in values:
                get_strategy(
                    found[-1].params(value, 1)
                )  # a wrong name or value is an error before any computing
    return found


def parse_grid(text: str) -> tuple[float, ...]:
    """Numbers from `start:stop:step`, both ends included, or from a list `a,b,c`; raises `InputError` otherwise."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = round((stop - start) / step)
            if step <= 0 or not 0 <= count <= 1000:
                raise ValueError
            return tuple(round(start + index * step, 10) for index in range(count + 1))
        return tuple(float(part) for part in text.split(","))
    except (ValueError, ArithmeticError):  # no number, a step of 0, no end
        raise InputError(
            f"cannot read the grid {text!r}", hint="write start:stop:step or a,b,c"
        ) from None


def check_folder(folder: Path) -> None:
    """Make sure that the record and the pages of a sweep can be written to a folder.

    Raises:
        InputError: it cannot be written, or holds a file of that name that no sweep wrote.
    """
    record = folder / RECORD
    check_writable(record)
    if record.exists():
        return  # `run_sweep` looks at whose it is
    for name in PAGES:
        if (folder / name).exists():
            raise InputError(
                f"{folder / name} exists and no sweep wrote it", hint="choose another output folder"
            )


def run_sweep(
    curves: Sequence[Curve],
    task: Task,
    output: Path,
    *,
    limit: int,
    seed: int,
    max_new_tokens: int | None = None,
    data: str | None = None,
    open_model: Callable[[str], LLM],
    report: Callable[[str], None] = lambda line: None,
) -> Record:
    """Measure every point that `output` does not hold yet, and write it after each.

    A point counts as held if weights and value are the same, so an interrupted sweep goes on where
    it stopped and a retrained model is measured anew. `data` names the file of the task's rows, if
    it has one; `max_new_tokens` None is what the task needs.

    Raises:
        InputError: `output` holds something else or a sweep of another task, limit, seed, file or
            `max_new_tokens`, or cannot be written.
    """
    length = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    header = {
        "task": task.name,
        "limit": limit,
        "seed": seed,
        "data": data,
        "max_new_tokens": length,
    }
    record = _read(output, header, task.max_new_tokens)
    for model, own in _by_model(curves):
        llm = open_model(model)
        weights = weights_digest(llm.model)
        for curve in own:
            record["points"] = [
                p for p in record["points"] if p["label"] != curve.label or p["weights"] == weights
            ]
            held = {p["value"] for p in record["points"] if p["label"] == curve.label}
            for value in (v for v in curve.values if v not in held):
                params = curve.params(value, length)
                summary, _ = evaluate(llm, task, params, limit=limit, seed=seed, model_name=model)
                point = _point(curve, value, summary)
                record["points"].append(point)
                record["environment"] = environment(llm.model.device)
                write_atomically(output, json.dumps(record, indent=1) + "\n")
                report(describe(point))
    return record


def _read(output: Path, header: Record, usual_length: int) -> Record:
    if not output.exists():
        return {**header, "environment": environment(), "points": []}
    try:
        record: Record = {"data": None, "max_new_tokens": usual_length} | json.loads(
            output.read_text(encoding="utf-8")
        )
        found = {name: record[name] for name in header}
        record["points"]  # noqa: B018  # a sweep has them
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{output} is not the record of a sweep", hint="choose another output"
        ) from None
    if found != header:
        raise InputError(
            f"{output} holds a sweep of {found}, not of {header}", hint="choose another output"
        )
    return record


def _by_model(curves: Sequence[Curve]) -> Iterator[tuple[str, list[Curve]]]:
    for model in dict.fromkeys(curve.model for curve in curves):
        yield model, [curve for curve in curves if curve.model == model]


def _point(curve: Curve, value: float, summary: Summary) -> Record:
    measured = as_record(summary)
    figures = {name: measured[name] for name in FIGURES}
    identity = {
        "label": curve.label,
        "model": curve.model,
        "strategy": curve.strategy,
        "knob": curve.knob,
    }
    return {
        **identity,
        "value": value,
        **figures,
        "params": asdict(curve.params(value, 1)) | {"max_new_tokens": None},
    }


def describe(point: Record) -> str:
    """One line for a terminal."""
    share = f"{point['correct']}/{point['total']}"
    return f"{point['label']:32} {point['knob']} {point['value']:<5g} {share:>9} TPF {point['tpf']:.2f}"


def pareto(points: Sequence[Record], x: str = "tpf") -> list[Record]:
    """The points that no other beats in accuracy and in `x` at once, by rising `x`."""
    front: list[Record] = []
    for point in sorted(points, key=lambda p: (-p[x], -p["accuracy"])):
        if not front or point["accuracy"] > front[-1]["accuracy"]:
            front.append(point)
    return front[::-1]


def aup_table(record: Record) -> list[Record]:
    """AUP of every curve: as d3LLM defines it, and as the DMax paper's figures follow from.

    The base of the second is the most careful point of the first curve.
    """
    points = record["points"]
    labels = list(dict.fromkeys(point["label"] for point in points))
    curves = {
        label: [(p["tpf"], 100 * p["accuracy"]) for p in points if p["label"] == label]
        for label in labels
    }
    if not curves:
        return []
    best = max(accuracy for curve in curves.values() for _, accuracy in curve)
    base = min(curves[labels[0]])[1]
    return [
        {
            "label": label,
            "aup": accuracy_under_parallelism(curve, best=best) if best else 0.0,
            "aup_paper": accuracy_under_parallelism(curve, best=base, floor=base - 10)
            if base
            else 0.0,
        }
        for label, curve in curves.items()
    ]
