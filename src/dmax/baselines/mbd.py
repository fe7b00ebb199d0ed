"""Soft parallel decoding of several open blocks (DMax with MBD-LMs, arXiv 2606.29215)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dmax.decoding.spd import SoftParallelDecoding
from dmax.decoding.strategy import Number, number, whole


@dataclass(frozen=True)
class MultiBlockSPD(SoftParallelDecoding):
    """SPD on several open blocks; the next one opens once the last is confident enough.

    Every open block is decoded, revised and fed back softly as in `SoftParallelDecoding`. A block
    after an unfinished one sees that one as it stands. Blocks close in order. The source publishes
    figures with DMax but not its rule for opening a block: ours counts the positions that are
    decoded with at least `stop_confidence`.

    Attributes:
        blocks: open at most.
        opens_at: share of a block that must be decoded and sure before the next one opens.
        forces_at: the same share, from which the next one must progress at every step.
        sure_from: confidence from which a decoded position counts as sure: `stop_confidence`.
    """

    name: ClassVar[str] = "mbd"

    blocks: int = whole(2, low=1, high=64)
    opens_at: Number = number(0.5, high=1)
    forces_at: Number = number(0.95, high=1)
    sure_from: Number = field(init=False, repr=False, metadata={"low": 0})

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        object.__setattr__(self, "sure_from", self.stop_confidence)
        super().__post_init__()
