"""Discrete diffusion forcing: several open blocks, each sees unfinished ones (arXiv 2508.09192)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding.strategy import Number, number, whole
from dmax.decoding.threshold import ThresholdDecoding


@dataclass(frozen=True)
class D2F(ThresholdDecoding):
    """Threshold decoding over several open blocks (algorithm 2).

    A block opens once `opens_at` of the one before is decoded and that one holds no EOS. Until
    `forces_at` of the one before is decoded it takes confident positions only and may wait;
    afterwards it takes at least the surest. It wants a model trained on unfinished predecessors
    (`dmax.baselines.objectives.D2FObjective`) and runs without one.

    Attributes:
        threshold: confidence to decode at.
        blocks: open at most; the source sets no limit but the length of the answer.
        opens_at: the source's tau_add.
        forces_at: the source's tau_act.
    """

    name: ClassVar[str] = "d2f"
    default_threshold: ClassVar[float] = 0.9  # the source's, as are the other two

    blocks: int = whole(4, low=1, high=64)
    opens_at: Number = number(0.1, high=1)
    forces_at: Number = number(0.95, high=1)
