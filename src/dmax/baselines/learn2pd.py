"""Learn2PD: a small filter learns which predictions are final (arXiv 2509.25188)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dmax.baselines.heads import Head, filter_logits, load_head
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import most_confident
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class Learn2PD(Strategy):
    """Decode every masked position that the filter accepts, and always the most confident one.

        S = {i masked : sigmoid(f(c)_i) >= threshold} ∪ {argmax c}

    f sees the confidences c of all positions of the block, also of decoded ones and of the end of
    the prompt. The one token a step is the source's fixed schedule with a step for every position.
    Its end-of-text prediction, which cuts the canvas, is left out: with block diffusion, generation
    ends with the block that holds the EOS anyway.

    Attributes:
        threshold: the filter's certainty from which a position is decoded.
        head: the bundled model whose filter comes with dmax, or a trained one's file. It belongs to
            one model.
        filter: what was read from there.
    """

    name: ClassVar[str] = "learn2pd"
    default_threshold: ClassVar[float] = 0.96  # the source's for LLaDA; 0.9 for Dream

    threshold: Number = number(high=1)
    head: str = ""
    filter: Head = field(init=False)

    def __post_init__(self) -> None:
        """Raises `InputError` without a sound filter."""
        super().__post_init__()
        object.__setattr__(self, "filter", load_head(self.head, "learn2pd"))

    def check_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises `InputError` if the filter was trained on another model."""
        self.filter.check_weights(weights, f"filter `{self.head}`")

    def open(self, view: View) -> State:
        """Raises `InputError` for a block that is longer than the filter."""
        self.filter.check_length(view.tokens.shape[1], f"filter `{self.head}`")
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        confidence = predicted.confidence
        logits = filter_logits(self.filter.on(confidence.device), confidence)
        accepted = view.masked & (logits.sigmoid() >= self.threshold)  # [B, L]
        promoted = accepted | most_confident(view.masked, confidence)
        return Decision(predicted.tokens, promoted, confidence=confidence), state
