"""The baselines' rules for which masks to decode: hand-worked rows, and naive scans."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import MASK, V, logits_of, rows
from torch import Tensor

from dmax.baselines import selection
from dmax.decoding.block import Output

Line = list[tuple[bool, float]]
LINES = st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=32)), min_size=1, max_size=12)


def tensors(line: Line) -> tuple[Tensor, Tensor]:
    """Masks and scores [1, L]."""
    masked = torch.tensor([[is_masked for is_masked, _ in line]])
    return masked, torch.tensor([[value for _, value in line]])


def ranked(line: Line) -> list[int]:
    """Masked positions, highest score first, ties to the left."""
    candidates = [position for position, (is_masked, _) in enumerate(line) if is_masked]
    return sorted(candidates, key=lambda position: (-line[position][1], position))


def positions(chosen: Tensor) -> set[int]:
    """Where the only row is True."""
    return set(chosen[0].nonzero().flatten().tolist())


@given(line=LINES, count=st.integers(0, 13))
def test_top_takes_the_most_confident(line: Line, count: int) -> None:
    masked, score = tensors(line)
    found = selection.top(masked, score, torch.tensor([count]))
    assert positions(found) == set(ranked(line)[: max(count, 1)])


@given(line=LINES)
def test_ranks_count_the_masks_that_come_before(line: Line) -> None:
    masked, score = tensors(line)
    found = selection.ranks(masked, score)[0].tolist()
    order = ranked(line)
    assert [found[position] for position in order] == list(range(len(order)))
    assert sorted(found) == list(range(len(line)))  # the others come last


@pytest.mark.parametrize(
    ("confidence", "factor", "expected"),
    [
        ([0.99, 0.98, 0.05], 1.0, "xx."),  # 2 (0.01) and 3 (0.02) fit under 1, 4 (0.95) does not
        ([0.9, 0.01], 1.0, "x."),
        ([0.2, 0.3, 0.1], 1.0, ".x."),  # nothing fits: the most confident all the same
        ([0.70, 0.70, 0.70], 1.0, "xx."),  # 2 (0.3) = 0.6, 3 (0.3) = 0.9, 4 (0.3) = 1.2
        ([0.70, 0.70, 0.70], 1.3, "xxx"),
        ([1.0, 1.0, 1.0], 0.0, "xxx"),
    ],
)
def test_factor_rule(confidence: list[float], factor: float, expected: str) -> None:
    masked = torch.ones(1, len(confidence), dtype=torch.bool)
    found = selection.within_error(masked, torch.tensor([confidence]), factor)
    assert torch.equal(found, rows([expected]))


@given(line=LINES, factor=st.floats(0, 3))
def test_factor_rule_equals_a_loop(line: Line, factor: float) -> None:
    masked, confidence = tensors(line)
    order = ranked(line)
    count = 0
    while count < len(order) and confidence[0, order[count]] >= torch.tensor(
        1 - factor / (count + 2)
    ):
        count += 1
    found = selection.within_error(masked, confidence, factor)
    assert positions(found) == set(order[: max(count, 1)])


@given(factor=st.floats(0, 2, width=32), count=st.integers(2, 32))
def test_a_factor_that_is_a_column_decides_as_the_number(factor: float, count: int) -> None:
    masked = torch.ones(1, 32, dtype=torch.bool)
    confidence = torch.zeros(1, 32)
    confidence[0, : count - 1] = 1.0
    just_enough = 1 - factor / torch.tensor(count + 1)  # one last bit more would not do
    confidence[0, count - 1] = just_enough
    number = selection.within_error(masked, confidence, factor)
    column = selection.within_error(masked, confidence, torch.tensor([[factor]]))
    assert torch.equal(number, column)
    assert number.sum() >= count


@pytest.mark.parametrize(
    ("masked", "confidence", "expected"),
    [
        ("xxx.xx", [0.2, 0.5, 0.4, 0.9, 0.1, 0.3], ".x...x"),
        # Of equals only the leftmost of its run.
        ("x.x.xx", [0.2, 0.9, 0.4, 0.9, 0.3, 0.3], "x.x.x."),
        ("......", [0.9] * 6, "......"),
        ("xxxxxx", [0.0] * 6, "x....."),
    ],
)
def test_run_maxima(masked: str, confidence: list[float], expected: str) -> None:
    found = selection.run_maxima(rows([masked]), torch.tensor([confidence]))
    assert torch.equal(found, rows([expected]))


@pytest.mark.parametrize(
    ("masked", "entropy", "bound", "expected"),
    [
        ("xxxx", [0.3, 0.1, 0.9, 0.2], 0.3, "xx.x"),  # 0, 0.1, 0.1 + 0.2 fit; 0.6 does not
        ("xxxx", [0.3, 0.1, 0.9, 0.2], 0.0, ".x.."),
        ("xxxx", [0.0, 0.0, 0.9, 0.2], 0.0, "xx.x"),  # what is certain is free, and so is the last
        ("..xx", [0.0, 0.0, 0.9, 0.2], 5.0, "..xx"),
        ("....", [0.0, 0.0, 0.9, 0.2], 5.0, "...."),
    ],
)
def test_entropy_bound(masked: str, entropy: list[float], bound: float, expected: str) -> None:
    found = selection.within_entropy(rows([masked]), torch.tensor([entropy]), bound)
    assert torch.equal(found, rows([expected]))


def test_bounds_may_differ_from_row_to_row() -> None:
    masked = rows(["xxxx", "xxxx"])
    entropy = torch.tensor([[0.3, 0.1, 0.9, 0.2]]).expand(2, -1)
    bounds = torch.tensor([[0.3], [0.0]])
    found = selection.within_entropy(masked, entropy, bounds)
    assert torch.equal(found, rows(["xx.x", ".x.."]))
    confidence = torch.full((2, 3), 0.7)
    factors = torch.tensor([[1.0], [1.3]])
    found = selection.within_error(rows(["xxx", "xxx"]), confidence, factors)
    assert torch.equal(found, rows(["xx.", "xxx"]))


def test_entropy_leaves_mask_out() -> None:
    output = Output(logits_of([1, MASK], [1 / V, 0.9]), MASK)
    expected = torch.full((1, 2), math.log(V - 1))  # the others are equals
    torch.testing.assert_close(selection.entropy(output.logits), expected)
