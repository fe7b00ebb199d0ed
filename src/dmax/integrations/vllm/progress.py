"""Requests past their prompts: what each forward takes of them, and what leaves after it.

L block length, D hidden size, V vocabulary. Every forward takes one or two blocks of a request:

- its open block, as the strategy wants it fed (a denoising forward);
- or its last block, which is final, with hard tokens (a commit: keys and values as later blocks
  see them);
- or both, one after the other. Then the commit costs no forward of its own.

A block leaves as soon as it has converged. Whether its commit is outstanding is known on the device
only, in `uncommitted`: vLLM may have planned the next forward before it knows. So nothing here
waits for the device.

This module imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmax.blend import Embed
from dmax.decoding.strategy import Strategy
from dmax.engine.blocks import OpenBlocks
from dmax.integrations.slots import Slots
from dmax.integrations.vllm.logprobs import Logprobs
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds


class Progress:
    """Requests by slot. Tensors have a row more than there are slots, for what means nothing.

    Args:
        special_ids: of the checkpoint.
        num_slots: requests that run at once.
        embed: the model's input embeddings.
        device: of all tensors.

    Attributes:
        slots: the open blocks.
        final: [slots + 1, L] int64, the last final block of each request.
        uncommitted: [slots + 1] bool, clean keys and values of `final` are still to be written.
        starts: [slots + 1] int64, where the open block begins in its sequence.
        num_known: [slots + 1] int64, tokens of the prompt that the open block begins with.
        logprobs: log-probabilities of tokens, for those who ask.
    """

    def __init__(
        self, special_ids: SpecialIds, num_slots: int, embed: Embed, device: torch.device
    ) -> None:
        self.block_length = special_ids.block_length
        self.device = device
        self.embed = embed
        self.slots = Slots(special_ids, num_slots, embed, device)
        with device:
            self.final = torch.zeros(num_slots + 1, self.block_length, dtype=torch.long)
            self.uncommitted = torch.zeros(num_slots + 1, dtype=torch.bool)
            self.starts = torch.zeros(num_slots + 1, dtype=torch.long)
            self.num_known = torch.zeros(num_slots + 1, dtype=torch.long)
        self.logprobs = Logprobs(special_ids, num_slots, device)
        self._tails: dict[int, Sequence[int]] = {}

    def add(self, slot: int, token_ids: Sequence[int]) -> None:
        """A request has a slot; its tokens are still to be read.

        Args:
            slot: its slot.
            token_ids: its prompt; of a preempted request also what has left.
        """
        start = len(token_ids) // self.block_length * self.block_length
        self._tails[slot] = tuple(token_ids[start:])
        self.starts[slot] = start
        self.uncommitted[slot] = False

    def admit(
        self,
        slot: int,
        strategy: Strategy,
        params: DecodingParams,
        num_logprobs: int | None = None,
    ) -> None:
        """How the request in a slot is decoded.

        Args:
            slot: its slot.
            strategy: what `params` names.
            params: how to decode.
            num_logprobs: most probable tokens to report beside each token; None: none, nor its own
                log-probability.
        """
        self.slots.admit(slot, strategy, params)
        self.logprobs.admit(slot, num_logprobs)

    def remove(self, slot: int) -> None:
        """A request is finished or preempted; vLLM does not say which."""
        self.slots.release(slot)
        del self._tails[slot]

    def open_first(self, slot: int) -> int:
        """Open the block that a prompt ends in.

        Returns:
            How many tokens of the prompt stand in it. They are forwarded again with their block.
        """
        tail = self._tails[slot]
        self.slots.open(slot, tail)
        self.num_known[slot] = len(tail)
        return len(tail)

    def decoding(self, batch: Any) -> Iterator[Decoding]:
        """The requests of a forward that are past their prompts, by what decodes them.

        Args:
            batch: vLLM's `InputBatch`.
        """
        if not batch.num_draft_tokens:  # prompts only, or a run without requests
            return
        num_logits = np.diff(batch.cu_num_logits_np[: batch.num_reqs + 1])
        at = np.flatnonzero(num_logits)
        for _, indices in self.slots.groups(batch.idx_mapping_np[at].tolist()):
            yield Decoding.of(self, batch, at[indices])


@dataclass(frozen=True, slots=True)
class Emitted:
    """What leaves after a forward. N requests.

    Attributes:
        tokens: [N, L] int64, the block that has converged, without the end of the prompt.
        order: [N, L] int64, which positions of the block they are.
        num_tokens: [N] int64, how many of them there are; 0 for a block that stays open.
        num_repeated: [N] int64, tokens of the forward that must be computed again.
        is_broken: [N] bool, the request cannot go on: its logits held a NaN, or its strategy
            proposed MASK. One token, which means nothing, stands for it.
    """

    tokens: Tensor
    order: Tensor
    num_tokens: Tensor
    num_repeated: Tensor
    is_broken: Tensor


@dataclass(frozen=True, slots=True)
class Decoding:
    """Requests of a forward that are decoded by one strategy. N requests.

    Attributes:
        progress: all requests.
        blocks: the open blocks of these.
        at: [N] int64 on the host, their rows of the batch.
        slots: their slots.
        rows: [N] int64 on the device, the same.
        widths: [N] int64 on the host, tokens of each in the forward, L or 2 L.
        starts: [N] int64 on the host, where they begin among the tokens of the forward.
        logit_starts: [N] int64 on the host, where they begin among its logits.
    """

    progress: Progress
    blocks: OpenBlocks
    at: NDArray[np.int64]
    slots: list[int]
    rows: Tensor
    widths: NDArray[np.int64]
    starts: NDArray[np.int64]
    logit_starts: NDArray[np.int64]

    @classmethod
    def of(cls, progress: Progress, batch: Any, at: NDArray[np.int64]) -> Self:
        """The requests in the rows `at` of a batch, which share their open blocks."""
        slots = batch.idx_mapping_np[at].astype(np.int64)
        bounds = batch.query_start_loc_np.astype(np.int64)
        return cls(
            progress=progress,
            blocks=progress.slots.blocks(int(slots[0])),
            at=at,
            slots=slots.tolist(),
            rows=on_device(slots, progress.device),
            widths=np.diff(bounds)[at],
            starts=bounds[at],
            logit_starts=batch.cu_num_logits_np.astype(np.int64)[at],
        )

    # --- before the forward ---

    def write_inputs(self, embeds: Tensor) -> None:
        """Write the inputs of these requests into those of the forward, [tokens, D]."""
        progress = self.progress
        clean = progress.embed(progress.final[self.rows])  # [N, L, D]
        inputs = self.blocks.inputs(self.rows).to(embeds.dtype)
        where = self._is_commit()[:, None, None]
        last = self._last(self.starts)
        embeds[self._positions(last)] = torch.where(where, clean, inputs)
        doubles = np.flatnonzero(self._is_double())
        if len(doubles):
            first = self._positions(self.starts[doubles])
            embeds[first] = clean[on_device(doubles, progress.device)]

    # --- after it ---

    def advance(self, logits: Tensor) -> Emitted:
        """Decide about the open blocks; open the next ones where they have converged.

        Args:
            logits: [logits of the forward, V].
        """
        progress = self.progress
        length = progress.block_length
        is_commit = self._is_commit()
        targets = torch.where(is_commit, progress.slots.spare, self.rows)
        own_logits = logits[self._positions(self._last(self.logit_starts))]  # [N, L, V]
        starts = progress.starts[self.rows]
        flags = progress.slots.decide(self.slots, targets, own_logits, starts)
        progress.logprobs.keep(self.slots, targets, self.blocks, own_logits)
        done, _, _, invalid, broken, _ = flags & ~is_commit
        is_broken = invalid | broken
        done = done & ~is_broken

        # Blocks that have converged leave, without the end of the prompt.
        tokens = self.blocks.tokens[targets]
        num_known = progress.num_known[self.rows]
        order = torch.arange(length, device=progress.device) + num_known[:, None]
        order = order.clamp(max=length - 1)
        emitted = Emitted(
            tokens=tokens.gather(1, order),
            order=order,
            num_tokens=torch.where(done, length - num_known, is_broken.long()),
            # What was final before this forward is committed now; the open block is not.
            num_repeated=on_device(self.widths, progress.device)
            - length * progress.uncommitted[self.rows],
            is_broken=is_broken,
        )

        progress.uncommitted[self.rows] = done
        progress.final[self.rows] = torch.where(done[:, None], tokens, progress.final[self.rows])
        progress.num_known[self.rows] = num_known.masked_fill(done, 0)
        progress.starts[self.rows] = starts + length * done
        self.blocks.open(torch.where(done, self.rows, progress.slots.spare))
        return emitted

    # --- where things are ---

    def _is_double(self) -> NDArray[np.bool_]:
        """[N], the forward takes the last final block, then the open one."""
        return self.widths > self.progress.block_length

    def _is_commit(self) -> Tensor:
        """[N] bool, the forward takes the last final block and nothing else."""
        is_single = on_device(~self._is_double(), self.progress.device)
        return self.progress.uncommitted[self.rows] & is_single

    def _last(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N], where the last block of each request begins."""
        return starts + self.widths - self.progress.block_length

    def _positions(self, starts: NDArray[np.int64]) -> Tensor:
        """[N, L] int64 on the device, the L positions from each of `starts`."""
        first = on_device(starts, self.progress.device)
        return first[:, None] + torch.arange(self.progress.block_length, device=first.device)


def block_rows(
    starts: NDArray[np.int32], block_length: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Cut the tokens of requests into rows of a block each.

    Args:
        starts: [R + 1] int32, where the tokens of each request begin in the forward, then their
            number. The first token of a request stands at the beginning of a block.
        block_length: L.

    Returns:
        starts: [B + 1] int32, the same of the rows.
        owners: [B] int64, the request of each row.
        behind: [B] int32, tokens of that request behind the row.
    """
    lengths = np.diff(starts)
    num_blocks = -(-lengths // block_length)
    owners = np.repeat(np.arange(len(lengths)), num_blocks)
    first_rows = np.cumsum(num_blocks) - num_blocks
    index = np.arange(len(owners)) - first_rows[owners]  # of the row among its request's
    ends = np.minimum((index + 1) * block_length, lengths[owners])
    row_starts = np.concatenate(([0], starts[owners] + ends)).astype(np.int32)
    return row_starts, owners, (lengths[owners] - ends).astype(np.int32)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The same numbers on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
