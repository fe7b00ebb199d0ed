"""Accuracy against tokens per forward: models and methods over their settings.

A sweep is one record that grows point by point, so that an interrupted one goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dmax.decoding import check_strategy, strategy_class
from dmax.environment import environment, weights_digest
from dmax.errors import InputError, show
from dmax.evaluation.run import Summary, evaluate
from dmax.evaluation.statistics import Point, SweepRecord
from dmax.files import check_writable, read_record, write_atomically
from dmax.llm import LLM
from dmax.outputs import as_record
from dmax.params import DecodingParams
from dmax.tasks import Task

# What is varied in methods without a threshold, and its values from careful to bold.
KNOBS: dict[str, tuple[str, tuple[float, ...]]] = {
    "autoregressive": ("count", (1,)),
    "llada": ("steps", (32, 16, 11, 8, 6, 4)),
    "fast_dllm_factor": ("factor", (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)),
    "entropy_bound": ("bound", (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "demask": ("bound", (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "sched": ("margin", (9.0, 7.5, 6.0, 4.5, 3.0, 1.5)),
}
SHARED = [field.name for field in fields(DecodingParams)]  # the rest are options
HEADS = ("demask", "learn2pd")  # methods with a trained head; the model's own is taken
FIGURES = (
    "weights dtype accuracy correct total interval tpf tpf_paper generated_tokens num_forwards "
    "num_prefill_forwards num_commit_forwards num_positions tokens_per_second batch_size"
).split()
NO_NUMBERS = ("weights", "dtype", "interval")
MOST = 1e18  # of a figure in a record; NaN is not below it
MOST_VALUES = 1001  # of one curve: 0:1:0.001
RECORD = "sweep.json"
PAGES = ("plot.svg", "plot.png", "report.html")  # what is drawn from the record


@dataclass(frozen=True, slots=True)
class Curve:
    """A model decoded with one method at several values of its knob.

    Attributes:
        label: name in tables and plots.
        model: bundled name, folder or hub id.
        strategy: name of the method.
        values: of its threshold, or of its knob in `KNOBS`; one that is given twice counts once.
        settings: further fields of `DecodingParams`.
    """

    label: str
    model: str
    strategy: str
    values: tuple[float, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(dict.fromkeys(self.values)))

    @property
    def knob(self) -> str:
        """Name of what `values` set."""
        return KNOBS[self.strategy][0] if self.strategy in KNOBS else "threshold"

    def params(self, value: float, max_new_tokens: int) -> DecodingParams:
        """Decoding parameters at one value; raises `InputError` if the method does not take it."""
        shared = {name: given for name, given in self.settings if name in SHARED}
        options = {name: given for name, given in self.settings if name not in SHARED}
        if self.knob == "threshold":
            shared["threshold"] = value
        elif self.knob == "margin":  # both ends of the schedule, in the paper's proportion
            options |= {"high": value, "low": value / 3}
        elif self.knob == "steps":
            options["steps"] = int(value)
        elif self.knob != "count":
            options[self.knob] = value
        if self.strategy in HEADS:
            options["head"] = self.model
        return DecodingParams(
            self.strategy, max_new_tokens=max_new_tokens, options=options, **shared
        )


def curves_of(
    models: Sequence[str],
    strategies: Sequence[str],
    thresholds: Sequence[float],
    max_new_tokens: int | None = None,
) -> list[Curve]:
    """Every model with every method; a method without a threshold takes its own values.

    A label has the last part of the model's path, or the whole path if two models would be called
    the same.

    Raises:
        InputError: a name or a value is wrong. That is known before anything is computed.
    """
    length = 1 if max_new_tokens is None else max_new_tokens
    curves = []
    models = list(dict.fromkeys(models))
    names = [Path(model).name for model in models]
    for model, name in zip(models, names, strict=True):
        shown = name if names.count(name) == 1 else model
        for strategy in dict.fromkeys(strategies):
            _, values = KNOBS.get(strategy, ("threshold", tuple(thresholds)))
            curve = Curve(f"{shown}, {strategy}", model, strategy, values)
            for value in values:
                check_strategy(curve.params(value, length))
            curves.append(curve)
    return curves


def parse_grid(text: str) -> tuple[float, ...]:
    """Numbers from `start:stop:step`, both ends included, or from a list `a,b,c`.

    Raises:
        InputError: the text is neither, or asks for more than a thousand values.
    """
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = round((stop - start) / step)
            if step <= 0 or not 0 <= count < MOST_VALUES:
                raise ValueError
            return tuple(round(start + index * step, 10) for index in range(count + 1))
        values = tuple(float(part) for part in text.split(","))
        if len(values) > MOST_VALUES:
            raise ValueError
        return values
    except (ValueError, ArithmeticError):  # not a number, a step of 0, or too many
        raise InputError(
            f"cannot read the grid {show(text)}",
            hint=f"write start:stop:step or a,b,c, at most {MOST_VALUES} values",
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SweepRecord:
    """Measure every point that `output` does not hold yet, and write it after each.

    A point is held already if weights, method, settings and value are the same. So an interrupted
    sweep goes on where it stopped, and a retrained model is measured anew. The record's
    `environment` is that of its first point; one that was measured elsewhere has its own.

    Args:
        curves: what to measure.
        task: what to solve.
        output: the file of the sweep.
        limit: how many examples.
        seed: of the examples.
        max_new_tokens: longest completion; None: what the task needs.
        data: name of the file of the task's rows, if it has one.
        open_model: gives the model of a name.
        report: told each point in one line.
        progress: told how many of how many points are measured.

    Returns:
        The whole record, with the points that were held already.

    Raises:
        InputError: `output` cannot be written, holds something else, or holds a sweep of another
            task, limit, seed, file or `max_new_tokens`.
    """
    length = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    header = dict(task=task.name, limit=limit, seed=seed, data=data, max_new_tokens=length)
    record = _read_sweep(output, header, task.max_new_tokens)
    total = sum(len(curve.values) for curve in curves)
    num_done = 0
    progress(num_done, total)
    for model, own in _by_model(curves):
        llm = open_model(model)
        weights = weights_digest(llm.model)
        for curve in own:
            left = _values_left(record, curve, weights, curves)
            num_done += len(curve.values) - len(left)
            for value in left:
                params = curve.params(value, length)
                summary, _ = evaluate(llm, task, params, limit=limit, seed=seed, model_name=model)
                point = _point(curve, value, summary, llm.checkpoint.decoding)
                add_points(record, [point], environment(llm.model.device))
                write_atomically(output, json.dumps(record, indent=1) + "\n")
                report(describe(point))
                num_done += 1
                progress(num_done, total)
    return record


def add_points(record: SweepRecord, points: Sequence[Point], measured_in: dict[str, Any]) -> None:
    """Add points to a record; they say where they were measured if others were measured elsewhere.

    Args:
        record: gets the points and, with its first ones, their environment.
        points: measured in one environment, unless they name one.
        measured_in: that environment, from `dmax.environment.environment`.
    """
    if not record["points"]:
        record["environment"] = measured_in
    theirs = record.setdefault("environment", measured_in)
    own = {} if is_same_environment(measured_in, theirs) else {"environment": measured_in}
    record["points"] += [own | point for point in points]


def is_same_environment(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two environments are the same machine with the same software, whatever the date."""
    return one | {"date": None} == other | {"date": None}


def _read_sweep(output: Path, header: dict[str, Any], usual_length: int) -> SweepRecord:
    """The sweep of this header in `output`; without a file, one that has no points yet."""
    if not output.exists():
        return {**header, "environment": environment(), "points": []}
    written_later = {"data": None, "max_new_tokens": usual_length}  # older files lack them
    held = read_record(output)
    if not _is_sweep(held):
        raise InputError(f"{output} is not the record of a sweep", hint="choose another output")
    record: SweepRecord = written_later | held
    found = {name: record.get(name) for name in header}
    if found != header:
        raise InputError(
            f"{output} holds a sweep of {found}, not of {header}", hint="choose another output"
        )
    return record


def _is_sweep(held: Any) -> bool:
    """Whether this is the record of a sweep, with all that is read of its points."""
    if not isinstance(held, dict) or not isinstance(held.get("environment", {}), dict):
        return False
    points = held.get("points")
    return isinstance(points, list) and all(map(_is_point, points))


def _is_point(held: Any) -> bool:
    if not isinstance(held, dict) or not held.keys() >= {"label", "value", *FIGURES}:
        return False
    sections = [held.get(name, {}) for name in ("params", "environment")]
    interval = held["interval"]
    if not (isinstance(interval, list) and len(interval) == 2 and isinstance(held["label"], str)):
        return False
    numbers = [held[name] for name in ("value", *FIGURES) if name not in NO_NUMBERS] + interval
    return (
        all(isinstance(section, dict) for section in sections)
        and all(type(number) in (int, float) and abs(number) < MOST for number in numbers)
        and 0 <= held["accuracy"] <= 1
    )


def _values_left(
    record: SweepRecord, curve: Curve, weights: str, curves: Sequence[Curve]
) -> list[float]:
    """Values of a curve that are still to be measured.

    Points under its label that are of other weights, or of none of the curves, are dropped.
    """
    record["points"] = [
        point
        for point in record["points"]
        if point["label"] != curve.label
        or (point["weights"] == weights and any(is_of(each, point) for each in curves))
    ]
    held = [point["value"] for point in record["points"] if is_of(curve, point)]
    return [value for value in curve.values if value not in held]


def is_of(curve: Curve, point: Point) -> bool:
    """Whether a point that is held was decoded as a curve decodes at the point's value."""
    names = (point["label"], point.get("strategy", curve.strategy))
    if names != (curve.label, curve.strategy):
        return False
    try:
        params = curve.params(point["value"], max_new_tokens=1)
        return "params" not in point or is_decoded_so(point["params"], params)
    except (TypeError, ValueError):  # the value is one of another knob, or the record is damaged
        return False


def is_decoded_so(held: Mapping[str, Any], params: DecodingParams) -> bool:
    """Whether the parameters in a record mean the same as these, whatever `max_new_tokens` is.

    A setting that the record lacks has come later and had its default. One that it has among the
    parameters may be an option today.
    """
    now = _all_settings(params.strategy, asdict(params))
    before = _all_settings(params.strategy, held)
    return all(before.get(name) == value for name, value in now.items())


def _all_settings(strategy: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and options by name, with their defaults, as JSON has them."""
    own: Any = strategy_class(strategy)  # a dataclass, which mypy cannot know
    options = {entry.name: entry.default for entry in fields(own)}
    given = {**options, **asdict(DecodingParams()), **params, **dict(params.get("options", ()))}
    apart = {"options": None, "max_new_tokens": None}
    return dict(json.loads(json.dumps(given | apart, default=str)))


def _by_model(curves: Sequence[Curve]) -> Iterator[tuple[str, list[Curve]]]:
    for model in dict.fromkeys(curve.model for curve in curves):
        yield model, [curve for curve in curves if curve.model == model]


def _point(curve: Curve, value: float, summary: Summary, made_for: str | None) -> Point:
    measured = as_record(summary)
    params = asdict(curve.params(value, max_new_tokens=1))
    return {
        "label": curve.label,
        "model": curve.model,
        "made_for": made_for,
        "strategy": curve.strategy,
        "knob": curve.knob,
        "value": value,
        **{name: measured[name] for name in FIGURES},
        "params": params | {"max_new_tokens": None},
    }


def describe(point: Point) -> str:
    """A point in one line for a terminal."""
    setting = f"{point['label']:32} {point['knob']} {point['value']:<5g}"
    share = f"{point['correct']}/{point['total']}"
    return f"{setting} {share:>9} TPF {point['tpf']:.2f}"
