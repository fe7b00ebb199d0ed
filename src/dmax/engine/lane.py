"""The open blocks of all requests decoded in the same way, as tensors, and what one step does to them.

S slots, W blocks a slot may have open (or versions of one block), B rows of a step, L block length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.decoding import get_strategy
from dmax.decoding.block import (
    Advance,
    Branching,
    Decision,
    DecodingStrategy,
    Output,
    State,
    View,
    Window,
    apply,
    sanitize,
)
from dmax.params import DecodingParams

Record = TypeVar("Record", View, Output)


@dataclass(frozen=True, slots=True)
class Flags:
    """What the host learns of a block after a step.

    Attributes:
        done, forced, capped, invalid: see `Advance`.
        broken: the logits held a NaN.
        opens: enough of the block is settled for the next one to open.
    """

    done: bool
    forced: bool
    capped: bool
    invalid: bool
    broken: bool
    opens: bool


class Lane:
    """The open blocks of all requests with the same strategy and settings; slot s has the rows s W to s W + W - 1."""

    def __init__(
        self,
        params: DecodingParams,
        num_slots: int,
        block_length: int,
        device: torch.device,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.strategy: DecodingStrategy = get_strategy(params)
        self.window: Window = getattr(self.strategy, "window", Window())
        self.num_branches: int = getattr(self.strategy, "num_branches", 1)
        self.width = max(self.window.size, self.num_branches)
        self.eos_token_ids = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        extra = getattr(self.strategy, "extra_steps", 0)  # of strategies that go on after the last mask
        self.max_steps = params.max_steps_per_block or block_length * self.window.size + extra
        shape = (num_slots * self.width, block_length)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.previous = torch.zeros((num_slots, self.width, block_length), dtype=torch.long, device=device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.active = torch.zeros(shape, dtype=torch.bool, device=device)
        self.step = torch.zeros(shape[0], dtype=torch.long, device=device)
        self.soft: SoftTokens | None = None
        self.embeds: Tensor | None = None
        self.confidence = torch.zeros(shape, device=device)
        self.state: State = {}

    def view(self, rows: Tensor, mask_token_id: int, embed: Any, gumbel: Tensor | None = None) -> View:
        """What the strategy may read of these rows [B] or [B, n], n open blocks of the same sequence."""
        flat = rows.flatten()
        return View(
            tokens=self.tokens[flat],
            masked=self.masked[flat],
            active=self.active[flat],
            step=self.step[flat],
            mask_token_id=mask_token_id,
            max_steps=self.max_steps,
            embed=embed,
            temperature=self.params.temperature,
            gumbel=gumbel,
            forced=self._forced(rows) if self.window.size > 1 and rows.dim() > 1 else None,
        )

    def _forced(self, rows: Tensor) -> Tensor:
        """Which of the blocks [B, n] must progress, [B n]: the first, and those behind one that is settled enough."""
        forced = torch.ones_like(rows, dtype=torch.bool)
        forced[:, 1:] = self._settled(rows[:, :-1]) >= self.window.forces_at
        return forced.flatten()

    def _settled(self, rows: Tensor) -> Tensor:
        """Share of each block's positions, the prompt's tail left out, that are decoded and sure; as `rows`."""
        settled = self.active[rows] & ~self.masked[rows] & (self.confidence[rows] >= self.window.settled_at)
        active = self.active[rows].sum(dim=-1)
        return torch.where(active > 0, settled.sum(dim=-1) / active.clamp(min=1), 1.0)

    def open(self, row: int, known: Sequence[int], mask_token_id: int, embed: Any) -> None:
        """Open a block that begins with the `known` tokens (the prompt's tail) and is masked from there on."""
        self.tokens[row] = mask_token_id
        self.tokens[row, : len(known)] = torch.tensor(known, dtype=torch.long)
        self.masked[row] = torch.arange(self.masked.shape[1], device=self.masked.device) >= len(known)
        self.active[row] = self.masked[row]
        self.step[row] = 0
        self.confidence[row] = 0
        if self.soft is not None:
            self.soft.where[row] = False
        rows = torch.tensor([row], device=self.tokens.device)
        self._store_state(rows, self.strategy.open(self.view(rows, mask_token_id, embed)))

    def inputs(self, rows: Tensor, mask_token_id: int, embed: Any) -> Tensor:
        """Input embeddings [B, n L, D] of the rows' [B, n] next forward: hard tokens, or what was decided last."""
        flat = rows.flatten()
        if self.embeds is not None:
            first = (self.step[flat] == 0)[:, None, None]
            inputs = torch.where(first, embed(self.tokens[flat]), self.embeds[flat])
        else:
            inputs = embed_tokens(embed, self.tokens[flat], _rows(self.soft, flat), mask_token_id)
        return inputs.view(len(rows), -1, inputs.shape[-1])

    def advance(self, rows: Tensor, view: View, logits: Tensor) -> Tensor:
        """One step of the strategy for rows [B, n] and their logits [B n, L, V]; `Flags` as bools [6, B, n].

        Versions of a block count as one: the flags are then [6, B, 1], of the one that was chosen.
        """
        output, broken = sanitize(logits, view.mask_token_id)
        state = {name: value[rows.flatten()] for name, value in self.state.items()}
        if self.num_branches > 1:
            broken = broken.view(rows.shape).any(dim=1)
            view, output, state = self._choose(rows, view, output, state)
        decision, state = self.strategy.step(view, output, state)
        result = apply(view, decision, self.max_steps)
        held = rows[:, 0] if self.num_branches > 1 else rows.flatten()
        self.tokens[held], self.masked[held], self.step[held] = result.tokens, result.masked, view.step + 1
        self._store_state(held, state)
        self._store_feed(held, decision.soft, decision.embeds)
        if decision.confidence is not None:
            self.confidence[held] = decision.confidence.float()
        if self.num_branches > 1:
            self._branch(held, decision, result, output)
        flags = (result.done, result.forced, result.capped, result.invalid, broken, self._opens(held))
        return torch.stack(flags).view(len(flags), len(rows), -1)

    def _opens(self, rows: Tensor) -> Tensor:
        """Whether the block after each of the rows [B] may open."""
        if self.window.size == 1:
            return torch.zeros_like(rows, dtype=torch.bool)
        ends = (torch.isin(self.tokens[rows], self.eos_token_ids) & self.active[rows] & ~self.masked[rows]).any(dim=1)
        return (self._settled(rows) >= self.window.opens_at) & ~ends

    def _choose(self, rows: Tensor, view: View, output: Output, state: State) -> tuple[View, Output, State]:
        """Of the versions [B, n] of each block the best one, as the only row."""
        if rows.shape[1] == 1:
            return view, output, state
        best = cast(Branching, self.strategy).choose(view, output)
        index = torch.arange(len(rows), device=best.device) * rows.shape[1] + best
        return _pick(view, index), _pick(output, index), {name: value[index] for name, value in state.items()}

    def _branch(self, rows: Tensor, decision: Decision, result: Advance, output: Output) -> None:
        """Put the further versions of the blocks in `rows` [B] into the rows behind them."""
        further = cast(Branching, self.strategy).branch(result.masked, output)  # [B, R - 1, L]
        for version in range(1, self.num_branches):
            write, place = further[:, version - 1] & result.masked, rows + version
            self.tokens[place] = torch.where(write, decision.tokens, result.tokens)
            self.masked[place], self.active[place] = result.masked & ~write, self.active[rows]
            self.step[place], self.confidence[place] = self.step[rows], self.confidence[rows]
            for value in self.state.values():
                value[place] = value[rows]

    def _store_state(self, rows: Tensor, state: State) -> None:
        for name, value in state.items():
            if name not in self.state:
                self.state[name] = value.new_zeros((len(self.tokens), *value.shape[1:]))
            self.state[name][rows] = value

    def _store_feed(self, rows: Tensor, soft: SoftTokens | None, embeds: Tensor | None) -> None:
        if embeds is not None:
            if self.embeds is None:
                self.embeds = embeds.new_zeros((len(self.tokens), *embeds.shape[1:]))
            self.embeds[rows] = embeds
        if soft is None:
            if self.soft is not None:
                self.soft.where[rows] = False
            return
        if self.soft is None:
            shape = (len(self.tokens), *soft.ids.shape[1:])
            nowhere = torch.zeros_like(self.masked)
            self.soft = replace(soft, where=nowhere, ids=soft.ids.new_zeros(shape), probs=soft.probs.new_zeros(shape))
        self.soft.where[rows], self.soft.ids[rows], self.soft.probs[rows] = soft.where, soft.ids, soft.probs


def _pick(record: Record, index: Tensor) -> Record:
    """The rows `index` of all tensors of a record."""
    values = ((field.name, getattr(record, field.name)) for field in fields(record))
    rows: dict[str, Any] = {name: value[index] for name, value in values if isinstance(value, Tensor)}
    return replace(record, **rows)


def _rows(soft: SoftTokens | None, rows: Tensor) -> SoftTokens | None:
    return soft and replace(soft, where=soft.where[rows], ids=soft.ids[rows], probs=soft.probs[rows])
