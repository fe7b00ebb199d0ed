"""The open blocks of another engine's requests, decoded by the strategies of the heart.

A host engine runs the forwards and keeps the keys and values; it gives every request a slot. Before
a forward it asks for the `inputs` of the open blocks, after it hands the logits to `decide`. Both
go under `torch.inference_mode()`. Every slot has one open block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dmax.blend import Embed
from dmax.decoding.block import Output
from dmax.decoding.strategy import Strategy
from dmax.engine.blocks import OpenBlocks
from dmax.engine.step import decide
from dmax.errors import InputError
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

logger = logging.getLogger(__name__)

MAX_IDLE = 8
"""Open blocks of this many strategies are kept when no slot uses them."""
MOST_LOGITS = 2**28
"""Logits that are decided about at once: a strategy may hold several float32 copies of them."""


class Slots:
    """One open block for each slot of a host engine.

    Args:
        special_ids: of the checkpoint.
        num_slots: requests that the engine runs at once.
        embed: the model's input embeddings, from ids of any shape to one more dimension.
        device: of the logits.

    Attributes:
        spare: a row behind those of all slots, for what is computed and means nothing.
    """

    def __init__(
        self, special_ids: SpecialIds, num_slots: int, embed: Embed, device: torch.device
    ) -> None:
        self.special_ids = special_ids
        self.spare = num_slots
        self.embed = embed
        self.device = device
        self._blocks: dict[Strategy, OpenBlocks] = {}  # the ones used last come last
        self._tenants: dict[int, OpenBlocks] = {}  # by slot, what its request is decoded in

    # --- who is here ---

    def admit(self, slot: int, strategy: Strategy, params: DecodingParams) -> None:
        """Give a slot to a request; its block is still to be opened.

        Args:
            slot: in [0, num_slots).
            strategy: what `params` names, with one open block.
            params: temperature, seed, and cap on steps are read here.
        """
        self.release(slot)
        blocks = self._blocks_for(strategy)
        blocks.admit(slot, strategy, params)
        self._tenants[slot] = blocks

    def release(self, slot: int) -> None:
        """Free a slot, if anyone has it."""
        self._tenants.pop(slot, None)

    def __contains__(self, slot: object) -> bool:
        return slot in self._tenants

    def open(self, slot: int, known: Sequence[int] = ()) -> None:
        """Open the block that a prompt ends in; it begins with `known`, the end of the prompt."""
        self._tenants[slot].open(slot, known)

    def blocks(self, slot: int) -> OpenBlocks:
        """The open blocks that a slot's is among; the slot is its row."""
        return self._tenants[slot]

    def groups(self, slots: Sequence[int]) -> Iterator[tuple[OpenBlocks, list[int]]]:
        """The slots by what decodes them: open blocks, and indices into `slots`."""
        groups: dict[OpenBlocks, list[int]] = {}
        for index, slot in enumerate(slots):
            groups.setdefault(self._tenants[slot], []).append(index)
        yield from groups.items()

    # --- after a forward ---

    def decide(self, slots: Sequence[int], rows: Tensor, logits: Tensor, starts: Tensor) -> Tensor:
        """What becomes of open blocks after a forward over them.

        Args:
            slots: B slots of one group.
            rows: [B] int64 on the device, the slots again, or `spare` for those to leave alone.
            logits: [B, L, V], any float dtype.
            starts: [B] int64, where the blocks begin in their sequences.

        Returns:
            As `dmax.engine.step.decide`. Blocks of a strategy that does not go with the model are
            invalid: an exception would end the engine for everyone.
        """
        blocks = self.blocks(slots[0])
        length, vocab_size = logits.shape[1:]
        at_once = max(1, MOST_LOGITS // (length * vocab_size))
        flags = []
        for start in range(0, len(slots), at_once):
            part = slice(start, start + at_once)
            output = Output(logits[part], self.special_ids.mask_token_id)
            try:
                flags.append(decide(blocks, rows[part], output, starts=starts[part]))
            except InputError as error:
                logger.error("strategy `%s` ends its requests: %s", blocks.strategy.name, error)
                flags.append(_all_invalid(rows[part]))
        return torch.cat(flags, dim=1)

    def _blocks_for(self, strategy: Strategy) -> OpenBlocks:
        """Where blocks of this strategy are open, whatever numbers it is set to."""
        shared = strategy.without_numbers()
        blocks = self._blocks.pop(shared, None)
        if blocks is None:
            blocks = OpenBlocks(shared, self.spare + 1, self.special_ids, self.embed, self.device)
            blocks.open(self.spare)
        self._blocks[shared] = blocks
        used = set(self._tenants.values())
        idle = [key for key, kept in self._blocks.items() if kept not in used]
        for key in idle[: -MAX_IDLE - 1]:  # the last one is about to be used
            del self._blocks[key]
        return blocks


def _all_invalid(rows: Tensor) -> Tensor:
    """The flags [6, B] of `dmax.engine.step.decide` for blocks that cannot go on."""
    flags = torch.zeros(6, len(rows), dtype=torch.bool, device=rows.device)
    flags[3] = True
    return flags
