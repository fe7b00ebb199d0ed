"""Which masks to decode: hand-worked rows, and agreement with naive scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import rows
from torch import Tensor

from dmax.decoding.block import leftmost
from dmax.decoding.selection import above, most_confident, prefix

CONFIDENCES = [0.0, 0.3, 0.5, 0.9, 1.0]
Select = Callable[[Tensor, Tensor, Any], Tensor]
BLOCKS = st.lists(st.tuples(st.booleans(), st.sampled_from(CONFIDENCES)), min_size=1, max_size=10)


@pytest.mark.parametrize(
    ("masked", "confidence", "expected"),
    [
        (
            "xxxxx",
            [0.9, 0.6, 0.51, 0.4, 0.95],
            "xxx..",
        ),  # stops at the first below, whatever follows
        ("xxxxx", [0.4, 0.9, 0.9, 0.9, 0.9], "x...."),  # none qualifies: the leftmost
        ("..xxx", [0.1, 0.1, 0.9, 0.4, 0.9], "..x.."),  # decoded positions do not end the run
        ("x.x.x", [0.9, 0.1, 0.9, 0.1, 0.9], "x.x.x"),
        (".....", [0.9, 0.9, 0.9, 0.9, 0.9], "....."),
    ],
)
def test_prefix(masked: str, confidence: list[float], expected: str) -> None:
    assert torch.equal(prefix(rows([masked]), torch.tensor([confidence]), 0.5), rows([expected]))


@pytest.mark.parametrize(
    ("masked", "confidence", "expected"),
    [
        ("xxxxx", [0.9, 0.4, 0.6, 0.4, 0.95], "x.x.x"),
        (
            "xxxxx",
            [0.1, 0.4, 0.3, 0.4, 0.2],
            ".x...",
        ),  # none qualifies: the most confident, the leftmost of equals
        ("..xxx", [0.9, 0.9, 0.1, 0.3, 0.2], "...x."),  # decoded positions do not count
        (".....", [0.9, 0.9, 0.9, 0.9, 0.9], "....."),
    ],
)
def test_a15_without_the_prefix_rule_every_confident_mask_is_decoded(
    masked: str, confidence: list[float], expected: str
) -> None:
    assert torch.equal(above(rows([masked]), torch.tensor([confidence]), 0.5), rows([expected]))


@pytest.mark.parametrize("select", [prefix, above])
def test_a7_a_confidence_equal_to_the_threshold_qualifies(select: Select) -> None:
    for threshold in (0.3, 0.95, 0.9, 0.7):  # none of them exact in binary
        confidence = torch.full((1, 3), threshold)
        assert select(rows(["xxx"]), confidence, threshold).all()
        assert select(rows(["xxx"]), confidence.nextafter(torch.zeros(())), threshold).sum() == 1


@pytest.mark.parametrize("select", [prefix, above])
def test_a7_threshold_zero_decodes_everything_and_above_one_a_single_position(
    select: Select,
) -> None:
    masked, confidence = rows([".xx.x"]), torch.tensor([[0.0, 0.0, 0.4, 0.1, 1.0]])
    assert torch.equal(select(masked, confidence, 0.0), masked)
    assert select(masked, confidence, 1.1).sum() == 1


@pytest.mark.parametrize("select", [prefix, above])
def test_a_threshold_per_row(select: Select) -> None:
    chosen = select(rows(["xxx", "xxx"]), torch.full((2, 3), 0.6), torch.tensor([[0.5], [0.7]]))
    assert chosen.sum(dim=1).tolist() == [3, 1]


def test_single_positions() -> None:
    masked = rows(["..x.x", "xx...", "....."])
    assert torch.equal(leftmost(masked), rows(["..x..", "x....", "....."]))
    confidence = torch.tensor([[0.9, 0.9, 0.1, 0.9, 0.2]]).expand(3, -1)
    assert torch.equal(most_confident(masked, confidence), rows(["....x", "x....", "....."]))


@given(block=BLOCKS, threshold=st.sampled_from([*CONFIDENCES, 0.4, 1.5]))
def test_selections_equal_naive_scans(block: list[tuple[bool, float]], threshold: float) -> None:
    masked = torch.tensor([[is_masked for is_masked, _ in block]])
    confidence = torch.tensor([[value for _, value in block]])
    candidates = [position for position, (is_masked, _) in enumerate(block) if is_masked]
    run: list[int] = []
    for position in candidates:
        if block[position][1] < threshold:
            break
        run.append(position)
    high = [position for position in candidates if block[position][1] >= threshold]
    best = sorted(candidates, key=lambda position: -block[position][1])[:1]
    assert prefix(masked, confidence, threshold)[0].nonzero().flatten().tolist() == (
        run or candidates[:1]
    )
    assert above(masked, confidence, threshold)[0].nonzero().flatten().tolist() == (high or best)


@given(block=BLOCKS)
def test_a_lower_threshold_never_decodes_less(block: list[tuple[bool, float]]) -> None:
    masked = torch.tensor([[is_masked for is_masked, _ in block]])
    confidence = torch.tensor([[value for _, value in block]])
    for select in (prefix, above):
        counts = [
            int(select(masked, confidence, threshold).sum())
            for threshold in (0.0, 0.3, 0.5, 0.9, 1.0)
        ]
        assert counts == sorted(counts, reverse=True)
