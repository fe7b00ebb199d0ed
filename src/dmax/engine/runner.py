"""Turns rows of the batch into forwards of the model: prefill, denoise, commit. Knows tensors, not requests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.blend import Embed
from dmax.cache import BlockCache, CacheWindow
from dmax.confidence import Candidates
from dmax.decoding.block import Output
from dmax.kernels.head import head_top_k


class ModelRunner:
    """A block-causal model over a `BlockCache`.

    Args:
        model: takes `inputs_embeds`, a bool mask, position ids and a cache; has `base_model` and input embeddings.
            With `has_linear_head` its logits are its last hidden states times the output embeddings, and where only
            the best tokens are wanted no logits are made.
        block_length: L, blocks are aligned to absolute multiples of it.
        num_slots: sequences in flight.
        capacity: positions per sequence, a multiple of L.
        mask_token_id: MASK.
    """

    def __init__(self, model: Any, block_length: int, num_slots: int, capacity: int, mask_token_id: int) -> None:
        config, weight = model.config, model.get_input_embeddings().weight
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.model, self.block_length, self.mask_token_id = model, block_length, mask_token_id
        self.device = weight.device
        self._causal = block_causal(block_length)
        self.embed: Embed = model.get_input_embeddings()
        self.head: Tensor | None = None
        if getattr(model, "has_linear_head", False):
            self.head = model.get_output_embeddings().weight
        self.cache = BlockCache(
            config.num_hidden_layers, num_slots, capacity, heads, head_dim, dtype=weight.dtype, device=weight.device
        )

    @torch.no_grad()
    def prefill(self, slots: list[int], tokens: Tensor) -> None:
        """Encode and commit the next tokens [B, P] of each slot's prompt, whole blocks behind what is committed."""
        window = self.cache.write_at(slots, tokens.shape[1])
        keys = torch.arange(window.span, device=self.device)
        mask = dense_mask(self._causal, window.positions, keys)[:, None]  # [B, 1, P, span]
        self._hidden(self.embed(tokens), mask, window.positions, window)
        self.cache.commit(slots, [self.cache.lengths[slot] + tokens.shape[1] for slot in slots])

    @torch.no_grad()
    def denoise(
        self, window: CacheWindow, embeds: Tensor, bases: Tensor, num_open: int, hidden_states: bool = False
    ) -> Output:
        """One forward over any blocks of any sequences; what the model says of the last `num_open`, [R, L, V].

        A row is a block. It sees what its sequence has in the cache before `bases`, and itself. Layer by layer all
        rows write their keys and values before any reads, so a block sees the blocks before it although they are rows
        of the same forward: finished ones on their way into the cache (the published cross-block commit, A13), and
        open ones of a window. A row that stands behind its base is a further version of the block there: it takes that
        block's positions, and none sees the other.

        Args:
            window: where the N rows are written.
            embeds: [N, L, D] their inputs.
            bases: [N] int64, see above; for all but versions, where the row is written.
            num_open: rows R whose logits are wanted.
            hidden_states: also give the last layer's.
        """
        mask, positions = self._sight(window, bases)
        if self.head is not None:
            return self._output(self._hidden(embeds, mask, positions, window)[-num_open:], self.head)
        more = {"output_hidden_states": True} if hidden_states else {}
        outputs = self.model(**_inputs(embeds, mask, positions, window), **more)
        last = outputs.hidden_states[-1][-num_open:] if hidden_states else None
        return Output(outputs.logits[-num_open:], self.mask_token_id, hidden_states=last)

    @torch.no_grad()
    def commit(self, window: CacheWindow, embeds: Tensor, bases: Tensor) -> None:
        """Write the clean keys and values of finished blocks; arguments as for `denoise`."""
        self._hidden(embeds, *self._sight(window, bases), window)

    def _sight(self, window: CacheWindow, bases: Tensor) -> tuple[Tensor, Tensor]:
        """What rows [N] see, [N, 1, L, span] bool, and the positions [N, L] they stand at."""
        keys, starts = torch.arange(window.span, device=self.device), window.positions[:, :1]
        visible = (keys < bases[:, None]) | ((keys >= starts) & (keys < starts + self.block_length))  # [N, span]
        mask = visible[:, None, None].expand(-1, 1, self.block_length, -1)
        return mask, window.positions - starts + bases[:, None]

    def _output(self, hidden: Tensor, head: Tensor) -> Output:
        """Of last hidden states [R, L, D]: the best tokens through the fused head, logits only if asked for."""

        def best(k: int) -> Candidates:
            found = head_top_k(hidden.flatten(0, 1), head, k, self.mask_token_id)
            shape = hidden.shape[:2]
            return Candidates(found.ids.view(*shape, -1), found.probs.view(*shape, -1), found.broken.view(shape))

        return Output(lambda: F.linear(hidden, head), self.mask_token_id, candidates=best, hidden_states=hidden)

    def _hidden(self, embeds: Tensor, mask: Tensor, positions: Tensor, window: CacheWindow) -> Tensor:
        hidden: Tensor = self.model.base_model(**_inputs(embeds, mask, positions, window)).last_hidden_state
        return hidden


def _inputs(embeds: Tensor, mask: Tensor, positions: Tensor, window: CacheWindow) -> dict[str, Any]:
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    return inputs | {"past_key_values": window}
