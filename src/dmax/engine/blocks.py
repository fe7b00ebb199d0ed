"""The open blocks of all sequences that are decoded by the same strategy, as tensors.

S slots, W open blocks that a slot may have, B blocks of a step, L block length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmax.blend import Embed, SoftTokens, embed_tokens
from dmax.decoding.block import Advance, Decision, State, View
from dmax.decoding.strategy import Strategy
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds


class OpenBlocks:
    """Open blocks, and what is known of each; slot s has the rows s W to s W + W - 1.

    Settings that are numbers have a value for every row, so that sequences which differ only in
    them share a forward.

    Args:
        strategy: what decodes them; its numbers are those of no sequence in particular.
        num_slots: S.
        special_ids: MASK, EOS and L.
        embed: the model's input embeddings.
        device: of all tensors.
    """

    def __init__(
        self,
        strategy: Strategy,
        num_slots: int,
        special_ids: SpecialIds,
        embed: Embed,
        device: torch.device,
    ) -> None:
        self.strategy = strategy
        self.mask_token_id = special_ids.mask_token_id
        self.block_length = special_ids.block_length
        self.embed = embed
        num_rows = num_slots * strategy.blocks
        shape = (num_rows, self.block_length)
        with device:
            self._eos_token_ids = torch.tensor(special_ids.eos_token_ids)
            self.tokens = torch.zeros(shape, dtype=torch.long)
            self.masked = torch.zeros(shape, dtype=torch.bool)
            self.active = torch.zeros(shape, dtype=torch.bool)
            self.written = torch.zeros(shape, dtype=torch.bool)
            self.confidence = torch.zeros(shape)
            self.step = torch.zeros(num_rows, dtype=torch.long)
            self.max_steps = torch.zeros(num_rows, dtype=torch.long)
            self.ignores_eos = torch.zeros(num_rows, dtype=torch.bool)
            self.numbers = {name: torch.zeros(num_rows, 1) for name in strategy.numbers()}
        # What strategies remember and feed back; made when they first do.
        self.state: State = {}
        self.feedback: State = {}

    def rows_of(self, slot: int) -> range:
        """The rows of a slot."""
        width = self.strategy.blocks
        return range(slot * width, (slot + 1) * width)

    def grow(self, num_slots: int) -> None:
        """Have rows for this many slots, no fewer than before; what is open stays as it is."""
        num_rows = num_slots * self.strategy.blocks
        self.tokens = _with_rows(self.tokens, num_rows)
        self.masked = _with_rows(self.masked, num_rows)
        self.active = _with_rows(self.active, num_rows)
        self.written = _with_rows(self.written, num_rows)
        self.confidence = _with_rows(self.confidence, num_rows)
        self.step = _with_rows(self.step, num_rows)
        self.max_steps = _with_rows(self.max_steps, num_rows)
        self.ignores_eos = _with_rows(self.ignores_eos, num_rows)
        for kept in (self.numbers, self.state, self.feedback):
            kept.update({name: _with_rows(values, num_rows) for name, values in kept.items()})

    def admit(self, slot: int, strategy: Strategy, params: DecodingParams) -> None:
        """Give the rows of a slot the settings of the request that has it now."""
        own = self.rows_of(slot)
        rows = slice(own.start, own.stop)
        for name, value in strategy.numbers().items():
            column = self.numbers[name]
            column[rows] = float(min(value, torch.finfo(column.dtype).max))
        steps = self.block_length * strategy.blocks + strategy.extra_steps
        most_steps = torch.iinfo(self.max_steps.dtype).max
        self.max_steps[rows] = min(params.max_steps_per_block or steps, most_steps)
        self.ignores_eos[rows] = params.ignore_eos

    def open(self, row: int | Tensor, known: Sequence[int] = ()) -> None:
        """Open blocks in one row, or in each of [B] rows of the device, without a wait for it.

        They begin with `known` tokens, the end of the prompt; then they are masked.
        """
        device = self.tokens.device
        rows = torch.as_tensor(row, device=device).view(-1)
        self.tokens[rows] = self.mask_token_id
        self.tokens[rows, : len(known)] = torch.tensor(known, dtype=torch.long, device=device)
        self.masked[rows] = True
        self.masked[rows, : len(known)] = False
        self.active[rows] = self.masked[rows]
        self.step[rows] = 0
        self.confidence[rows] = 0
        self._keep(self.state, rows, self.strategy.open(self.view(rows)))

    # --- before a forward ---

    def inputs(self, rows: Tensor, num_branches: int = 1) -> Tensor:
        """Input embeddings of the next forward over the blocks in `rows` [B].

        Returns:
            [B * num_branches, L, D]: token embeddings, or what was decided last to be fed back.
        """
        if num_branches > 1:
            branches = self.strategy.branches(self.view(rows), self.state_of(rows))
            return self.embed(branches.flatten(0, 1))
        if "embeds" in self.feedback:
            is_first = (self.step[rows] == 0)[:, None, None]
            hard = self.embed(self.tokens[rows])
            return torch.where(is_first, hard, self.feedback["embeds"][rows])
        soft = None
        if self.feedback:
            renormalize = self.strategy.renormalize
            soft = SoftTokens(
                self.active, **self.feedback, renormalize=renormalize, masked=self.masked
            )
        return embed_tokens(self.embed, self.tokens, soft, self.mask_token_id, rows)

    def candidates(self, row: int) -> list[tuple[tuple[int, float], ...]]:
        """What the next input of each position blends, if that is more than one token."""
        ids = self.feedback.get("ids")  # [rows, L, k]
        if ids is None or ids.shape[-1] == 1:
            return []
        positions = zip(ids[row].tolist(), self.feedback["probs"][row].tolist(), strict=True)
        return [tuple(zip(*each, strict=True)) for each in positions]

    # --- after a forward ---

    def view(self, rows: Tensor, before: Tensor | None = None, noise: Tensor | None = None) -> View:
        """What the strategy may read of the blocks in `rows` [B].

        Args:
            rows: [B] int64.
            before: [B] int64, rows of the open blocks before them, -1 where there is none.
            noise: [B, L, V] Gumbel noise times the temperature; None: all are greedy.
        """
        must_progress = None
        if before is not None and self.strategy.blocks > 1:
            is_settled = self._settled(before.clamp(min=0)) >= self.strategy_of(rows).forces_at
            must_progress = (before < 0) | is_settled[:, 0]
        return View(
            tokens=self.tokens[rows],
            masked=self.masked[rows],
            active=self.active[rows],
            step=self.step[rows],
            max_steps=self.max_steps[rows],
            mask_token_id=self.mask_token_id,
            embed=self.embed,
            noise=noise,
            must_progress=must_progress,
        )

    def strategy_of(self, rows: Tensor) -> Strategy:
        """The strategy with the numbers [B, 1] of these rows."""
        return self.strategy.with_numbers(_of_rows(self.numbers, rows))

    def state_of(self, rows: Tensor) -> State:
        """What the strategy remembers of these rows."""
        return _of_rows(self.state, rows)

    def store(self, rows: Tensor, advance: Advance, decision: Decision, state: State) -> None:
        """Keep what a step made of the blocks in `rows` [B]."""
        self.tokens[rows] = advance.tokens
        self.masked[rows] = advance.masked
        self.written[rows] = advance.written
        self.step[rows] += 1
        if decision.confidence is not None:
            self.confidence[rows] = decision.confidence.float()
        self._keep(self.state, rows, state)
        if decision.embeds is not None:
            self._keep(self.feedback, rows, {"embeds": decision.embeds})
        if decision.soft is not None:
            ids, probs, _ = decision.soft
            self._keep(self.feedback, rows, {"ids": ids, "probs": probs})

    def may_open_next(self, rows: Tensor) -> Tensor:
        """[B] bool, enough of the block is settled and it holds no EOS: the next one may open."""
        if self.strategy.blocks == 1:
            return torch.zeros_like(rows, dtype=torch.bool)
        decoded = self.active[rows] & ~self.masked[rows]
        is_eos = torch.isin(self.tokens[rows], self._eos_token_ids) & decoded
        has_ended = is_eos.any(dim=1) & ~self.ignores_eos[rows]
        is_settled = self._settled(rows) >= self.strategy_of(rows).opens_at
        return is_settled[:, 0] & ~has_ended

    def _settled(self, rows: Tensor) -> Tensor:
        """Share [B, 1] of each block's active positions that are decoded and sure."""
        sure = self.confidence[rows] >= self.strategy_of(rows).settled_at
        settled = self.active[rows] & ~self.masked[rows] & sure
        num_active = self.active[rows].sum(dim=1, keepdim=True)
        share = settled.sum(dim=1, keepdim=True) / num_active.clamp(min=1)
        return torch.where(num_active > 0, share, 1.0)

    def _keep(self, kept: State, rows: Tensor, values: State) -> None:
        """Write values of these rows into tensors for all rows."""
        for name, value in values.items():
            if name not in kept:
                kept[name] = value.new_zeros((len(self.tokens), *value.shape[1:]))
            kept[name][rows] = value.to(kept[name].dtype)


def _with_rows(values: Tensor, num_rows: int) -> Tensor:
    """The same rows, and zeros after them up to `num_rows`."""
    num_new = num_rows - len(values)
    return torch.cat((values, values.new_zeros((num_new, *values.shape[1:]))))


def _of_rows(tensors: State, rows: Tensor) -> State:
    return {name: values[rows] for name, values in tensors.items()}
