"""Figures with their uncertainty, and what the points of a sweep say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Point = dict[str, Any]
"""One measured point: label, model, strategy, knob, value, figures and parameters."""
SweepRecord = dict[str, Any]
"""A sweep as its file has it: what was asked, the environment, and the points."""


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    spread = z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]],
    *,
    best: float,
    floor: float | None = None,
    alpha: float = 3.0,
) -> float:
    """AUP of d3LLM: the area under a curve of accuracy over TPF, low accuracies discounted.

        AUP = ρ_1 y_1 + ½ Σ_{i≥2} (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))
        W(y) = min(e^{-α (1 - y/best)}, 1)

    Args:
        points: (TPF ρ, accuracy y in percent) of one method at its settings, in any order.
        best: accuracy that counts in full. d3LLM takes the best of the task. The figures of the
            DMax paper follow from the most careful accuracy of the base model.
        floor: points below it are left out. None is d3LLM's: five below the first accuracy of the
            curve. The figures of the DMax paper follow from ten below `best`.
        alpha: how steeply lower accuracies are discounted.

    Returns:
        The area; 0 when every point is below `floor`.
    """
    curve = sorted(points)
    if floor is None:
        floor = curve[0][1] - 5 if curve else 0.0
    curve = [(tpf, accuracy) for tpf, accuracy in curve if accuracy >= floor]
    if not curve:
        return 0.0

    def weighted(accuracy: float) -> float:
        return accuracy * min(math.exp(-alpha * (1 - accuracy / best)), 1.0)

    area = curve[0][0] * curve[0][1]
    for (tpf, accuracy), (next_tpf, next_accuracy) in pairwise(curve):
        area += (next_tpf - tpf) * (weighted(accuracy) + weighted(next_accuracy)) / 2
    return area


def pareto(points: Sequence[Point], x: str = "tpf") -> list[Point]:
    """The points that no other beats in accuracy and in `x` at once, by rising `x`."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p[x], -p["accuracy"])):
        if not front or point["accuracy"] > front[-1]["accuracy"]:
            front.append(point)
    return front[::-1]


def aup_table(record: SweepRecord) -> list[dict[str, Any]]:
    """`label`, `aup` and `aup_paper` of every curve.

    `aup` is as d3LLM defines it, `aup_paper` as the figures of the DMax paper follow from. The base
    model's accuracy in the latter is the most careful point of the first curve.
    """
    curves: dict[str, list[tuple[float, float]]] = {}  # (TPF, accuracy in percent) by label
    for point in record["points"]:
        curve = curves.setdefault(point["label"], [])
        curve.append((point["tpf"], 100 * point["accuracy"]))
    if not curves:
        return []
    best = max(accuracy for curve in curves.values() for _, accuracy in curve)
    _, base = min(next(iter(curves.values())))
    table = []
    for label, curve in curves.items():
        aup = accuracy_under_parallelism(curve, best=best) if best else 0.0
        paper = accuracy_under_parallelism(curve, best=base, floor=base - 10) if base else 0.0
        table.append({"label": label, "aup": aup, "aup_paper": paper})
    return table
