"""What a request costs, as vLLM's scheduler can tell: it knows what it planned and what came out.

This module imports no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmax.outputs import Cost


@dataclass(slots=True)
class Forwards:
    """Forwards of a request.

    Attributes:
        block_length: L.
        num_forwards: denoising forwards, those that also committed a block included.
        num_prefill_forwards: forwards over its prompt.
        num_commit_forwards: forwards that only wrote keys and values of its last final block.
        is_uncommitted: a block was emitted, and its clean keys and values are still to be written.
    """

    block_length: int
    num_forwards: int = 0
    num_prefill_forwards: int = 0
    num_commit_forwards: int = 0
    is_uncommitted: bool = False

    def count(self, width: int, has_emitted: bool) -> bool:
        """Count a forward.

        Args:
            width: tokens of open and final blocks in it; 0: it read a part of the prompt.
            has_emitted: a block has converged in it.

        Returns:
            Whether it was a denoising forward.
        """
        is_commit = self.is_uncommitted and width == self.block_length
        is_denoising = width > 0 and not is_commit
        self.num_prefill_forwards += not width
        self.num_commit_forwards += is_commit
        self.num_forwards += is_denoising
        self.is_uncommitted = has_emitted
        return is_denoising

    @property
    def next_width(self) -> int:
        """Tokens of the next forward: the open block, and what is to be committed before it."""
        return self.block_length * (1 + self.is_uncommitted)

    @property
    def cost(self) -> Cost:
        """The counts."""
        return Cost(self.num_forwards, self.num_prefill_forwards, self.num_commit_forwards)
