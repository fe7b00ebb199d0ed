"""What the next forward sees, down to the embeddings it becomes."""

from __future__ import annotations

import pytest
import torch
from scripted import MASK, V, rows

from dmax.blend import embed_tokens
from dmax.decoding.block import Prediction
from dmax.decoding.feed import soft_feed

PREDICTION = Prediction(
    tokens=torch.tensor([[1, 2, 3]]),
    confidence=torch.tensor([[0.5, 0.8, 0.3]]),
    ids=torch.tensor([[[1], [2], [3]]]),
    probs=torch.tensor([[[0.5], [0.8], [0.3]]]),
)


def test_the_prediction_is_fed_at_decoded_positions_alone() -> None:
    soft = soft_feed(rows([".x."]), PREDICTION)
    assert torch.equal(soft.where, rows([".x."]))
    assert torch.equal(soft.ids, PREDICTION.ids)
    assert torch.equal(soft.probs, PREDICTION.probs)
    assert soft.renormalize


@pytest.mark.parametrize(
    ("renormalize", "length"), [(True, 0.8 * 3 + 0.2 * 4), (False, (2.4**2 + 0.8**2) ** 0.5)]
)
def test_a17_a_blend_by_hand(renormalize: bool, length: float) -> None:
    """Token of length 3 and mask of length 4 at right angles, π = 0.8: (2.4, 0.8), with eq. 10 of length 3.2."""
    table = torch.zeros(V, 2)
    table[2], table[MASK] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    soft = soft_feed(rows([".x."]), PREDICTION, renormalize=renormalize)
    embeds = embed_tokens(lambda ids: table[ids], torch.tensor([[5, 2, MASK]]), soft, MASK)[0]
    torch.testing.assert_close(
        embeds[1], length * torch.tensor([2.4, 0.8]) / (2.4**2 + 0.8**2) ** 0.5
    )
    assert torch.equal(embeds[0], table[5])  # the prompt's tail stays hard
    assert torch.equal(embeds[2], table[MASK])  # a mask stays the pure mask embedding
