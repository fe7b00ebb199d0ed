"""Safe logits, predictions, and the rules that no decision can break."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import MASK, V, logits_of, noise_of, opened, rows
from torch import Tensor

from dmax.confidence import Candidates, GumbelNoise
from dmax.decoding.block import Advance, Decision, Output, View, apply, leftmost, predict

INF = float("inf")


def prediction(logits: Tensor, top_k: int = 1, noise: GumbelNoise | None = None) -> Candidates:
    view = opened((), logits.shape[1], len(logits), noise=noise)
    return predict(view, Output(logits, MASK), top_k)


# --- Output ---------------------------------------------------------------------------------------


def test_nan_marks_its_row_and_no_other() -> None:
    logits = torch.zeros(3, 2, V)
    logits[1, 1, 4] = torch.nan
    output = Output(logits, MASK)
    assert output.broken.tolist() == [False, True, False]
    assert not output.logits.isnan().any()
    assert not output.probs.isnan().any()


def test_reading_an_output_leaves_the_logits_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.arange(V, dtype=dtype).repeat(1, 2, 1)
        before = logits.clone()
        output = Output(logits, MASK)
        assert output.top(2).ids.shape == (1, 2, 2)
        assert output.probs.shape == output.logits.shape == logits.shape
        assert torch.equal(logits, before)


def test_infinities_keep_their_meaning() -> None:
    rows_of_logits = [
        [0, 0, 0, INF, 0, 0, 0, 0],
        [-INF] * V,
        [0, INF, 0, INF, 0, 0, 0, 0],
        [9, *[-INF] * (V - 1)],
    ]
    result = prediction(torch.tensor([rows_of_logits]))
    assert result.tokens.tolist() == [[3, 0, 1, 0]]
    torch.testing.assert_close(result.confidence, torch.tensor([[1.0, 1 / V, 0.5, 1.0]]))


def test_low_precision_is_computed_in_float32() -> None:
    output = Output(torch.zeros(1, 1, V, dtype=torch.bfloat16), MASK)
    assert (output.logits.dtype, output.probs.dtype) == (torch.float32, torch.float32)


def test_logits_are_made_only_when_somebody_asks_for_them() -> None:
    calls = list[int]()
    logits = logits_of([3, 5], [0.6, 0.25])

    def make() -> Tensor:
        calls.append(1)
        return logits

    best = Output(logits, MASK).top(1)
    output = Output(make, MASK, candidates=lambda k, noise: best)
    assert torch.equal(output.top(1).tokens, torch.tensor([[3, 5]]))
    assert not output.broken.any()
    assert calls == []
    assert torch.equal(output.logits, Output(logits, MASK).logits)
    assert torch.equal(output.probs, Output(logits, MASK).probs)
    assert calls == [1]


# --- predict --------------------------------------------------------------------------------------


def test_confidence_is_the_probability_of_the_token() -> None:
    result = prediction(logits_of([3, 5], [0.6, 0.25]))
    assert result.tokens.tolist() == [[3, 5]]
    torch.testing.assert_close(result.confidence, torch.tensor([[0.6, 0.25]]))
    assert result.confidence.dtype == torch.float32


def test_a9_mask_is_never_predicted_but_its_probability_counts() -> None:
    """As in the published code, a position that would rather stay masked is not confident."""
    probabilities = torch.tensor([[[0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6]]])
    result = prediction(probabilities.log(), top_k=2)
    assert result.ids.tolist() == [[[0, 1]]]
    torch.testing.assert_close(result.probs, torch.tensor([[[0.3, 0.1]]]))


@pytest.mark.parametrize("size", [V, 1000, 40_001])
def test_ties_go_to_the_lowest_id(size: int) -> None:
    logits = torch.zeros(2, 3, size)
    # Ties begin inside, where a vectorised argmax might pick another one.
    logits[:, :, size // 2 :] = 1.0
    view = opened((), 3, 2)
    assert (predict(view, Output(logits, size - 1)).tokens == size // 2).all()
    # MASK is 0: the next one.
    assert (predict(view, Output(torch.zeros(2, 3, size), 0)).tokens == 1).all()


def test_candidates_come_most_probable_first() -> None:
    probabilities = torch.tensor([[[0.1, 0.4, 0.05, 0.3, 0.02, 0.03, 0.0, 0.1]]])
    result = prediction(probabilities.log(), top_k=3)
    assert result.ids.tolist() == [[[1, 3, 0]]]
    torch.testing.assert_close(result.probs, torch.tensor([[[0.4, 0.3, 0.1]]]))


@pytest.mark.parametrize("top_k", [V - 1, V, V + 5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_more_candidates_than_tokens_are_all_tokens_but_mask_once(
    top_k: int, temperature: float
) -> None:
    """A token counted twice would give more than all of the probability to the blend."""
    noise = noise_of([temperature] * 2, 3) if temperature else None
    result = prediction(torch.randn(2, 3, V), top_k, noise)
    assert torch.equal(result.ids.sort(dim=-1).values, torch.arange(V - 1).expand(2, 3, -1))
    assert (result.probs.sum(dim=-1) <= 1 + 1e-6).all()


def test_sampling_follows_the_softmax_and_reports_unscaled_confidence() -> None:
    draws = 20_000
    temperature = 2.0
    logits = torch.tensor([2.0, 1.0, 0.0, -INF, -INF, -INF, -INF, 5.0]).expand(1, draws, V)
    result = prediction(logits, noise=noise_of([temperature], draws))
    expected = (torch.tensor([2.0, 1.0, 0.0]) / temperature).softmax(0)
    measured = result.tokens.flatten().bincount(minlength=V)[:3] / draws
    torch.testing.assert_close(measured, expected, atol=0.015, rtol=0)
    unscaled = logits[0, 0].softmax(0)
    torch.testing.assert_close(result.confidence, unscaled[result.tokens])


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[[5.0, 10.0, *[0.0] * (V - 2)]]])
    assert prediction(logits, noise=noise_of([temperature])).tokens.tolist() == [[1]]


def test_greedy_rows_beside_sampled_ones_are_what_they_are_alone() -> None:
    logits = torch.randn(4, 5, V)
    together = prediction(logits, top_k=3, noise=noise_of([0.0, 1.0] * 2, 5))
    alone = prediction(logits, top_k=3)
    assert not torch.equal(together.ids, alone.ids)
    for name in Candidates._fields:
        assert torch.equal(getattr(together, name)[::2], getattr(alone, name)[::2])


def test_sampling_from_nothing_but_minus_infinity_spares_mask() -> None:
    view = replace(opened((), 1), noise=noise_of([1.0]), mask_token_id=0)
    assert predict(view, Output(torch.full((1, 1, V), -INF), 0)).tokens.item() != 0


def test_leftmost() -> None:
    masked = rows(["..x.x", "xx...", "....."])
    assert torch.equal(leftmost(masked), rows(["..x..", "x....", "....."]))


# --- apply ----------------------------------------------------------------------------------------


def block(tokens: list[int], masked: str, active: str, step: int = 0) -> View:
    """A block that may take 8 steps."""
    return View(
        tokens=torch.tensor([tokens]),
        masked=rows([masked]),
        active=rows([active]),
        step=torch.tensor([step]),
        max_steps=torch.tensor([8]),
        mask_token_id=MASK,
    )


def decide(tokens: list[int], promote: str, done: bool | None = None, **sets: str) -> Decision:
    return Decision(
        torch.tensor([tokens]),
        rows([promote]),
        done=None if done is None else torch.tensor([done]),
        **{name: rows([value]) for name, value in sets.items()},
    )


def flags(advance: Advance) -> set[str]:
    names = ("done", "forced", "capped", "invalid")
    return {name for name in names if getattr(advance, name).item()}


def test_what_is_decoded_may_be_revised_and_the_prompt_is_not_part_of_it() -> None:
    assert torch.equal(block([5, 1, MASK], "..x", ".xx").decoded, rows([".x."]))


def test_promotions_and_revisions_reach_the_positions_they_may() -> None:
    view = block([5, 1, 2, MASK, MASK], "...xx", ".xxxx")
    result = apply(view, decide([0, 3, 2, 4, 4], "xxxx.", revise="xxxxx"))
    # The prompt's 5 stays; a revision does not decode masks.
    assert result.tokens.tolist() == [[5, 3, 2, 4, MASK]]
    assert torch.equal(result.masked, rows(["....x"]))
    assert flags(result) == set()


def test_a_promotion_does_not_revise() -> None:
    result = apply(block([1, MASK], ".x", "xx"), decide([3, 4], "xx"))
    assert result.tokens.tolist() == [[1, 4]]


def test_a_row_that_promotes_nothing_has_its_leftmost_mask_decoded() -> None:
    result = apply(block([5, 1, MASK, MASK], "..xx", ".xxx"), decide([0, 3, 4, 4], "...."))
    assert result.tokens.tolist() == [[5, 1, 4, MASK]]
    assert flags(result) == {"forced"}


def test_a_row_that_need_not_progress_may_wait() -> None:
    view = block([5, 1, MASK, MASK], "..xx", ".xxx")
    waiting = replace(view, must_progress=torch.tensor([False]))
    result = apply(waiting, decide([0, 3, 4, 4], "...."))
    assert torch.equal(result.tokens, view.tokens)
    assert flags(result) == set()
    pressed = replace(view, must_progress=torch.tensor([True]))
    assert flags(apply(pressed, decide([0, 3, 4, 4], "...."))) == {"forced"}


@pytest.mark.parametrize(
    ("promote", "remask", "kept"),
    [("..xx.", "x....", "x...x"), ("..xx.", "xx...", "....x"), (".....", "x....", "...xx")],
)
def test_remasking_holds_only_with_net_progress(promote: str, remask: str, kept: str) -> None:
    view = block([1, 1, *[MASK] * 3], "..xxx", "xxxxx")
    result = apply(view, decide([4] * 5, promote, remask=remask))
    assert torch.equal(result.masked, rows([kept]))
    assert torch.equal(result.tokens == MASK, result.masked)


def test_remasking_spares_the_prompt_and_masks_decoded_now() -> None:
    view = block([5, 1, *[MASK] * 3], "..xxx", ".xxxx")
    result = apply(view, decide([4] * 5, "..xxx", remask="x.x.."))
    assert result.tokens.tolist() == [[5, 1, 4, 4, 4]]


def test_a10_the_step_cap_fills_the_block_and_closes_it() -> None:
    view = block([5, 1, *[MASK] * 3], "..xxx", ".xxxx", step=7)
    result = apply(view, decide([0, 3, 4, 2, 1], "..x..", done=False, remask=".x..."))
    assert result.tokens.tolist() == [[5, 1, 4, 2, 1]]
    assert not result.masked.any()
    assert flags(result) == {"done", "capped"}


@pytest.mark.parametrize(
    ("done", "expected"), [(None, {"done"}), (True, {"done"}), (False, {"done", "capped"})]
)
def test_a10_capped_means_that_the_block_had_not_converged(
    done: bool | None, expected: set[str]
) -> None:
    view = block([1, MASK], ".x", "xx", step=7)
    assert flags(apply(view, decide([1, 2], ".x", done=done))) == expected


def test_a10_every_row_has_a_cap_of_its_own() -> None:
    view = opened((), 4, batch=3)
    view = replace(view, step=torch.tensor([1, 1, 2]), max_steps=torch.tensor([2, 3, 3]))
    nothing = Decision(torch.ones(3, 4, dtype=torch.long), torch.zeros_like(view.masked))
    result = apply(view, nothing)
    assert result.capped.tolist() == result.done.tolist() == [True, False, True]
    assert torch.equal(result.masked, rows(["....", ".xxx", "...."]))


def test_a8_done_never_leaves_masks() -> None:
    view = block([MASK, MASK], "xx", "xx")
    assert flags(apply(view, decide([1, 2], "x.", done=True))) == set()


def test_without_a_verdict_a_full_block_is_done() -> None:
    assert flags(apply(block([1, MASK], ".x", "xx"), decide([1, 2], ".x"))) == {"done"}


@pytest.mark.parametrize("step", [0, 7])
def test_a_block_with_nothing_to_decode_is_done_at_once(step: int) -> None:
    view = block([1, 2], "..", "..", step)
    result = apply(view, decide([3, 3], "xx", done=False, revise="xx", remask="xx"))
    assert result.tokens.tolist() == [[1, 2]]
    assert flags(result) == {"done"}


@pytest.mark.parametrize(
    ("tokens", "promote", "revise", "expected"),
    [
        ([0, MASK, 0], ".x.", "...", {"invalid", "done"}),
        ([MASK, 1, 0], ".x.", "x..", {"invalid", "done"}),
        ([MASK, MASK, 0], "...", "...", {"invalid", "forced", "done"}),
        ([MASK, 1, MASK], ".x.", "...", {"done"}),  # proposed, not written
        ([0, 1, MASK], ".x.", "..x", {"done"}),  # the prompt is not written
    ],
)
def test_writing_mask_is_invalid(
    tokens: list[int], promote: str, revise: str, expected: set[str]
) -> None:
    view = block([1, MASK, 5], ".x.", "xx.")
    assert flags(apply(view, decide(tokens, promote, revise=revise))) == expected


def test_mask_id_in_the_prompt_is_a_token_like_any_other() -> None:
    """Status is kept, never read off the ids."""
    result = apply(block([MASK, MASK], ".x", ".x"), decide([3, 4], "xx", revise="xx"))
    assert result.tokens.tolist() == [[MASK, 4]]
    assert flags(result) == {"done"}


def row_of(value: Any, row: int) -> Any:
    """A view or a decision of one row only."""
    names = value.__slots__
    parts = {name: getattr(value, name) for name in names}
    one = slice(row, row + 1)
    return type(value)(
        **{name: part[one] if isinstance(part, Tensor) else part for name, part in parts.items()}
    )


@given(st.data())
def test_no_decision_breaks_the_rules(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 6))

    def draw(elements: st.SearchStrategy[Any], *shape: int) -> Tensor:
        num = torch.Size(shape).numel()
        return torch.tensor(data.draw(st.lists(elements, min_size=num, max_size=num))).view(shape)

    active = draw(st.booleans(), batch, length)
    masked = active & draw(st.booleans(), batch, length)
    tokens = draw(st.integers(0, V - 2), batch, length).masked_fill(masked, MASK)
    view = View(
        tokens=tokens,
        masked=masked,
        active=active,
        step=draw(st.integers(0, 3), batch),
        max_steps=draw(st.integers(1, 4), batch),
        mask_token_id=MASK,
    )
    decision = Decision(
        draw(st.integers(0, V - 2), batch, length),
        promote=draw(st.booleans(), batch, length),
        revise=draw(st.booleans(), batch, length),
        remask=draw(st.booleans(), batch, length),
        done=draw(st.booleans(), batch),
    )
    result = apply(view, decision)
    had = masked.sum(1)
    has = result.masked.sum(1)
    assert torch.equal(result.tokens[~active], tokens[~active])
    assert torch.equal((result.tokens == MASK) & active, result.masked)
    assert not (result.masked & ~active).any()
    assert ((has < had) | (had == 0)).all()
    assert not (result.done & (has > 0)).any()
    assert result.done[view.step + 1 >= view.max_steps].all()
    assert not result.invalid.any()
    for row in range(batch):  # each row as it would be alone
        alone = apply(row_of(view, row), row_of(decision, row))
        for name in Advance.__slots__:
            assert torch.equal(getattr(alone, name), getattr(result, name)[row : row + 1])
