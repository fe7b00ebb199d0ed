"""Turns a batch into a forward of the model; knows tensors, not requests.

R rows of blocks, L block length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import Mask, Staircase, block_causal, dense_mask
from dmax.blend import Embed
from dmax.cache import BlockCache, CacheWindow
from dmax.confidence import Candidates, GumbelNoise
from dmax.decoding.block import Output
from dmax.engine.batch import Batch
from dmax.environment import on_device
from dmax.kernels import autocast_dtype, can_fuse
from dmax.kernels.lm_head import lm_head_top_k
from dmax.special_ids import SpecialIds, reads_shifted

_TURNS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
"""By model: whose turn it is. A fork begins without those that were held in its parent."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TURNS.clear)


@contextmanager
def in_turn(model: Any, device: torch.device) -> Iterator[None]:
    """Have a model for oneself, on its device; engines in different threads take turns."""
    turn = _TURNS.setdefault(model, threading.Lock())
    with turn, torch.inference_mode(), on_device(device):
        yield


class ModelRunner:
    """A block-causal model over a `BlockCache`.

    Args:
        model: takes `inputs_embeds`, a bool mask, position ids and a cache; has `base_model`,
            input and output embeddings. If its `has_linear_head` is true, its logits are its last
            hidden states times the output embeddings. Then no logits are made where only the best
            tokens are wanted. If its config says `shift`, a token is predicted by the position
            before it.
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
        embeddings = model.get_input_embeddings()
        self.embed: Embed = embeddings
        self._lm_head: Tensor | None = None
        if getattr(model, "has_linear_head", False):
            self._lm_head = model.get_output_embeddings().weight
        else:  # the whole head, which may do more to the states than multiply them
            embedding = model.get_output_embeddings()
            self._head = next(part for part in model.children() if embedding in part.modules())
        weight = embeddings.weight
        self.device = weight.device
        config = model.config
        self.shift = reads_shifted(config)
        num_heads = config.num_attention_heads
        self.cache = BlockCache(
            num_layers=config.num_hidden_layers,
            num_slots=max(num_slots, 1 + compiled),
            capacity=capacity,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            dtype=weight.dtype,
            device=weight.device,
            ends=(self.block_length, weight.shape[1]) if self.shift else None,
        )
        base = model.base_model
        self._fits_in_place = hasattr(base, "fits_in_place") and base.fits_in_place(self.cache)
        self.compiled = compiled
        encode = ModelRunner._encode  # not bound to `self`: the cache goes with the last reference
        self._run = torch.compile(encode) if compiled else encode
        if compiled:  # another runner, for more or longer sequences, uses the same code
            for layer in (*self.cache.keys, *self.cache.values):
                _mark_dynamic(layer, 0, 1)

    @property
    def reads_in_place(self) -> bool:
        """Whether attention reads each row's keys and values where they lie in the cache.

        Then there is no mask, and nothing depends on the span of a batch or the order of its slots.
        """
        store = self.cache.keys[0]
        return (
            self._fits_in_place and can_fuse(store) and autocast_dtype(store) in (None, store.dtype)
        )

    @torch.no_grad()
    def prefill(self, slots: list[int], tokens: Tensor) -> None:
        """Encode and commit the next tokens [B, P] of each slot's prompt, whole blocks of it.

        Where attention reads the cache in place, each block is a row. Elsewhere there is a mask,
        which is only spelt out for rows of different lengths and for models that need it.
        """
        block_length = self.block_length if self.reads_in_place else None
        window = self.cache.write_at(slots, tokens.shape[1], block_length)
        inputs: dict[str, Any] = {"past_key_values": window}
        if not window.in_place:
            inputs["attention_mask"] = self._prompt_mask(slots, window)
            inputs["position_ids"] = window.positions
        embeds = self.embed(tokens.reshape(-1, window.length))
        outputs = self.model.base_model(inputs_embeds=embeds, **inputs)
        if self.shift:
            self.cache.keep_ends(outputs.last_hidden_state, window)
        self.cache.commit(slots, tokens.shape[1])

    def _prompt_mask(self, slots: list[int], window: CacheWindow) -> Mask:
        """Who sees whom among the next positions of prompts and those before them."""
        is_even = len({self.cache.lengths[slot] for slot in slots}) == 1
        if is_even and getattr(self.model.base_model, "takes_staircase", False):
            return Staircase(self.block_length)
        keys = torch.arange(window.span, device=self.device)
        visible = dense_mask(block_causal(self.block_length), window.positions, keys)
        return visible[:, None]  # [B, 1, P, span]

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
        num_open = len(embeds)
        if batch.num_pending:
            embeds = torch.cat((self.embed(batch.pending), embeds))
        where = batch.where[:3]  # slots, starts and positions of the rows
        keys = None if self.reads_in_place else torch.arange(batch.span, device=self.device)
        lm_head = self._lm_head
        if lm_head is None:
            inputs = self._inputs(embeds, where, keys, batch.in_order)
            return self._output_of_model(inputs, where, num_open, hidden_states)
        if self.compiled:
            where = where.contiguous()  # else code for rows side by side, and for rows apart
            _mark_dynamic(embeds, 0)
            _mark_dynamic(where, 1)
            if keys is not None:
                _mark_dynamic(keys, 0)
        hidden = self._run(self, embeds, where, keys, batch.in_order and not self.compiled)
        opened = self._readings(hidden, where)[-num_open:]  # [R, L, D]

        def best(k: int, noise: GumbelNoise | None) -> Candidates:
            found = lm_head_top_k(opened.flatten(0, 1), lm_head, k, self.mask_token_id, noise)
            return found.view(*opened.shape[:2])

        return Output(
            lambda: F.linear(opened, lm_head),
            self.mask_token_id,
            candidates=best,
            hidden_states=opened,
        )

    def _output_of_model(
        self, inputs: dict[str, Any], where: Tensor, num_open: int, hidden_states: bool
    ) -> Output:
        """By a model that makes logits itself; it makes them of the last `num_open` rows only."""

        def opened(hidden: Tensor) -> Tensor:  # [R, L, D]
            return self._readings(hidden, where)[-num_open:]

        with self._head.register_forward_pre_hook(lambda _, args: (opened(args[0]), *args[1:])):
            outputs = self.model(**inputs, output_hidden_states=hidden_states)
        last = opened(outputs.hidden_states[-1]) if hidden_states else None
        return Output(outputs.logits, self.mask_token_id, hidden_states=last)

    def _readings(self, hidden: Tensor, where: Tensor) -> Tensor:
        """The states [N, L, D] that predict the tokens of each position, from those that are."""
        return self.cache.shifted(hidden, *where) if self.shift else hidden

    def _encode(self, embeds: Tensor, where: Tensor, keys: Tensor | None, in_order: bool) -> Tensor:
        """The layers as a function of tensors, [N, L, D] to [N, L, D]: this is compiled."""
        outputs = self.model.base_model(**self._inputs(embeds, where, keys, in_order))
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def _inputs(
        self, embeds: Tensor, where: Tensor, keys: Tensor | None, in_order: bool
    ) -> dict[str, Any]:
        """The model's arguments for inputs [N, L, D].

        `keys` are the positions [span] that are read; None: each row's own, in place.
        """
        slots, starts, bases = where
        length = self.block_length
        span = self.cache.capacity if keys is None else len(keys)
        in_place = keys is None
        window = CacheWindow(self.cache, slots, starts, bases, length, span, in_order, in_place)
        if keys is None:
            return {"inputs_embeds": embeds, "past_key_values": window}
        first = starts[:, None]
        base = bases[:, None]
        is_itself = (keys >= first) & (keys < first + length)
        visible = (keys < base) | is_itself  # [N, span]
        return {
            "inputs_embeds": embeds,
            "attention_mask": visible[:, None, None].expand(-1, 1, length, -1),
            "position_ids": window.positions - first + base,
            "past_key_values": window,
        }


def _mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Have one piece of compiled code serve all sizes of these dimensions, but for size 1."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
