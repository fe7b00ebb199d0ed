"""Discrete diffusion forcing: several blocks in flight, each seeing unfinished ones before it (arXiv 2508.09192)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding.block import Window
from dmax.decoding.threshold import ThresholdDecoding
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class D2F(ThresholdDecoding):
    """Threshold decoding over a window of blocks (algorithm 2).

    A block opens once `opens_at` of the one before is decoded, and holds no EOS; until `forces_at`
    of the one before is decoded it takes confident positions alone and may wait, afterwards at
    least the surest. Wants a model trained on unfinished predecessors
    (`dmax.baselines.objectives.d2f_loss`); runs without.

    Attributes:
        threshold: confidence to decode at.
        blocks: open at most; the source sets no limit but the length of the answer.
        opens_at: the source's tau_add.
        forces_at: the source's tau_act.
    """

    name: ClassVar[str] = "d2f"
    default_threshold: ClassVar[float] = 0.9  # the source's, as are the other two

    blocks: int = 4
    opens_at: float = 0.1
    forces_at: float = 0.95

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("blocks", self.blocks, low=1, high=64, whole=True)
        check_number("opens_at", self.opens_at, low=0, high=1)
        check_number("forces_at", self.forces_at, low=0, high=1)

    @property
    def window(self) -> Window:
        """When blocks open, and when they must progress."""
        return Window(self.blocks, opens_at=self.opens_at, forces_at=self.forces_at)
