"""Which masks to decode: hand-worked rows, and agreement with naive scans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import rows
from torch import Tensor

from dmax.decoding.selection import above, most_confident
from dmax.decoding.spd import prefix
from dmax.decoding.strategy import Number

CONFIDENCES = [0.0, 0.3, 0.5, 0.9, 1.0]
Line = list[tuple[bool, float]]
Select = Callable[[Tensor, Tensor, Number], Tensor]
LINES = st.lists(st.tuples(st.booleans(), st.sampled_from(CONFIDENCES)), min_size=1, max_size=10)


def tensors(line: Line) -> tuple[Tensor, Tensor]:
    """Masks and confidences [1, L]."""
    masked = torch.tensor([[is_masked for is_masked, _ in line]])
    return masked, torch.tensor([[value for _, value in line]])


def positions(chosen: Tensor) -> list[int]:
    """Where the only row is True."""
    return chosen[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("masked", "confidence", "expected"),
    [
        ("xxxxx", [0.9, 0.4, 0.6, 0.4, 0.95], "x.x.x"),
        # None qualifies: the most confident, the leftmost of equals.
        ("xxxxx", [0.1, 0.4, 0.3, 0.4, 0.2], ".x..."),
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
    masked = rows([".xx.x"])
    confidence = torch.tensor([[0.0, 0.0, 0.4, 0.1, 1.0]])
    assert torch.equal(select(masked, confidence, 0.0), masked)
    assert select(masked, confidence, 1.1).sum() == 1


@pytest.mark.parametrize("select", [prefix, above])
def test_a_threshold_per_row(select: Select) -> None:
    chosen = select(rows(["xxx", "xxx"]), torch.full((2, 3), 0.6), torch.tensor([[0.5], [0.7]]))
    assert chosen.sum(dim=1).tolist() == [3, 1]


@pytest.mark.parametrize("select", [prefix, above])
@pytest.mark.parametrize("threshold", [0.3, 0.95, 0.9, 0.7])
def test_a_threshold_for_every_row_decides_as_one_for_all(select: Select, threshold: float) -> None:
    confidence = torch.full((1, 3), threshold)
    for each in (confidence, confidence.nextafter(torch.zeros(()))):
        for_all = select(rows(["xxx"]), each, threshold)
        assert torch.equal(select(rows(["xxx"]), each, torch.tensor([[threshold]])), for_all)


def test_what_need_not_progress_may_wait() -> None:
    masked = rows(["xxxx", "xxxx", "xxxx"])
    confidence = torch.tensor([[0.5, 0.95, 0.7, 0.92]] * 3)
    must = torch.tensor([True, False, False])
    assert torch.equal(above(masked, confidence, 0.99, must), rows([".x..", "....", "...."]))
    assert torch.equal(above(masked, confidence, 0.9, must), rows([".x.x"] * 3))
    assert torch.equal(prefix(masked, confidence, 0.9, must), rows(["x...", "....", "...."]))
    assert torch.equal(prefix(masked, confidence, 0.5, must), rows(["xxxx"] * 3))


def test_the_most_confident_mask() -> None:
    masked = rows(["..x.x", "xx...", "....."])
    confidence = torch.tensor([[0.9, 0.9, 0.1, 0.9, 0.2]]).expand(3, -1)
    assert torch.equal(most_confident(masked, confidence), rows(["....x", "x....", "....."]))


@given(line=LINES, threshold=st.sampled_from([*CONFIDENCES, 0.4, 1.5]))
def test_selections_equal_naive_scans(line: Line, threshold: float) -> None:
    masked, confidence = tensors(line)
    candidates = [position for position, (is_masked, _) in enumerate(line) if is_masked]
    run: list[int] = []
    for position in candidates:
        if line[position][1] < threshold:
            break
        run.append(position)
    high = [position for position in candidates if line[position][1] >= threshold]
    best = sorted(candidates, key=lambda position: -line[position][1])[:1]
    assert positions(prefix(masked, confidence, threshold)) == (run or candidates[:1])
    assert positions(above(masked, confidence, threshold)) == (high or best)


@given(line=LINES)
def test_a_lower_threshold_never_decodes_less(line: Line) -> None:
    masked, confidence = tensors(line)
    for select in (prefix, above):
        chosen = [select(masked, confidence, value) for value in (0.0, 0.3, 0.5, 0.9, 1.0)]
        counts = [int(each.sum()) for each in chosen]
        assert counts == sorted(counts, reverse=True)
