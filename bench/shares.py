"""Shares of correct answers, whether one is larger beyond chance, and how long they took.

A difference of two shares counts when its 95 % interval (Newcombe's, from two Wilson intervals)
leaves out zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmax.evaluation.statistics import wilson_interval

HOLDS = "holds"
FAILS = "fails"
WITHIN_NOISE = "within noise"


@dataclass(frozen=True)
class Share:
    """Correct answers of so many, at a mean TPF; several seeds are pooled."""

    correct: int
    total: int
    tpf: float

    @property
    def rate(self) -> float:
        """Accuracy."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.correct}/{self.total} ({100 * self.rate:.1f} %) at TPF {self.tpf:.2f}"


def share_of(point: Mapping[str, Any]) -> Share:
    """The share of a point of a record."""
    return Share(point["correct"], point["total"], point["tpf"])


def share_at(points: Iterable[Mapping[str, Any]], label: str, value: float) -> Share | None:
    """The share of the point of a label and a value; None if it is not measured."""
    place = (label, value)
    return next((share_of(p) for p in points if (p["label"], p["value"]) == place), None)


def pooled(points: Sequence[Mapping[str, Any]]) -> Share:
    """Several points of a record counted together."""
    names = ("correct", "total", "generated_tokens", "num_forwards")
    correct, total, tokens, forwards = (sum(p[name] for p in points) for name in names)
    return Share(correct, total, tokens / forwards)


def difference(a: Share, b: Share) -> tuple[float, float, float]:
    """a - b in points with its 95 % interval (Newcombe's hybrid score interval)."""
    low_a, high_a = wilson_interval(a.correct, a.total)
    low_b, high_b = wilson_interval(b.correct, b.total)
    delta = a.rate - b.rate
    low = delta - math.hypot(a.rate - low_a, high_b - b.rate)
    high = delta + math.hypot(high_a - a.rate, b.rate - low_b)
    return 100 * delta, 100 * low, 100 * high


def verdict(a: Share, b: Share) -> str:
    """Whether it holds that a is more accurate than b."""
    _, low, high = difference(a, b)
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else WITHIN_NOISE


def collapses(share: Share, careful: Share) -> bool:
    """Whether less than half is left of what careful decoding solves."""
    return share.rate < careful.rate / 2


def gap(a: Share, b: Share) -> str:
    """The difference as text."""
    delta, low, high = difference(a, b)
    return f"{delta:+.1f} points ({low:+.1f} to {high:+.1f})"


def decoding_seconds(points: Iterable[Mapping[str, Any]]) -> float:
    """How long the points of a sweep took to decode."""
    timed = (p for p in points if p["tokens_per_second"])  # not where nothing was written
    return float(sum(p["generated_tokens"] / p["tokens_per_second"] for p in timed))
