"""DEMASK: decode together what a learned head finds independent (arXiv 2604.02560)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dmax.baselines.heads import Head, dependency_logits, load_head
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.strategy import Number, Strategy, number
from dmax.errors import InputError


@dataclass(frozen=True)
class Demask(Strategy):
    """Take masks in the order of their confidence while their predicted dependency is small.

        D_ij ≈ TV(p(x_j | ctx), p(x_j | ctx, x_i))
        cost(S) = Σ D_ij over i, j in S with i taken before j

    By the chain rule the product of the chosen distributions is at most the sum over j of
    TV(p(x_j | ctx), p(x_j | ctx, all taken before j)) away from the model's own joint distribution.
    If influences are sub-additive, that is at most cost(S). A position that would exceed the bound
    is passed over, and later ones are still tried.

    This is a reconstruction. From the source: the head on final hidden states in the form of a
    scaled dot product, its target, the greedy choice by confidence under a bound on the cumulative
    dependency, and that low confidence may exclude a position. Ours: the order within the sum,
    passing over, what x_i is (the likeliest token), and both defaults.

    Attributes:
        threshold: confidence from which a position may join others; 0: any may. The most confident
            one always may.
        bound: total variation allowed at each step; 0 decodes one position a step, unless others do
            not depend on each other at all.
        head: the bundled model whose head comes with dmax, or a trained one's file. It belongs to
            one model.
        influence: what was read from there.
    """

    name: ClassVar[str] = "demask"
    default_threshold: ClassVar[float] = 0.0  # off: on the bundled model the bound alone is better
    needs_hidden_states: ClassVar[bool] = True

    threshold: Number = number(high=1)
    bound: Number = number(0.1)
    head: str = ""
    influence: Head = field(init=False)

    def __post_init__(self) -> None:
        """Raises `InputError` for a negative bound, or without a sound head."""
        super().__post_init__()
        object.__setattr__(self, "influence", load_head(self.head, "demask"))

    def check_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises `InputError` if the head was trained on another model."""
        self.influence.check_weights(weights, f"head `{self.head}`")

    def open(self, view: View) -> State:
        """Raises `InputError` for a block that is longer than those the head was trained on."""
        self.influence.check_length(view.tokens.shape[1], f"head `{self.head}`")
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]; raises `InputError` if the head is another model's."""
        hidden_states = output.hidden_states  # [B, L, D]
        size = self.influence.hidden_size
        if hidden_states is None or hidden_states.shape[-1] != size:
            given = "none" if hidden_states is None else hidden_states.shape[-1]
            raise InputError(
                f"the head `{self.head}` needs hidden states of size {size}, got {given}",
                hint="a head belongs to the model that it was trained on",
            )
        predicted = predict(view, output)
        confidence = predicted.confidence
        tensors = self.influence.on(hidden_states.device)
        dependency = dependency_logits(tensors, hidden_states).sigmoid()  # [B, L, L]
        allowed = view.masked & (confidence >= self.threshold)
        promoted = within_dependency(view.masked, allowed, confidence, dependency, self.bound)
        return Decision(predicted.tokens, promoted, confidence=confidence), state


def within_dependency(
    masked: Tensor, allowed: Tensor, confidence: Tensor, dependency: Tensor, bound: Number
) -> Tensor:
    """The greedy set of `Demask` [B, L] bool; its first position costs nothing.

    Args:
        masked: [B, L] bool.
        allowed: [B, L] bool, masks that may join others; the most confident one always may.
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
