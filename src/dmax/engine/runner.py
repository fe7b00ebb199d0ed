"""Turns a batch into a forward of the model; knows tensors, not requests.

R rows of blocks, L block length, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.blend import Embed
from dmax.cache import BlockCache, CacheWindow
from dmax.confidence import Candidates
from dmax.decoding.block import Output
from dmax.engine.batch import Batch
from dmax.kernels.lm_head import lm_head_top_k
from dmax.special_ids import SpecialIds


class ModelRunner:
    """A block-causal model over a `BlockCache`.

    Args:
        model: takes `inputs_embeds`, a bool mask, position ids and a cache; has `base_model` and
            input embeddings. If its `has_linear_head` is true, its logits are its last hidden
            states times the output embeddings. Then no logits are made where only the best tokens
            are wanted.
        special_ids: of the model; blocks begin at absolute multiples of its block length.
        num_slots: sequences that have a place in the cache.
        capacity: positions of a sequence, a multiple of the block length.
        compiled: whether forwards over open blocks are compiled: one row has code of its own, any
            other number of rows shares another.
    """

    def __init__(
        self,
        model: Any,
        special_ids: SpecialIds,
        num_slots: int,
        capacity: int,
        *,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.block_length = special_ids.block_length
        self.mask_token_id = special_ids.mask_token_id
        self.embed: Embed = model.get_input_embeddings()
        self._lm_head: Tensor | None = None
        if getattr(model, "has_linear_head", False):
            self._lm_head = model.get_output_embeddings().weight
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        config = model.config
        num_heads = config.num_attention_heads
        self.cache = BlockCache(
            num_layers=config.num_hidden_layers,
            num_slots=max(num_slots, 1 + compiled),
            capacity=capacity,
            num_key_value_heads=getattr(config, "num_key_value_heads", num_heads),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._compiled = torch.compile(self._encode) if compiled else None
        if compiled:  # another runner, for more or longer sequences, uses the same code
            for layer in (*self.cache.keys, *self.cache.values):
                _mark_dynamic(layer, 0, 1)

    @torch.no_grad()
    def prefill(self, slots: list[int], tokens: Tensor) -> None:
        """Encode and commit the next tokens [B, P] of each slot's prompt, whole blocks of it."""
        window = self.cache.write_at(slots, tokens.shape[1])
        keys = torch.arange(window.span, device=self.device)
        visible = dense_mask(block_causal(self.block_length), window.positions, keys)
        mask = visible[:, None]  # [B, 1, P, span]
        self.model.base_model(**_arguments(self.embed(tokens), mask, window.positions, window))
        self.cache.commit(slots, tokens.shape[1])

    @torch.no_grad()
    def forward(self, batch: Batch, embeds: Tensor, hidden_states: bool = False) -> Output:
        """One forward over any blocks of any sequences.

        Every row is a block. It sees what its sequence has in the cache before the block's
        position, and itself. In each layer all rows write their keys and values before any row
        reads. So a block sees the blocks before it although they are rows of the same forward:
        finished ones on their way into the cache (the published cross-block commit, A13 in
        docs/paper.md) and open ones. Branches of a block stand side by side in the cache, take the
        block's positions, and do not see each other.

        Args:
            batch: on the device.
            embeds: [R, L, D], what the model reads of the open blocks.
            hidden_states: also give the hidden states of the last layer.

        Returns:
            What the model says of the R rows of open blocks.
        """
        if batch.num_pending:
            embeds = torch.cat((self.embed(batch.pending), embeds))
        if self._lm_head is not None:
            return self._output(self._run(batch, embeds)[batch.num_pending :], self._lm_head)
        num_open = batch.num_rows - batch.num_pending
        options = {"output_hidden_states": True} if hidden_states else {}
        with _head_of_last(self.model, num_open):
            outputs = self.model(**self._inputs(embeds, *self._places(batch)), **options)
        last = outputs.hidden_states[-1][batch.num_pending :] if hidden_states else None
        return Output(outputs.logits[-num_open:], self.mask_token_id, hidden_states=last)

    def _run(self, batch: Batch, embeds: Tensor) -> Tensor:
        """The last hidden states [P + R, L, D]."""
        where, keys, in_order = self._places(batch)
        if self._compiled is None:
            return self._encode(embeds, where, keys, in_order)
        _mark_dynamic(embeds, 0)
        _mark_dynamic(where, 1)
        _mark_dynamic(keys, 0)
        return self._compiled(embeds, where, keys, False)

    def _places(self, batch: Batch) -> tuple[Tensor, Tensor, bool]:
        """Slots, starts and positions [3, P + R] of the rows; the positions that are read."""
        keys = torch.arange(batch.span, device=self.device)
        return batch.where[:3], keys, batch.in_order

    def _encode(self, embeds: Tensor, where: Tensor, keys: Tensor, in_order: bool) -> Tensor:
        """The layers as a function of tensors, [N, L, D] to [N, L, D]: this is compiled."""
        outputs = self.model.base_model(**self._inputs(embeds, where, keys, in_order))
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def _inputs(
        self, embeds: Tensor, where: Tensor, keys: Tensor, in_order: bool
    ) -> dict[str, Any]:
        """The model's arguments for inputs [N, L, D]."""
        slots, starts, bases = where
        length = self.block_length
        window = CacheWindow(self.cache, slots, starts, length, len(keys), in_order, bases)
        first = starts[:, None]
        base = bases[:, None]
        is_itself = (keys >= first) & (keys < first + self.block_length)
        visible = (keys < base) | is_itself  # [N, span]
        mask = visible[:, None, None].expand(-1, 1, self.block_length, -1)
        return _arguments(embeds, mask, window.positions - first + base, window)

    def _output(self, hidden: Tensor, lm_head: Tensor) -> Output:
        """From hidden states [R, L, D]: logits are made only if a strategy asks for them."""

        def best(k: int) -> Candidates:
            found = lm_head_top_k(hidden.flatten(0, 1), lm_head, k, self.mask_token_id)
            return found.view(*hidden.shape[:2])

        return Output(
            lambda: F.linear(hidden, lm_head),
            self.mask_token_id,
            candidates=best,
            hidden_states=hidden,
        )


def _arguments(
    embeds: Tensor, mask: Tensor, positions: Tensor, window: CacheWindow
) -> dict[str, Any]:
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": window,
    }


def _mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Have one piece of compiled code serve all sizes of these dimensions, but for size 1."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


@contextmanager
def _head_of_last(model: Any, num_rows: int) -> Iterator[None]:
    """Have a model make logits of the last rows only, whatever it does to them afterwards."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][-num_rows:], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
