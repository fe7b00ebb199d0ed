"""Learn2PD: a small filter learns from the confidences of a block which predictions are final (arXiv 2509.25188)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dmax.baselines.heads import Head, filter_logits, load_head
from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured


@dataclass(frozen=True, slots=True)
class Learn2PD(Configured):
    """Decode every masked position that the filter accepts, and always the most confident one.

        S = {i masked : sigmoid(f(c)_i) >= threshold} ∪ {argmax c}

    f sees the confidences c of all positions of the block, decoded ones and the prompt's tail
    included. The one token a step is the source's fixed schedule with a step for every position.
    Its end-of-text prediction, which cuts the canvas, has no part here: with block diffusion,
    generation ends with the block that holds the EOS anyway.

    Attributes:
        threshold: the filter's certainty from which a position is decoded.
        head: the bundled model whose filter comes with dmax, or a trained one's file. It belongs to
            one model.
        filter: what was read from there.
    """

    name: ClassVar[str] = "learn2pd"
    default_threshold: ClassVar[float] = 0.96  # the source's for LLaDA; 0.9 for Dream

    threshold: float
    head: str = ""
    filter: Head = field(init=False)

    def __post_init__(self) -> None:
        """Raises `InputError` without a sound filter."""
        object.__setattr__(self, "filter", load_head(self.head, "learn2pd"))

    def open(self, view: View) -> State:
        """Nothing to remember; raises `InputError` for a block that is longer than the filter."""
        self.filter.check_length(view.tokens.shape[1], f"filter `{self.head}`")
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        confidence = prediction.confidence
        certainty = filter_logits(self.filter.on(confidence.device), confidence).sigmoid()  # [B, L]
        commit = view.masked & (certainty >= self.threshold)
        commit = commit | selection.most_confident(view.masked, confidence)
        return Decision(prediction.tokens, commit, confidence=confidence), state
