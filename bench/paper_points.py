"""What `bench/paper.py` has measured, by label and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ablation_training import SEEDS
from shares import Share, pooled, share_at

Record = dict[str, Any]


class Results:
    """The three records, by label and value."""

    def __init__(self, decoding: Record, training: Record, measures: Record) -> None:
        self.decoding = decoding
        self.training = training
        self.measures = measures

    def at(self, label: str, value: float) -> Share:
        """A point of the decoding sweep."""
        share = share_at(self.decoding["points"], label, value)
        if share is None:
            raise KeyError(f"{label} at {value:g} is not measured")
        return share

    def pooled(self, variant: str, how: str, value: float) -> Share:
        """A retrained variant over all seeds."""
        return pooled(_of_seeds(self.training, variant, how, value))


def of_all_seeds(training: Mapping[str, Any], variant: str, how: str, value: float) -> Share | None:
    """A retrained variant over all seeds; None where one of them is not measured."""
    held = _of_seeds(training, variant, how, value)
    return pooled(held) if len(held) == len(SEEDS) else None


def _of_seeds(training: Mapping[str, Any], variant: str, how: str, value: float) -> list[Record]:
    labels = {f"{variant}, {how}, seed {seed}" for seed in SEEDS}
    points = training.get("points", [])
    return [p for p in points if p["label"] in labels and p["value"] == value]
