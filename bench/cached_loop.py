"""The loop of the published evaluation: one sequence, with a cache of keys and values.

The prompt's whole blocks are encoded in a forward of their own. Then a step runs the open block,
and its first step also the block before it, whose keys and values are final then (A13 in
docs/paper.md). It decides as `hub_loop` does. The published engine also attends to the zeros behind
the end of its cache, which changes answers; this loop reads nothing there.

L block length, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hub_loop
import torch
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.blend import SoftTokens, embed_tokens
from dmax.checkpoint import Checkpoint


@torch.no_grad()
def generate(
    checkpoint: Checkpoint, prompt_ids: Sequence[int], *, max_new_tokens: int, **decoding: Any
) -> tuple[tuple[int, ...], int]:
    """As `hub_loop.generate`; the prefill is not among the forwards."""
    length = checkpoint.special_ids.block_length
    num_blocks = -(-(len(prompt_ids) + max_new_tokens) // length)
    model = CachedModel(num_blocks * length)
    model.prefill(checkpoint, torch.tensor(prompt_ids[: len(prompt_ids) // length * length]))
    return hub_loop.generate(
        checkpoint, prompt_ids, max_new_tokens=max_new_tokens, predict=model.predict, **decoding
    )


class CachedModel:
    """Runs the model for one sequence, from where its keys and values are not final yet.

    Args:
        num_positions: T, room for the whole sequence.
    """

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions
        self.num_final = 0
        self._layers: list[Tensor] = []  # [2, 1, heads, T, head size] each

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: keep [1, heads, n, head size], and give all up to their end."""
        end = self.num_final + key.shape[2]
        if layer_idx == len(self._layers):
            shape = (2, *key.shape[:2], self.num_positions, key.shape[3])
            self._layers.append(key.new_empty(shape))
        keys, values = self._layers[layer_idx]
        keys[:, :, self.num_final : end] = key
        values[:, :, self.num_final : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def prefill(self, checkpoint: Checkpoint, tokens: Tensor) -> None:
        """Encode the whole blocks of a prompt [n]."""
        if len(tokens):
            model: Any = checkpoint.model
            self._forward(checkpoint, model.get_input_embeddings()(tokens[None]))
            self.num_final = len(tokens)

    def predict(
        self, checkpoint: Checkpoint, tokens: Tensor, feed: SoftTokens | None
    ) -> tuple[Tensor, Tensor]:
        """As `hub_loop.predict_anew`."""
        ids = checkpoint.special_ids
        model: Any = checkpoint.model
        embed = model.get_input_embeddings()
        start = len(tokens) - ids.block_length
        block = embed_tokens(embed, tokens[None, start:], feed, ids.mask_token_id)
        if self.num_final < start:  # the block before, which has become final
            block = torch.cat((embed(tokens[None, self.num_final : start]), block), dim=1)
        logits = self._forward(checkpoint, block)  # [L, V]
        self.num_final = start
        return hub_loop.best_tokens(logits, ids.mask_token_id)

    def _forward(self, checkpoint: Checkpoint, embeds: Tensor) -> Tensor:
        """Logits of the last block of inputs [1, n, D] at the positions that are not final."""
        length = checkpoint.special_ids.block_length
        keys = torch.arange(self.num_final + embeds.shape[1])
        positions = keys[self.num_final :]
        model: Any = checkpoint.model
        output = model(
            inputs_embeds=embeds,
            attention_mask=dense_mask(block_causal(length), positions, keys)[None, None],
            position_ids=positions[None],
            past_key_values=self,
            logits_to_keep=length,
        )
        logits: Tensor = output.logits[0]
        return logits
