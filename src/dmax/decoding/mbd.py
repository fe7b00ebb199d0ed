"""Soft parallel decoding of several blocks at once (DMax with MBD-LMs' window, arXiv 2606.29215)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding.block import Window
from dmax.decoding.spd import SoftParallelDecoding
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class MultiBlockSPD(SoftParallelDecoding):
    """SPD on a window of blocks; the next opens once the last is confident enough.

    Every open block is decoded, revised and fed back softly as in `SoftParallelDecoding`; one ahead
    of an unfinished block sees that block as it stands. Blocks close in order. The source publishes
    figures with DMax but not its rule for opening a block: ours counts the positions decoded with
    at least `stop_confidence`.

    Attributes:
        blocks: open at most.
        opens_at: share of a block's positions that must be decoded and sure before the next one
            opens.
        forces_at: the same share, from which the next one must progress at every step.
    """

    name: ClassVar[str] = "mbd"

    blocks: int = 2
    opens_at: float = 0.5
    forces_at: float = 0.95

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("blocks", self.blocks, low=1, high=64, whole=True)
        check_number("opens_at", self.opens_at, low=0, high=1)
        check_number("forces_at", self.forces_at, low=0, high=1)

    @property
    def window(self) -> Window:
        """When blocks open, and when they must progress."""
        return Window(self.blocks, self.opens_at, self.forces_at, settled_at=self.stop_confidence)
