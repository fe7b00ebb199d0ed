"""Threshold decoding of LLaDA-2.0: confident masks at once, nothing revised."""

from __future__ import annotations

import torch
from scripted import MASK, logits_of, opened, play

from dmax.params import DecodingParams

PARAMS = DecodingParams(strategy="threshold", threshold=0.9)


def test_confident_positions_first_then_the_best_of_the_rest() -> None:
    logits = logits_of([1, 2, 3, 4], [0.5, 0.95, 0.7, 0.92])
    steps = play(PARAMS, lambda step, view: logits, opened((), 4))
    assert [step.advance.tokens[0].tolist() for step in steps] == [
        [MASK, 2, MASK, 4],
        [MASK, 2, 3, 4],
        [1, 2, 3, 4],
    ]
    assert not any(step.advance.forced.any() or step.advance.capped.any() for step in steps)


def test_decoded_tokens_and_their_confidence_stay() -> None:
    script = [logits_of([1, 2], [0.95, 0.6]), logits_of([3, 4], [0.99, 0.95])]
    steps = play(PARAMS, lambda step, view: script[step], opened((), 2))
    assert steps[-1].advance.tokens.tolist() == [[1, 4]]
    assert steps[-1].decision.confidence is not None
    torch.testing.assert_close(steps[-1].decision.confidence, torch.tensor([[0.95, 0.95]]))
    assert steps[-1].decision.soft is None
