"""Turns rows of the batch into forwards of the model: prefill, denoise, commit. Knows tensors, not requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.blend import Embed
from dmax.cache import BlockCache, CacheWindow
from dmax.confidence import Candidates
from dmax.decoding.block import Output
from dmax.engine.rows import Rows, Shape
from dmax.kernels.lm_head import lm_head_top_k


class Place(NamedTuple):
    """Where N rows of a forward stand.

    Attributes:
        slots, starts, bases: [N] int64, fields of `Row`.
        keys: [span] int64, positions of the cache that are read: 0, 1, 2, …
        in_order: as in `Shape`.
    """

    slots: Tensor
    starts: Tensor
    bases: Tensor
    keys: Tensor
    in_order: bool


class ModelRunner:
    """A block-causal model over a `BlockCache`.

    Args:
        model: takes `inputs_embeds`, a bool mask, position ids and a cache; has `base_model` and
            input embeddings. With `has_linear_head` its logits are its last hidden states times the
            output embeddings, and where only the best tokens are wanted no logits are made.
        block_length: L, blocks are aligned to absolute multiples of it.
        num_slots: sequences in flight.
        capacity: positions per sequence, a multiple of L.
        mask_token_id: MASK.
        compiled: whether denoising forwards are compiled: one row by itself, and any number of them
            together.
    """

    def __init__(
        self,
        model: Any,
        block_length: int,
        num_slots: int,
        capacity: int,
        mask_token_id: int,
        *,
        compiled: bool = False,
    ) -> None:
        config = model.config
        weight = model.get_input_embeddings().weight
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.model = model
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.device = weight.device
        self._causal = block_causal(block_length)
        self.embed: Embed = model.get_input_embeddings()
        self.head: Tensor | None = None
        if getattr(model, "has_linear_head", False):
            self.head = model.get_output_embeddings().weight
        shape = config.num_hidden_layers, max(num_slots, 1 + compiled), capacity, heads, head_dim
        self.cache = BlockCache(*shape, dtype=weight.dtype, device=weight.device)
        self._compiled = torch.compile(self._encode) if compiled else None
        if compiled:  # another runner, for more or longer sequences, uses the same code
            for layer in (*self.cache.keys, *self.cache.values):
                _mark_dynamic(layer, 0, 1)

    @torch.no_grad()
    def prefill(self, slots: list[int], tokens: Tensor) -> None:
        """Encode and commit the next tokens [B, P] of each slot's prompt, whole blocks behind what is committed."""
        window = self.cache.write_at(slots, tokens.shape[1])
        keys = torch.arange(window.span, device=self.device)
        mask = dense_mask(self._causal, window.positions, keys)[:, None]  # [B, 1, P, span]
        self.model.base_model(**_arguments(self.embed(tokens), mask, window.positions, window))
        self.cache.commit(slots, [self.cache.lengths[slot] + tokens.shape[1] for slot in slots])

    @torch.no_grad()
    def denoise(
        self, shape: Shape, rows: Rows, embeds: Tensor, hidden_states: bool = False
    ) -> Output:
        """One forward over any blocks of any sequences; what the model says of the R open ones, [R, L, V].

        A row is a block. It sees what its sequence has in the cache before its base, and itself.
        Layer by layer all rows write their keys and values before any reads, so a block sees the
        blocks before it although they are rows of the same forward: settled ones on their way into
        the cache, of the prompt or finished (the published cross-block commit, A13), and open ones
        of a window. A row that stands behind its base is a further version of the block there: it
        takes that block's positions, and none sees the other.

        Args:
            shape: see `Shape`.
            rows: on the device.
            embeds: [R, L, D] inputs of the open blocks.
            hidden_states: also give the last layer's.
        """
        if shape.num_pending:
            embeds = torch.cat((self.embed(rows.tokens), embeds))
        if self.head is not None:
            return self._output(self._run(shape, rows, embeds)[shape.num_pending :], self.head)
        more = {"output_hidden_states": True} if hidden_states else {}
        with _head_of_last(self.model, shape.num_open):
            outputs = self.model(**self._inputs(embeds, self._place(shape, rows)), **more)
        last = outputs.hidden_states[-1][shape.num_pending :] if hidden_states else None
        return Output(outputs.logits[-shape.num_open :], self.mask_token_id, hidden_states=last)

    @torch.no_grad()
    def commit(self, shape: Shape, rows: Rows) -> None:
        """Write the clean keys and values of pending blocks; there are no others."""
        self._run(shape, rows, self.embed(rows.tokens))

    def _run(self, shape: Shape, rows: Rows, embeds: Tensor) -> Tensor:
        """Last hidden states [P + R, L, D]."""
        place = self._place(shape, rows)
        if self._compiled is None:
            return self._encode(embeds, place)
        for tensor in (embeds, place.slots, place.starts, place.bases, place.keys):
            _mark_dynamic(tensor, 0)
        return self._compiled(embeds, place._replace(in_order=False))

    def _place(self, shape: Shape, rows: Rows) -> Place:
        slots, starts, bases, *_ = rows.where
        return Place(
            slots, starts, bases, torch.arange(shape.span, device=self.device), shape.in_order
        )

    def _encode(self, embeds: Tensor, place: Place) -> Tensor:
        """The layers alone, [N, L, D] to [N, L, D], as a function of tensors: what is compiled."""
        hidden: Tensor = self.model.base_model(**self._inputs(embeds, place)).last_hidden_state
        return hidden

    def _inputs(self, embeds: Tensor, place: Place) -> dict[str, Any]:
        """The model's arguments for inputs [N, L, D]."""
        slots, starts, bases, keys, in_order = place
        length = self.block_length
        window = CacheWindow(
            self.cache, slots, starts, length, len(keys), in_order, is_block=True, bases=bases
        )
        first = starts[:, None]
        bases = bases[:, None]
        visible = (keys < bases) | (
            (keys >= first) & (keys < first + self.block_length)
        )  # [N, span]
        mask = visible[:, None, None].expand(-1, 1, self.block_length, -1)
        return _arguments(embeds, mask, window.positions - first + bases, window)

    def _output(self, hidden: Tensor, head: Tensor) -> Output:
        """Of last hidden states [R, L, D]: the best tokens through the fused head, logits only if asked for."""

        def best(k: int) -> Candidates:
            found = lm_head_top_k(hidden.flatten(0, 1), head, k, self.mask_token_id)
            shape = hidden.shape[:2]
            return Candidates(
                found.ids.view(*shape, -1), found.probs.view(*shape, -1), found.broken.view(shape)
            )

        return Output(
            lambda: F.linear(hidden, head),
            self.mask_token_id,
            candidates=best,
            hidden_states=hidden,
        )


def _arguments(
    embeds: Tensor, mask: Tensor, positions: Tensor, window: CacheWindow
) -> dict[str, Any]:
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    return inputs | {"past_key_values": window}


def _mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Have one piece of compiled code serve all sizes of these dimensions but 1, which always gets its own."""
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
