"""The open blocks of another engine's requests, decoded by the strategies of the heart.

A host engine runs the forwards and keeps the keys and values; it gives every request a slot. Before
a forward it asks for the `inputs` of the open blocks, after it hands the logits to `decide`. Both
go under `torch.inference_mode()`. Every slot has one open block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmax.blend import Embed
from dmax.decoding.block import Output
from dmax.decoding.strategy import Strategy
from dmax.engine.blocks import OpenBlocks
from dmax.engine.sequence import gumbel_noise, own_generator
from dmax.engine.step import decide
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

MAX_IDLE = 8
"""Open blocks of this many strategies are kept when no slot uses them."""
MOST_LOGITS = 2**28
"""Logits that are decided about at once: a strategy may hold several float32 copies of them."""


@dataclass(slots=True)
class Tenant:
    """Who has a slot: the blocks that it is decoded in, and where its noise comes from."""

    blocks: OpenBlocks
    params: DecodingParams
    generator: torch.Generator | None


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
        self._tenants: dict[int, Tenant] = {}

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
        self._tenants[slot] = Tenant(blocks, params, own_generator(params))

    def release(self, slot: int) -> None:
        """Free a slot, if anyone has it."""
        self._tenants.pop(slot, None)

    def __contains__(self, slot: object) -> bool:
        return slot in self._tenants

    def open(self, slot: int, known: Sequence[int] = ()) -> None:
        """Open the block that a prompt ends in; it begins with `known`, the end of the prompt."""
        self._tenants[slot].blocks.open(slot, known)

    def blocks(self, slot: int) -> OpenBlocks:
        """The open blocks that a slot's is among; the slot is its row."""
        return self._tenants[slot].blocks

    def groups(self, slots: Sequence[int]) -> Iterator[tuple[OpenBlocks, list[int]]]:
        """The slots by what decodes them: open blocks, and indices into `slots`.

        Slots whose requests draw samples are apart from the greedy ones, whose noise would be zero.
        """
        groups: dict[tuple[OpenBlocks, bool], list[int]] = {}
        for index, slot in enumerate(slots):
            tenant = self._tenants[slot]
            groups.setdefault((tenant.blocks, tenant.generator is not None), []).append(index)
        for (blocks, _), indices in groups.items():
            yield blocks, indices

    # --- after a forward ---

    def decide(self, slots: Sequence[int], rows: Tensor, logits: Tensor) -> Tensor:
        """What becomes of open blocks after a forward over them.

        Args:
            slots: B slots of one group.
            rows: [B] int64 on the device, the slots again, or `spare` for those to leave alone.
            logits: [B, L, V], any float dtype.

        Returns:
            As `dmax.engine.step.decide`.
        """
        blocks = self.blocks(slots[0])
        length, vocab_size = logits.shape[1:]
        at_once = max(1, MOST_LOGITS // (length * vocab_size))
        flags = []
        for start in range(0, len(slots), at_once):
            part = slice(start, start + at_once)
            noise = self._noise(slots[part], rows[part], (1, length, vocab_size))
            output = Output(logits[part], self.special_ids.mask_token_id)
            flags.append(decide(blocks, rows[part], output, noise=noise))
        return torch.cat(flags, dim=1)

    def _noise(
        self, slots: Sequence[int], rows: Tensor, shape: tuple[int, int, int]
    ) -> Tensor | None:
        """[B, L, V], the same numbers as in our own engine; None if the slots are greedy.

        Nothing is drawn for spare rows: a draw belongs to a forward. To know them, the host waits.
        """
        sources = [(self._tenants[slot].params, self._tenants[slot].generator) for slot in slots]
        if all(generator is None for _, generator in sources):
            return None
        noise = [
            torch.zeros(shape)
            if generator is None or row == self.spare
            else gumbel_noise(params.temperature, generator, shape)
            for (params, generator), row in zip(sources, rows.tolist(), strict=True)
        ]
        return torch.cat(noise).to(self.device)

    def _blocks_for(self, strategy: Strategy) -> OpenBlocks:
        """Where blocks of this strategy are open, whatever numbers it is set to."""
        shared = strategy.without_numbers()
        blocks = self._blocks.pop(shared, None)
        if blocks is None:
            blocks = OpenBlocks(shared, self.spare + 1, self.special_ids, self.embed, self.device)
            blocks.open(self.spare)
        self._blocks[shared] = blocks
        used = {tenant.blocks for tenant in self._tenants.values()}
        idle = [key for key, kept in self._blocks.items() if kept not in used]
        for key in idle[: -MAX_IDLE - 1]:  # the last one is about to be used
            del self._blocks[key]
        return blocks
