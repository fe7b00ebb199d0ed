"""Turns rows of the batch into forwards of the model: prefill, denoise, commit. Knows tensors, not requests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmax.attention import block_causal, branching, dense_mask
from dmax.blend import Embed
from dmax.cache import BlockCache


class ModelRunner:
    """A block-causal model over a `BlockCache`.

    Args:
        model: takes `inputs_embeds`, a bool mask, position ids and a cache; has `base_model` and input embeddings.
        block_length: L, blocks are aligned to absolute multiples of it.
        num_slots: sequences in flight.
        capacity: positions per sequence, a multiple of L.
    """

    def __init__(self, model: Any, block_length: int, num_slots: int, capacity: int) -> None:
        config, weight = model.config, model.get_input_embeddings().weight
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.model, self.block_length, self.device = model, block_length, weight.device
        self._causal = block_causal(block_length)
        self.embed: Embed = model.get_input_embeddings()
        self.cache = BlockCache(
            config.num_hidden_layers, num_slots, capacity, heads, head_dim, dtype=weight.dtype, device=weight.device
        )

    @torch.no_grad()
    def prefill(self, slots: list[int], tokens: Tensor, lengths: list[int]) -> None:
        """Encode and commit the first `lengths[row]` of each row's `tokens` [B, P]; rows may be padded to the right.

        What padding writes behind a row's prefix is overwritten before anything may see it.
        """
        for slot in slots:
            self.cache.rollback(slot)
        self._forward(slots, self.embed(tokens), head=False)
        self.cache.commit(slots, lengths)

    @torch.no_grad()
    def denoise(self, slots: list[int], inputs: Tensor, previous: Tensor | None = None, versions: int = 1) -> Tensor:
        """Logits [B, n L, V] of the rows' n open blocks, given their inputs [B, n L, D].

        With `previous` [B, k L] int64, the final tokens of the k blocks before, the same forward writes those blocks'
        clean keys and values (the published cross-block commit, A13). With `versions` n > 1 the inputs are n versions
        of one block, at the same positions, that do not see each other.
        """
        if previous is None:
            return self._forward(slots, inputs, versions=versions)
        embeds = torch.cat((self.embed(previous), inputs), dim=1)
        logits = self._forward(slots, embeds, keep=inputs.shape[1], versions=versions)
        self._commit(slots, previous.shape[1])
        return logits

    @torch.no_grad()
    def commit(self, slots: list[int], previous: Tensor) -> None:
        """Write the clean keys and values of finished blocks [B, k L] int64 with a forward of their own."""
        self._forward(slots, self.embed(previous), head=False)
        self._commit(slots, previous.shape[1])

    def _commit(self, slots: list[int], length: int) -> None:
        self.cache.commit(slots, [self.cache.lengths[slot] + length for slot in slots])

    def _forward(
        self, slots: list[int], embeds: Tensor, *, head: bool = True, keep: int = 0, versions: int = 1
    ) -> Tensor:
        window = self.cache.write_at(slots, embeds.shape[1])
        keys, positions, visible = torch.arange(window.span, device=self.device), window.positions, self._causal
        if versions > 1:  # they lie side by side in the cache, as scratch behind what is committed
            first = positions[:, -1:] + 1 - versions * self.block_length
            visible = branching(self.block_length, first[:, :, None])
            beyond = (positions - first).clamp(min=0) // self.block_length * self.block_length
            positions = positions - beyond
        mask = dense_mask(visible, window.positions, keys)[:, None]  # [B, 1, Q, span]
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        if head:
            logits: Tensor = self.model(**inputs, past_key_values=window, logits_to_keep=keep).logits
            return logits
        hidden: Tensor = self.model.base_model(**inputs, past_key_values=window).last_hidden_state
        return hidden
