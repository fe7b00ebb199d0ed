"""SchED: leave early once the logits are clear enough for how late it is (arXiv 2512.02892)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.errors import InputError
from dmax.params import check_number

Schedule = Literal["cosine", "linear", "exponential"]


@dataclass(frozen=True, slots=True)
class ScheduledExit(Configured):
    """Decode one position a step; fill the block once the mean margin of its masks reaches a falling bound.

    The margin is top1 - top2 in raw logits, so `high` and `low` belong to a model:
    `dmax.evaluation.calibrate` finds them. The paper's values are for Dream and LLaDA.

    Attributes:
        high: bound at the first step of a block.
        low: bound at its last.
        schedule: how the bound falls between them.
        rate: of the exponential schedule.
        steady: leave only if no masked position changed its mind since the step before, as the
            published loop does.
    """

    name: ClassVar[str] = "sched"

    high: float = 7.5
    low: float = 2.5
    schedule: Schedule = "cosine"
    rate: float = 4.0
    steady: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("low", self.low, low=0)
        check_number("high", self.high, low=self.low)
        check_number("rate", self.rate, low=0)
        if self.schedule not in get_args(Schedule):
            raise InputError(
                f"`schedule` must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}"
            )

    def open(self, view: View) -> State:
        """No opinion yet."""
        return {"tokens": torch.full_like(view.tokens, -1)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        clear = mean_margin(output.logits, view.masked) >= self.bound(view.step, view.max_steps)
        if self.steady:
            clear = clear & ~(view.masked & (prediction.tokens != state["tokens"])).any(dim=1)
        surest = selection.top(
            view.masked, -selection.entropy(output.logits), torch.ones_like(view.step)
        )
        commit = torch.where(clear[:, None], view.masked, surest)
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), {
            "tokens": prediction.tokens
        }

    def bound(self, step: Tensor, max_steps: int) -> Tensor:
        """The margin [B] asked for at `step` [B] of `max_steps`."""
        progress = step / max(max_steps - 1, 1)
        if self.schedule == "linear":
            return self.high + (self.low - self.high) * progress
        left = (
            torch.exp(-self.rate * progress)
            if self.schedule == "exponential"
            else (1 + (math.pi * progress).cos()) / 2
        )
        return self.low + (self.high - self.low) * left


def mean_margin(logits: Tensor, masked: Tensor) -> Tensor:
    """top1 - top2 of the logits [B, L, V], averaged over the masked positions [B, L]; [B]."""
    first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    return torch.where(masked, first - second, 0.0).sum(dim=1) / masked.sum(dim=1).clamp(min=1)
