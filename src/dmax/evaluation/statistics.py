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
CAREFUL = 0.9  # threshold from which decoding counts as careful
PAPER_MARGIN = 10.0  # points of accuracy below the base model's that still count in the paper


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    z = 1.96  # of the normal distribution, for 95 %
    share = correct / total
    spread = z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(wins: int, losses: int) -> float:
    """How likely a difference as large is by chance: exact, two-sided, ties left out.

    On questions that two methods answered differently it is McNemar's exact test.
    """
    total = wins + losses
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1)) / 2**total
    return min(1.0, 2 * tail)


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]],
    *,
    best: float,
    floor: float | None = None,
) -> float:
    """AUP of d3LLM: the area under a curve of accuracy over TPF, low accuracies discounted.

        AUP = ρ_1 y_1 + ½ Σ_{i≥2} (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))
        W(y) = min(e^{-3 (1 - y/best)}, 1)

    Args:
        points: (TPF ρ, accuracy y in percent) of one method at its settings, in any order.
        best: accuracy that counts in full. d3LLM takes the best of the task. The figures of the
            DMax paper follow from the most careful accuracy of the base model.
        floor: points below it are left out. None is d3LLM's: five below the first accuracy of the
            curve. The figures of the DMax paper follow from ten below `best`.

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
        return accuracy * min(math.exp(-3 * (1 - accuracy / best)), 1.0)

    area = curve[0][0] * curve[0][1]
    for (tpf, accuracy), (next_tpf, next_accuracy) in pairwise(curve):
        area += (next_tpf - tpf) * (weighted(accuracy) + weighted(next_accuracy)) / 2
    return area


def furthest_at_best(curve: Sequence[Point], x: str = "tpf") -> Point:
    """The point of largest `x` whose accuracy lies within the interval of the curve's best one."""
    best = max(curve, key=lambda point: point["accuracy"])
    low, _ = best["interval"]
    kept = [point for point in curve if point["accuracy"] >= low]
    return max(kept, key=lambda point: point[x], default=best)


def our_curve(points: Sequence[Point]) -> str | None:
    """Label of the curve that shows DMax: of all decoded by SPD the one of largest AUP, if any."""
    areas = {row["label"]: row["aup"] for row in aup_table({"points": points})}
    by_spd = {point["label"] for point in points if point.get("strategy") == "spd"}
    return max(by_spd, key=lambda label: (areas[label], label), default=None)


def careful_base(points: Sequence[Point]) -> Point | None:
    """The base model decoded carefully: by threshold, at the highest one, `CAREFUL` or more.

    A base model is one that was not made for SPD. None if there is no such point, if points do not
    say what their model was made for, if there are several base models, or if it is never right.
    """
    candidates = [
        point
        for point in points
        if point.get("strategy") == "threshold"
        and point.get("made_for", "spd") != "spd"
        and point["value"] >= CAREFUL
    ]
    if len({point["model"] for point in candidates}) != 1:
        return None
    careful = max(candidates, key=lambda point: point["value"])
    return careful if careful["accuracy"] > 0 else None


def aup_table(record: SweepRecord) -> list[dict[str, Any]]:
    """`label`, `aup` and `aup_paper` of every curve, in percent times tokens per forward.

    `aup` is as d3LLM defines it, `aup_paper` as the figures of the DMax paper follow from. The
    latter takes the accuracy of `careful_base`; without one it is None.
    """
    curves: dict[str, list[tuple[float, float]]] = {}  # (TPF, accuracy in percent) by label
    for point in record["points"]:
        curve = curves.setdefault(point["label"], [])
        curve.append((point["tpf"], 100 * point["accuracy"]))
    best = max((accuracy for curve in curves.values() for _, accuracy in curve), default=0.0)
    base = careful_base(record["points"])
    yardstick = 100 * base["accuracy"] if base else None
    table = []
    for label, curve in curves.items():
        aup = accuracy_under_parallelism(curve, best=best) if best else 0.0
        paper = (
            accuracy_under_parallelism(curve, best=yardstick, floor=yardstick - PAPER_MARGIN)
            if yardstick is not None
            else None
        )
        table.append({"label": label, "aup": aup, "aup_paper": paper})
    return table
