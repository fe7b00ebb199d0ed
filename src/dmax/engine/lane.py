"""The open blocks of all requests decoded in the same way, as tensors, and what one step does to them.

S slots, W blocks a slot may have open (or versions of one block), B rows of a step, L block length,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.decoding import get_strategy
from dmax.decoding.block import DecodingStrategy, Output, State, View, Window, apply
from dmax.engine.rows import Rows, Shape
from dmax.engine.runner import ModelRunner
from dmax.engine.versions import branch, choose
from dmax.params import DecodingParams

Index = slice | Tensor
"""Rows of a lane: a range of them, or int64 numbers [R]."""


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
        self.needs_hidden_states: bool = getattr(self.strategy, "needs_hidden_states", False)
        ends = () if params.ignore_eos else sorted(eos_token_ids)
        self.eos_token_ids = torch.tensor(ends, dtype=torch.long, device=device)
        extra = getattr(
            self.strategy, "extra_steps", 0
        )  # of strategies that go on after the last mask
        self.max_steps = params.max_steps_per_block or block_length * self.window.size + extra
        shape = (num_slots * self.width, block_length)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.active = torch.zeros(shape, dtype=torch.bool, device=device)
        self.step = torch.zeros(shape[0], dtype=torch.long, device=device)
        self.soft: SoftTokens | None = None
        self.embeds: Tensor | None = None
        self.confidence = torch.zeros(shape, device=device)
        self.state: State = {}

    def view(
        self,
        rows: Index,
        mask_token_id: int,
        embed: Any,
        gumbel: Tensor | None = None,
        forced: Tensor | None = None,
    ) -> View:
        """What the strategy may read of these R rows."""
        return View(
            tokens=self.tokens[rows],
            masked=self.masked[rows],
            active=self.active[rows],
            step=self.step[rows],
            mask_token_id=mask_token_id,
            max_steps=self.max_steps,
            embed=embed,
            temperature=self.params.temperature,
            gumbel=gumbel,
            forced=forced,
        )

    def _forced(self, before: Tensor) -> Tensor | None:
        """Which blocks must progress, [R]: the first of a sequence, and those behind one that is settled enough."""
        if self.window.size == 1:
            return None
        return (before < 0) | (self._settled(before.clamp(min=0)) >= self.window.forces_at)

    def _settled(self, rows: Index) -> Tensor:
        """Share of each block's positions, the prompt's tail left out, that are decoded and sure, [R]."""
        settled = (
            self.active[rows]
            & ~self.masked[rows]
            & (self.confidence[rows] >= self.window.settled_at)
        )
        active = self.active[rows].sum(dim=-1)
        return torch.where(active > 0, settled.sum(dim=-1) / active.clamp(min=1), 1.0)

    def open(self, row: int, known: Sequence[int], mask_token_id: int, embed: Any) -> None:
        """Open a block that begins with the `known` tokens (the prompt's tail) and is masked from there on."""
        self.tokens[row] = mask_token_id
        self.tokens[row, : len(known)] = torch.tensor(known, dtype=torch.long)
        self.masked[row] = torch.arange(self.masked.shape[1], device=self.masked.device) >= len(
            known
        )
        self.active[row] = self.masked[row]
        self.step[row] = 0
        self.confidence[row] = 0
        if self.soft is not None:
            self.soft.where[row] = False
        rows = slice(row, row + 1)
        self._store_state(rows, self.strategy.open(self.view(rows, mask_token_id, embed)))

    def inputs(self, rows: Index, mask_token_id: int, embed: Any) -> Tensor:
        """Input embeddings [R, L, D] of the rows' next forward: hard tokens, or what was decided last."""
        if self.embeds is not None:
            first = (self.step[rows] == 0)[:, None, None]
            return torch.where(first, embed(self.tokens[rows]), self.embeds[rows])
        return embed_tokens(embed, self.tokens[rows], _rows(self.soft, rows), mask_token_id)

    def denoise(
        self, runner: ModelRunner, shape: Shape, rows: Rows, gumbel: Tensor | None = None
    ) -> Tensor:
        """The device's part of a step: a forward over the blocks, a decision, and what becomes of the open ones.

        Nothing here waits for the device or depends on values, so a CUDA graph can hold it.

        Args:
            runner: the model.
            shape: see `Shape`.
            rows: on the device.
            gumbel: [R, L, V] noise, for temperatures above 0.

        Returns:
            `Flags` as bools [6, R]; with versions of blocks [6, B], one for each block.
        """
        places, before = rows.where[3:, shape.num_pending :]
        aligned = shape.aligned and self.num_branches == 1
        opened: Index = slice(0, shape.num_open) if aligned else places
        mask_token_id = runner.mask_token_id
        embed = runner.embed
        embeds = self.inputs(opened, mask_token_id, embed)
        output = runner.denoise(shape, rows, embeds, self.needs_hidden_states)
        view = self.view(opened, mask_token_id, embed, gumbel, self._forced(before))
        return self.advance(opened, view, output, shape.versions)

    def advance(self, rows: Index, view: View, output: Output, versions: int = 1) -> Tensor:
        """One step of the strategy for R open rows and their forward; see `denoise`."""
        broken = output.broken.view(-1, versions).any(dim=1)
        state = {name: value[rows] for name, value in self.state.items()}
        if versions > 1:
            view, output, state = choose(self, versions, view, output, state)
        decision, state = self.strategy.step(view, output, state)
        result = apply(view, decision, self.max_steps)
        held = rows[::versions] if isinstance(rows, Tensor) else rows
        self.tokens[held] = result.tokens
        self.masked[held] = result.masked
        self.step[held] = view.step + 1
        self._store_state(held, state)
        self._store_feed(held, decision.soft, decision.embeds)
        if decision.confidence is not None:
            self.confidence[held] = decision.confidence.float()
        if self.num_branches > 1 and isinstance(held, Tensor):
            branch(self, held, decision, result, output)
        return torch.stack(
            (result.done, result.forced, result.capped, result.invalid, broken, self._opens(held))
        )

    def _opens(self, rows: Index) -> Tensor:
        """Whether the block after each of the rows may open, [B]."""
        if self.window.size == 1:
            return torch.zeros_like(self.masked[rows, 0])
        ends = (
            torch.isin(self.tokens[rows], self.eos_token_ids)
            & self.active[rows]
            & ~self.masked[rows]
        ).any(dim=1)
        return (self._settled(rows) >= self.window.opens_at) & ~ends

    def _store_state(self, rows: Index, state: State) -> None:
        for name, value in state.items():
            if name not in self.state:
                self.state[name] = value.new_zeros((len(self.tokens), *value.shape[1:]))
            self.state[name][rows] = value

    def _store_feed(self, rows: Index, soft: SoftTokens | None, embeds: Tensor | None) -> None:
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
            self.soft = replace(
                soft,
                where=nowhere,
                ids=soft.ids.new_zeros(shape),
                probs=soft.probs.new_zeros(shape),
            )
        self.soft.where[rows] = soft.where
        self.soft.ids[rows] = soft.ids
        self.soft.probs[rows] = soft.probs


def _rows(soft: SoftTokens | None, rows: Index) -> SoftTokens | None:
    return soft and replace(
        soft, where=soft.where[rows], ids=soft.ids[rows], probs=soft.probs[rows]
    )
