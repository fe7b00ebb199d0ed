"""DEMASK: decode together what a learned head takes for nearly independent (arXiv 2604.02560)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dmax.baselines.heads import Head, dependency_logits, load_head
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.errors import InputError
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class Demask(Configured):
    """Take masked positions in the order of their confidence while their predicted dependency stays within `bound`.

        D_ij ≈ TV(p(x_j | ctx), p(x_j | ctx, x_i)),   cost(S) = Σ D_ij over i, j in S, i taken before j

    By the chain rule the distance of the product of the chosen distributions from the model's own
    joint one is at most the sum over j of TV(p(x_j | ctx), p(x_j | ctx, all taken before j)); if
    influences are sub-additive, at most cost(S). A position that would exceed the bound is passed
    over and later ones are still tried.

    A reconstruction. From the source: the head on final hidden states in the form of a scaled dot
    product, its target, the greedy choice by confidence under a bound on the cumulative dependency,
    and that low confidence may exclude a position. Ours: the order within the sum, passing over,
    what x_i is (the likeliest token), and both defaults.

    Attributes:
        threshold: confidence from which a position may join others; the most confident one needs
            none. 0: any.
        bound: total variation allowed a step; 0 decodes one position a step, unless others are free
            of each other.
        head: the bundled model whose head comes with dmax, or a trained one's file. It belongs to
            one model.
        influence: what was read from there.
    """

    name: ClassVar[str] = "demask"
    default_threshold: ClassVar[float] = 0.0  # off: on the bundled model the bound alone is better
    needs_hidden_states: ClassVar[bool] = True

    threshold: float
    bound: float = 0.1
    head: str = ""
    influence: Head = field(init=False)

    def __post_init__(self) -> None:
        """Raises `InputError` for a negative bound, or without a sound head."""
        check_number("bound", self.bound, low=0)
        object.__setattr__(self, "influence", load_head(self.head, "demask"))

    def open(self, view: View) -> State:
        """Nothing to remember; raises `InputError` for a block that is longer than those the head was trained on."""
        self.influence.check_length(view.tokens.shape[1], f"head `{self.head}`")
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions; raises `InputError` if the head is for another model's hidden states."""
        # [B, L, D]
        hidden_states = output.hidden_states
        size = self.influence.hidden_size
        if hidden_states is None or hidden_states.shape[-1] != size:
            given = "none" if hidden_states is None else hidden_states.shape[-1]
            raise InputError(
                f"the head `{self.head}` needs hidden states of size {size}, got {given}",
                hint="a head belongs to the model that it was trained on",
            )
        prediction = predict(view, output)
        dependency = dependency_logits(
            self.influence.on(hidden_states.device), hidden_states
        ).sigmoid()
        allowed = view.masked & (prediction.confidence >= self.threshold)
        commit = within_dependency(
            view.masked, allowed, prediction.confidence, dependency, self.bound
        )
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), state


def within_dependency(
    masked: Tensor, allowed: Tensor, confidence: Tensor, dependency: Tensor, bound: float
) -> Tensor:
    """The greedy set of `Demask` [B, L] bool: never empty in a row with masks, as the first position costs nothing.

    Args:
        masked: [B, L] bool.
        allowed: [B, L] bool, masks that may join others; the most confident one need not be among
            them.
        confidence: [B, L] float32, ties go to the leftmost.
        dependency: [B, L, L] float32, D_ij at [:, i, j]; at least 0.
        bound: on the sum of the dependencies of each chosen position on those chosen before it.
    """
    order = torch.where(masked, confidence, float("-inf")).argsort(
        dim=1, descending=True, stable=True
    )
    chosen = torch.zeros_like(masked)
    spent = confidence.new_zeros(len(masked), 1)
    incoming = torch.zeros_like(confidence)  # [B, L], Σ D_ij over the chosen i
    for rank in range(order.shape[1]):
        at = order[:, rank : rank + 1]  # [B, 1]
        cost = spent + incoming.gather(1, at)
        may = masked if rank == 0 else allowed
        take = may.gather(1, at) & (cost <= bound)
        chosen = chosen.scatter(1, at, take)
        spent = torch.where(take, cost, spent)
        row = dependency.gather(1, at[:, :, None].expand(-1, -1, dependency.shape[2]))[
            :, 0
        ]  # [B, L]
        incoming = incoming + take * row
    return chosen
