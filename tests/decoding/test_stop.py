"""When a block is finished."""

from __future__ import annotations

import torch
from scripted import rows

from dmax.decoding.stop import confident, consistent


def test_a11_consistent_needs_every_position_decoded_and_unchanged() -> None:
    masked = rows(["...", "...", "..x", "..x"])
    changed = rows(["...", ".x.", "...", "x.."])
    assert consistent(masked, changed).tolist() == [True, False, False, False]


def test_a8_confident_needs_every_position_decoded() -> None:
    confidence = torch.full((2, 3), 0.99)
    assert confident(rows(["xxx", "xxx"]), rows(["...", "..x"]), confidence, 0.9).tolist() == [
        True,
        False,
    ]


def test_confidence_counts_at_active_positions_only() -> None:
    active, masked = rows([".xx", "xxx"]), rows(["...", "..."])
    confidence = torch.tensor([[0.1, 0.95, 0.95]]).expand(2, -1)
    assert confident(active, masked, confidence, 0.9).tolist() == [True, False]


def test_a7_confidence_equal_to_the_bound_stops() -> None:
    confidence = torch.full((1, 2), 0.9)
    assert confident(rows(["xx"]), rows([".."]), confidence, 0.9).all()
    assert not confident(
        rows(["xx"]), rows([".."]), confidence.nextafter(torch.zeros(())), 0.9
    ).any()
