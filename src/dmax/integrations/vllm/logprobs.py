"""Log-probabilities of the tokens of open blocks, for requests that ask for them.

A token is decided in several forwards. What counts is the last one: where it was decoded, or by a
strategy that revises, where it was confirmed. As in all of dmax the logits are those of the model,
MASK included, and MASK is no token that could have been chosen.

This module imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dmax.confidence import precision
from dmax.engine.blocks import OpenBlocks
from dmax.special_ids import SpecialIds


class Logprobs:
    """Log-probabilities by slot. L block length, V vocabulary, K the most that anyone asks for.

    Args:
        special_ids: MASK and L.
        num_slots: requests that run at once.
        device: of all tensors.
    """

    def __init__(self, special_ids: SpecialIds, num_slots: int, device: torch.device) -> None:
        self.mask_token_id = special_ids.mask_token_id
        shape = (num_slots + 1, special_ids.block_length)
        with device:
            self._ids = torch.zeros(*shape, 1, dtype=torch.long)  # the token, then the best ones
            self._values = torch.zeros(*shape, 1)
            self._ranks = torch.zeros(shape, dtype=torch.long)
        self._asked: dict[int, int] = {}

    def admit(self, slot: int, num_top: int | None) -> None:
        """A slot has a new request, which asks for so many tokens at each position, or for none."""
        self._asked.pop(slot, None)
        if num_top is None:
            return
        self._asked[slot] = num_top
        missing = 1 + num_top - self._ids.shape[-1]
        if missing > 0:
            self._ids = torch.nn.functional.pad(self._ids, (0, missing))
            self._values = torch.nn.functional.pad(self._values, (0, missing))

    def most(self, slots: Iterable[int]) -> int | None:
        """The most tokens that one of these slots asks for; None if none does."""
        return max((self._asked[slot] for slot in slots if slot in self._asked), default=None)

    def keep(self, slots: Sequence[int], rows: Tensor, blocks: OpenBlocks, logits: Tensor) -> None:
        """Keep what is new after a forward.

        Args:
            slots: N slots that share their open blocks.
            rows: [N] int64, their rows in `blocks`.
            blocks: the open blocks, after the decision.
            logits: [N, L, V] of the forward.
        """
        for index, slot in enumerate(slots):
            if slot not in self._asked:
                continue
            row = rows[index : index + 1]
            written = blocks.written[row]  # [1, L]
            ids, values, ranks = best(
                logits[index : index + 1], blocks.tokens[row], self._asked[slot], self.mask_token_id
            )
            width = ids.shape[-1]
            where = written[..., None]
            self._ids[row, :, :width] = torch.where(where, ids, self._ids[row, :, :width])
            self._values[row, :, :width] = torch.where(where, values, self._values[row, :, :width])
            self._ranks[row] = torch.where(written, ranks, self._ranks[row])

    def of(self, rows: Tensor, order: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of slots.

        Args:
            rows: [N] int64, slots.
            order: [N, L] int64, positions of each block.
            num_top: tokens beside the chosen one.

        Returns:
            Token ids and log-probabilities [N, L, 1 + num_top], the chosen token first, and its
            rank [N, L], 1 for the most probable.
        """
        each = order[..., None].expand(-1, -1, 1 + num_top)
        ids = self._ids[rows][..., : 1 + num_top].gather(1, each)
        values = self._values[rows][..., : 1 + num_top].gather(1, each)
        return ids, values, self._ranks[rows].gather(1, order)


def best(
    logits: Tensor, tokens: Tensor, num_top: int, mask_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens, and of the most probable ones.

    Args:
        logits: [N, L, V], any float dtype.
        tokens: [N, L] int64.
        num_top: how many of the most probable tokens.
        mask_token_id: MASK, which takes part in the softmax and is not among them.

    Returns:
        Token ids and log-probabilities [N, L, 1 + num_top], the given token first, and its rank
        [N, L] int64.
    """
    logprobs = logits.log_softmax(dim=-1, dtype=precision(logits)).float()  # [N, L, V]
    own = logprobs.gather(-1, tokens[..., None])  # [N, L, 1]
    logprobs[..., mask_token_id] = float("-inf")
    ranks = (logprobs > own).sum(dim=-1) + 1
    top, ids = logprobs.topk(min(num_top, logits.shape[-1] - 1), dim=-1)
    return torch.cat((tokens[..., None], ids), dim=-1), torch.cat((own, top), dim=-1), ranks
