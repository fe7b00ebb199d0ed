"""Is a model faster at equal accuracy for going on with an objective? The criterion of `beyond.py`.

It was written down before anything was measured, and stands in words on the page
(`beyond_page.TEMPLATE`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from beyond_runs import BASE, DECODINGS, DMAX, SEEDS, TRAINED, Run
from shares import WITHIN_NOISE, decoding_seconds, pooled

from dmax.evaluation.statistics import Point, wilson_interval

Record = dict[str, Any]
T_95 = {2: 12.706, 3: 4.303}  # Student's two-sided quantile, by the number of seeds
FASTER = "faster at equal accuracy"
SLOWER = "slower at equal accuracy"
SOME_SEEDS = "as accurate with some seeds only"
NEVER = "never as accurate"
TOO_FEW_SEEDS = "not decided yet: fewer than two seeds"
VERDICTS = (FASTER, WITHIN_NOISE, SLOWER, SOME_SEEDS, NEVER, TOO_FEW_SEEDS)


def tpf_at(points: Sequence[Point], level: float) -> float | None:
    """The largest TPF at which a curve, interpolated, has this accuracy or more; None: nowhere."""
    curve = sorted((point["tpf"], point["accuracy"]) for point in points)
    reached = [tpf for tpf, accuracy in curve if accuracy >= level]
    for (tpf, accuracy), (next_tpf, next_accuracy) in pairwise(curve):
        if next_accuracy < level < accuracy:
            share = (accuracy - level) / (accuracy - next_accuracy)
            reached.append(tpf + share * (next_tpf - tpf))
    return max(reached, default=None)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two or three values with its 95 % interval by Student's distribution."""
    mean = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


class Found:
    """The measured points, by model, decoding and seed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.trained: Record = record.get("training", {})
        self._curves: dict[str, list[Point]] = {}
        for point in record["points"]:
            self._curves.setdefault(point["label"], []).append(point)

    def curve(self, run: Run, decoding: str, seed: int | None = None) -> list[Point]:
        """The points of a curve from careful to bold; empty unless all are measured."""
        asked = run.curve(decoding, seed)
        points = {point["value"]: point for point in self._curves.get(asked.label, [])}
        measured = points.keys() >= set(asked.values)
        return [points[value] for value in asked.values] if measured else []

    def seeds(self, run: Run, decoding: str) -> list[int]:
        """The seeds whose curve is measured."""
        return [seed for seed in SEEDS if self.curve(run, decoding, seed)]

    def level(self, decoding: str) -> float:
        """The accuracy that a curve is asked for."""
        run, name, value = (BASE, decoding, 0.95) if decoding == "threshold" else (DMAX, "spd", 0.5)
        (point,) = (point for point in self.curve(run, name) if point["value"] == value)
        return float(point["interval"][0])

    def tpf(self, run: Run, decoding: str, seed: int | None = None) -> float | None:
        """The figure of one curve; None if it is never as accurate."""
        return tpf_at(self.curve(run, decoding, seed), self.level(decoding))

    def tpfs(self, run: Run, decoding: str) -> list[float | None]:
        """The figure of each seed that is measured."""
        return [self.tpf(run, decoding, seed) for seed in self.seeds(run, decoding)]

    def trainings(self, run: Run) -> dict[int, Record]:
        """What is recorded of the training of each seed."""
        names = {seed: f"{run.name}-{seed}" for seed in SEEDS}
        return {seed: self.trained[name] for seed, name in names.items() if name in self.trained}

    def decoded(self, run: Run, seed: int) -> list[Point]:
        """All points of a seed."""
        return [point for name in run.decodings for point in self.curve(run, name, seed)]

    def decoding_seconds(self, run: Run, seed: int) -> float:
        """How long all points of a seed took to decode."""
        points = self.decoded(run, seed)
        return decoding_seconds(points)

    def pooled(self, run: Run, decoding: str) -> list[Point]:
        """The points of a curve, all measured seeds counted together."""
        curves = [self.curve(run, decoding, seed) for seed in self.seeds(run, decoding)]
        label = f"{run.label}, {DECODINGS[decoding][0]}"
        return [together(points, label) for points in zip(*curves, strict=True)]


def together(points: Sequence[Point], label: str) -> Point:
    """One point of the counts of several."""
    share = pooled(points)
    return points[0] | {
        "label": label,
        "correct": share.correct,
        "total": share.total,
        "accuracy": share.rate,
        "interval": wilson_interval(share.correct, share.total),
        "tpf": share.tpf,
    }


def start_of(run: Run, decoding: str) -> Run:
    """The model whose curve a run's is compared with: SPD says nothing of `tiny-base`."""
    return BASE if decoding == "threshold" else DMAX


def control_of(run: Run) -> Run | None:
    """The run that goes on with OPUT from the same model."""
    return next((other for other in TRAINED if other.name == run.control), None)


def differences(found: Found, run: Run, decoding: str, other: Run) -> list[float] | None:
    """The TPF of a run less that of another, seed by seed; None if one is never as accurate.

    Seeds of which only the other is never as accurate have no difference.
    """
    is_trained = other.recipe is not None
    seeds = found.seeds(run, decoding)
    if is_trained:
        seeds = [seed for seed in seeds if found.curve(other, decoding, seed)]
    ours = [found.tpf(run, decoding, seed) for seed in seeds]
    theirs = [found.tpf(other, decoding, seed if is_trained else None) for seed in seeds]
    if None in ours:
        return None
    pairs = zip(ours, theirs, strict=True)
    return [one - two for one, two in pairs if one is not None and two is not None]


def all_differences(found: Found, run: Run, decoding: str) -> list[list[float] | None]:
    """From the start, and from the control if there is one."""
    others = [start_of(run, decoding), *filter(None, [control_of(run)])]
    return [differences(found, run, decoding, other) for other in others]


def deciding(found: Found, run: Run, decoding: str) -> list[list[float] | None]:
    """`all_differences` without those from a control that is measured and does not get there.

    Its seeds are compared with the start alone, and a single one that is left has no interval.
    """
    from_start, *from_control = all_differences(found, run, decoding)
    control = control_of(run)
    measured = found.seeds(control, decoding) if control else []
    is_all = set(measured) >= set(found.seeds(run, decoding))
    few = [each for each in from_control if each is not None and len(each) < 2]
    return [from_start] if is_all and few else [from_start, *from_control]


def judge(values: Sequence[float] | None) -> str:
    """What the differences of the seeds say."""
    if values is None:
        return NEVER
    if len(values) < 2:
        return TOO_FEW_SEEDS
    _, low, high = mean_interval(values)
    return FASTER if low > 0 else SLOWER if high < 0 else WITHIN_NOISE


def verdict(found: Found, run: Run, decoding: str) -> str:
    """Faster than both the control and the start, slower than one of them, or neither."""
    verdicts = {judge(values) for values in deciding(found, run, decoding)}
    for name in (TOO_FEW_SEEDS, NEVER, SLOWER, WITHIN_NOISE):
        if name in verdicts:
            return SOME_SEEDS if name == NEVER and any(found.tpfs(run, decoding)) else name
    return FASTER
