"""Credit decoding: believe a lasting favourite sooner (arXiv 2510.06133)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmax.confidence import Candidates, GumbelNoise, choose
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class CreditDecoding(Strategy):
    """Threshold decoding on logits z that past support has raised.

        C <- decay * C;   C[i, argmax z_i] += (max p_i)^power at masked i
        z' = z + alpha * log(1 + C)

    Attributes:
        threshold: confidence under z' from which a position is decoded.
        alpha: weight of the credit C.
        decay: share of the credit that is kept from step to step.
        power: exponent of the support that is added.
    """

    name: ClassVar[str] = "credit"
    default_threshold: ClassVar[float] = 0.95

    threshold: Number = number(high=1)
    alpha: Number = number(0.7)
    decay: Number = number(0.8, high=1)
    power: Number = number(0.2)

    def open(self, view: View) -> State:
        """No credit yet; a position gains one favourite a step, so L entries are enough."""
        shape = (*view.masked.shape, view.masked.shape[1])
        return {
            "ids": torch.zeros(shape, dtype=torch.long, device=view.tokens.device),
            "credits": torch.zeros(shape, device=view.tokens.device),
        }

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        state = self._add_credit(view, output, state)
        raised = _raise(output, state["ids"], state["credits"], _per_entry(self.alpha))
        predicted = predict(view, raised)
        promoted = above(view.masked, predicted.confidence, self.threshold)
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state

    def _add_credit(self, view: View, output: Output, state: State) -> State:
        """The credit [B, L, S] after this step's favourites got theirs; S entries a position."""
        ids = state["ids"]
        best = output.top(1)
        credits = _per_entry(self.decay) * state["credits"].to(best.confidence.dtype)
        favourite = best.tokens[..., None]  # [B, L, 1], never MASK
        is_known = (ids == favourite) & (credits > 0)
        free = view.step.clamp(max=ids.shape[-1] - 1)[:, None]
        known = is_known.int().argmax(dim=-1)
        entry = torch.where(is_known.any(dim=-1), known, free)[..., None]
        gain = torch.where(view.masked, best.confidence**self.power, 0.0)[..., None]
        return {
            "ids": ids.scatter(-1, entry, favourite),
            "credits": credits.scatter_add(-1, entry, gain),
        }


def _raise(output: Output, ids: Tensor, credits: Tensor, alpha: Number) -> Output:
    """softmax(z + alpha log(1 + C)) from softmax(z): only the entries of `ids` differ."""
    factor = (1 + credits) ** alpha
    gained = output.probs.gather(-1, ids) * (factor - 1)  # [B, L, S], 0 for unused entries
    probs = output.probs.scatter_add(-1, ids, gained) / (1 + gained.sum(dim=-1, keepdim=True))
    logits = output.logits.scatter_add(-1, ids, alpha * credits.log1p())  # MASK stays at -inf

    def best(k: int, noise: GumbelNoise | None) -> Candidates:
        chosen = choose(logits.clone(), k, noise)
        broken = torch.zeros_like(chosen[..., 0], dtype=torch.bool)
        return Candidates(chosen, probs.gather(-1, chosen), broken)

    raised = Output(logits, 0, candidates=best)
    raised.__dict__.update(logits=logits, probs=probs)
    return raised


def _per_entry(setting: Number) -> Number:
    """A setting [B, 1] as [B, 1, 1]."""
    return setting[..., None] if isinstance(setting, Tensor) else setting
