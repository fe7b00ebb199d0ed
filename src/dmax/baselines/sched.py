"""SchED: leave early once the logits are clear enough for how late it is (arXiv 2512.02892)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dmax.baselines import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import most_confident
from dmax.decoding.strategy import Number, Strategy, number
from dmax.errors import InputError
from dmax.params import check_number

Schedule = Literal["cosine", "linear", "exponential"]


@dataclass(frozen=True)
class ScheduledExit(Strategy):
    """Decode one position a step; fill the block once its masks reach a falling margin.

    The margin is top1 - top2 in raw logits, averaged over the masks. So `high` and `low` belong to
    a model: `dmax.baselines.calibrate` finds them. The paper's values are for Dream and LLaDA.

    Attributes:
        high: bound at the first step of a block.
        low: bound at its last.
        schedule: how the bound falls between them.
        rate: of the exponential schedule.
        steady: leave only if no masked position changed its mind since the step before, as the
            published loop does.
    """

    name: ClassVar[str] = "sched"

    high: Number = number(7.5)
    low: Number = number(2.5)
    schedule: Schedule = "cosine"
    rate: Number = number(4.0)
    steady: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("low", self.low, low=0)
        check_number("high", self.high, low=float(self.low))
        super().__post_init__()
        if self.schedule not in get_args(Schedule):
            choices = ", ".join(get_args(Schedule))
            raise InputError(f"`schedule` must be one of {choices}, got {self.schedule!r}")

    def open(self, view: View) -> State:
        """No opinion yet."""
        return {"tokens": torch.full_like(view.tokens, -1)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        progress = view.step / (view.max_steps - 1).clamp(min=1)
        bound = self.bound(progress[:, None])
        clear = mean_margin(output.logits, view.masked) >= bound  # [B, 1]
        if self.steady:
            changed = view.masked & (predicted.tokens != state["tokens"])
            clear = clear & ~changed.any(dim=1, keepdim=True)
        entropy = selection.entropy(output.logits)
        surest = most_confident(view.masked, -entropy)
        promoted = torch.where(clear, view.masked, surest)
        decision = Decision(predicted.tokens, promoted, confidence=predicted.confidence)
        return decision, {"tokens": predicted.tokens}

    def bound(self, progress: Tensor) -> Tensor:
        """The margin asked for; `progress` is 0 at the first step of a block and 1 at its last."""
        if self.schedule == "linear":
            return self.high + (self.low - self.high) * progress
        if self.schedule == "exponential":
            left = torch.exp(-self.rate * progress)
        else:
            left = (1 + (math.pi * progress).cos()) / 2
        return self.low + (self.high - self.low) * left


def mean_margin(logits: Tensor, masked: Tensor) -> Tensor:
    """top1 - top2 of the logits [B, L, V], averaged over the masked positions [B, L]; [B, 1]."""
    first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    total = torch.where(masked, first - second, 0.0).sum(dim=1, keepdim=True)
    return total / masked.sum(dim=1, keepdim=True).clamp(min=1)
