"""Credit decoding: tokens that keep being the model's favourite are believed sooner (arXiv 2510.06133)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class CreditDecoding(Configured):
    """Threshold decoding on logits raised by past support.

        C <- decay · C;   C[i, argmax z_i] += (max p_i)^power at masked i;   z' = z + alpha · log(1 + C)

    Attributes:
        threshold: confidence under z' from which a position is decoded.
        alpha: weight of the credit.
        decay: share of the credit kept from step to step.
        power: exponent of the support added.
    """

    name: ClassVar[str] = "credit"
    default_threshold: ClassVar[float] = 0.95

    threshold: float
    alpha: float = 0.7
    decay: float = 0.8
    power: float = 0.2

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("alpha", self.alpha, low=0)
        check_number("decay", self.decay, low=0, high=1)
        check_number("power", self.power, low=0)

    def open(self, view: View) -> State:
        """No credit yet. A position gains at most one new favourite a step, so a short list holds all there is."""
        shape = (*view.masked.shape, view.max_steps)
        return {
            "ids": torch.zeros(shape, dtype=torch.long, device=view.tokens.device),
            "credits": torch.zeros(shape, device=view.tokens.device),
        }

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        ids, credits = self._believe(view, output, state)
        prediction = predict(view, _raise(output, ids, credits, self.alpha))
        commit = selection.above(view.masked, prediction.confidence, self.threshold)
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), {
            "ids": ids,
            "credits": credits,
        }

    def _believe(self, view: View, output: Output, state: State) -> tuple[Tensor, Tensor]:
        """Ids and credits [B, L, S] after this step's favourites got theirs; an unused entry has no credit."""
        ids = state["ids"]
        credits = self.decay * state["credits"]
        best = output.top(1)
        # [B, L], never MASK
        favourite = best.ids[..., 0]
        support = best.probs[..., 0]
        known = (ids == favourite[..., None]) & (credits > 0)
        free = view.step.clamp(max=ids.shape[-1] - 1)[:, None].expand_as(favourite)
        slot = torch.where(known.any(dim=-1), known.int().argmax(dim=-1), free)[..., None]
        gain = torch.where(view.masked, support**self.power, 0.0)[..., None]
        return ids.scatter(-1, slot, favourite[..., None]), credits.scatter_add(-1, slot, gain)


def _raise(output: Output, ids: Tensor, credits: Tensor, alpha: float) -> Output:
    """softmax(z + alpha log(1 + C)) from softmax(z), where only the entries of `ids` differ; MASK keeps its share."""
    gained = output.probs.gather(-1, ids) * (
        (1 + credits) ** alpha - 1
    )  # [B, L, S], 0 for unused entries
    probs = output.probs.scatter_add(-1, ids, gained) / (1 + gained.sum(dim=-1, keepdim=True))
    return Output.of(output.logits.scatter_add(-1, ids, alpha * credits.log1p()), probs)
