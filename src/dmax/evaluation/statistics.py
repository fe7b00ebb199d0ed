"""Figures with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


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
