"""Safe logits, predictions, and the rules that no decision can break."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import MASK, V, logits_of, opened, rows
from torch import Tensor

from dmax.decoding.block import Advance, Decision, Output, View, apply, predict

INF = float("inf")


def prediction(logits: Tensor, top_k: int = 1, **options: Any) -> Any:
    return predict(opened((), logits.shape[1], len(logits), **options), Output(logits, MASK), top_k)


# --- Output ---------------------------------------------------------------------------------------


def test_nan_marks_its_row_and_no_other() -> None:
    logits = torch.zeros(3, 2, V)
    logits[1, 1, 4] = torch.nan
    output = Output(logits, MASK)
    broken = output.broken
    assert broken.tolist() == [False, True, False]
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


# --- predict --------------------------------------------------------------------------------------


def test_confidence_is_the_probability_of_the_token() -> None:
    result = prediction(logits_of([3, 5], [0.6, 0.25]))
    assert result.tokens.tolist() == [[3, 5]]
    torch.testing.assert_close(result.confidence, torch.tensor([[0.6, 0.25]]))
    assert result.confidence.dtype == torch.float32


def test_a9_mask_is_never_predicted_but_its_probability_counts() -> None:
    """Unlike A9's letter: as in the published code, a position that would rather stay masked is not confident."""
    probabilities = torch.tensor([[[0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6]]])
    result = prediction(probabilities.log(), top_k=2)
    assert result.ids.tolist() == [[[0, 1]]]
    torch.testing.assert_close(result.probs, torch.tensor([[[0.3, 0.1]]]))


@pytest.mark.parametrize("size", [V, 1000, 40_001])
def test_ties_go_to_the_lowest_id(size: int) -> None:
    logits = torch.zeros(2, 3, size)
    logits[:, :, size // 2 :] = (
        1.0  # ties begin inside, where a vectorised argmax might pick another lane
    )
    view = opened((), 3, 2)
    assert (predict(view, Output(logits, size - 1)).tokens == size // 2).all()
    assert (
        predict(view, Output(torch.zeros(2, 3, size), 0)).tokens == 1
    ).all()  # MASK is 0: the next one


def test_candidates_come_most_probable_first() -> None:
    probabilities = torch.tensor([[[0.1, 0.4, 0.05, 0.3, 0.02, 0.03, 0.0, 0.1]]])
    result = prediction(probabilities.log(), top_k=3)
    assert result.ids.tolist() == [[[1, 3, 0]]]
    torch.testing.assert_close(result.probs, torch.tensor([[[0.4, 0.3, 0.1]]]))


@pytest.mark.parametrize("top_k", [V - 1, V, V + 5])
def test_more_candidates_than_tokens_are_all_tokens_but_mask_once(top_k: int) -> None:
    """A token counted twice would give more than all of the probability to the blend."""
    result = prediction(torch.randn(2, 3, V), top_k=top_k)
    assert torch.equal(result.ids.sort(dim=-1).values, torch.arange(V - 1).expand(2, 3, -1))
    assert (result.probs.sum(dim=-1) <= 1 + 1e-6).all()


def test_sampling_follows_the_softmax_and_reports_unscaled_confidence() -> None:
    torch.manual_seed(1)
    draws, temperature = 20_000, 2.0
    logits = torch.tensor([2.0, 1.0, 0.0, -INF, -INF, -INF, -INF, 5.0]).expand(1, draws, V)
    gumbel = -torch.empty(1, draws, V).exponential_().log()
    result = prediction(logits, temperature=temperature, gumbel=gumbel)
    expected = (torch.tensor([2.0, 1.0, 0.0]) / temperature).softmax(0)
    measured = result.tokens.flatten().bincount(minlength=V)[:3] / draws
    torch.testing.assert_close(measured, expected, atol=0.015, rtol=0)
    unscaled = logits[0, 0].softmax(0)
    torch.testing.assert_close(result.confidence, unscaled[result.tokens])


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[[5.0, 10.0, *[0.0] * (V - 2)]]])
    gumbel = -torch.empty(1, 1, V).exponential_().log()
    assert prediction(logits, temperature=temperature, gumbel=gumbel).tokens.tolist() == [[1]]


def test_sampling_from_nothing_but_minus_infinity_spares_mask() -> None:
    view = replace(opened((), 1), temperature=0.1, gumbel=torch.zeros(1, 1, V), mask_token_id=0)
    assert predict(view, Output(torch.full((1, 1, V), -INF), 0)).tokens.item() != 0


# --- apply ----------------------------------------------------------------------------------------


def block(tokens: list[int], masked: str, active: str, step: int = 0) -> View:
    return View(
        torch.tensor([tokens]), rows([masked]), rows([active]), torch.tensor([step]), MASK, 8
    )


def decide(tokens: list[int], commit: str, done: bool | None = None, **sets: str) -> Decision:
    flags = None if done is None else torch.tensor([done])
    return Decision(
        torch.tensor([tokens]),
        rows([commit]),
        done=flags,
        **{name: rows([value]) for name, value in sets.items()},
    )


def flags(advance: Advance) -> set[str]:
    return {
        name for name in ("done", "forced", "capped", "invalid") if getattr(advance, name).item()
    }


def test_commits_and_edits_reach_the_positions_they_may() -> None:
    view = block([5, 1, 2, MASK, MASK], "...xx", ".xxxx")
    result = apply(view, decide([0, 3, 2, 4, 4], "xxxx.", edit="xxxxx"), 8)
    assert result.tokens.tolist() == [
        [5, 3, 2, 4, MASK]
    ]  # the prompt's 5 stays; edits do not decode masks
    assert torch.equal(result.masked, rows(["....x"]))
    assert flags(result) == set()


def test_commit_does_not_edit() -> None:
    result = apply(block([1, MASK], ".x", "xx"), decide([3, 4], "xx"), 8)
    assert result.tokens.tolist() == [[1, 4]]


def test_a_row_that_commits_nothing_has_its_leftmost_mask_decoded() -> None:
    result = apply(block([5, 1, MASK, MASK], "..xx", ".xxx"), decide([0, 3, 4, 4], "...."), 8)
    assert result.tokens.tolist() == [[5, 1, 4, MASK]]
    assert flags(result) == {"forced"}


@pytest.mark.parametrize(
    ("commit", "remask", "kept"),
    [("..xx.", "x....", "x...x"), ("..xx.", "xx...", "....x"), (".....", "x....", "...xx")],
)
def test_remasking_holds_only_with_net_progress(commit: str, remask: str, kept: str) -> None:
    result = apply(
        block([1, 1, *[MASK] * 3], "..xxx", "xxxxx"), decide([4] * 5, commit, remask=remask), 8
    )
    assert torch.equal(result.masked, rows([kept]))
    assert torch.equal(result.tokens == MASK, result.masked)


def test_remasking_spares_the_prompt_and_masks_committed_now() -> None:
    result = apply(
        block([5, 1, *[MASK] * 3], "..xxx", ".xxxx"), decide([4] * 5, "..xxx", remask="x.x.."), 8
    )
    assert result.tokens.tolist() == [[5, 1, 4, 4, 4]]


def test_a10_the_step_cap_fills_the_block_and_closes_it() -> None:
    view = block([5, 1, *[MASK] * 3], "..xxx", ".xxxx", step=7)
    result = apply(view, decide([0, 3, 4, 2, 1], "..x..", done=False, remask=".x..."), 8)
    assert result.tokens.tolist() == [[5, 1, 4, 2, 1]]
    assert not result.masked.any()
    assert flags(result) == {"done", "capped"}


@pytest.mark.parametrize(
    ("done", "expected"), [(None, {"done"}), (True, {"done"}), (False, {"done", "capped"})]
)
def test_a10_capped_means_that_the_block_had_not_converged(
    done: bool | None, expected: set[str]
) -> None:
    assert (
        flags(apply(block([1, MASK], ".x", "xx", step=7), decide([1, 2], ".x", done=done), 8))
        == expected
    )


def test_a8_done_never_leaves_masks() -> None:
    assert (
        flags(apply(block([MASK, MASK], "xx", "xx"), decide([1, 2], "x.", done=True), 8)) == set()
    )


def test_without_a_verdict_a_full_block_is_done() -> None:
    assert flags(apply(block([1, MASK], ".x", "xx"), decide([1, 2], ".x"), 8)) == {"done"}


@pytest.mark.parametrize("step", [0, 7])
def test_a_block_with_nothing_to_decode_is_done_at_once(step: int) -> None:
    result = apply(
        block([1, 2], "..", "..", step), decide([3, 3], "xx", done=False, edit="xx", remask="xx"), 8
    )
    assert result.tokens.tolist() == [[1, 2]]
    assert flags(result) == {"done"}


@pytest.mark.parametrize(
    ("tokens", "commit", "edit", "expected"),
    [
        ([0, MASK, 0], ".x.", "...", {"invalid", "done"}),
        ([MASK, 1, 0], ".x.", "x..", {"invalid", "done"}),
        ([MASK, MASK, 0], "...", "...", {"invalid", "forced", "done"}),
        ([MASK, 1, MASK], ".x.", "...", {"done"}),  # proposed, not written
        ([0, 1, MASK], ".x.", "..x", {"done"}),  # the prompt is not written
    ],
)
def test_writing_mask_is_invalid(
    tokens: list[int], commit: str, edit: str, expected: set[str]
) -> None:
    assert (
        flags(apply(block([1, MASK, 5], ".x.", "xx."), decide(tokens, commit, edit=edit), 8))
        == expected
    )


def test_mask_id_in_the_prompt_is_a_token_like_any_other() -> None:
    """Status is kept, never read off the ids."""
    result = apply(block([MASK, MASK], ".x", ".x"), decide([3, 4], "xx", edit="xx"), 8)
    assert result.tokens.tolist() == [[MASK, 4]]
    assert flags(result) == {"done"}


@given(st.data())
def test_no_decision_breaks_the_rules(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))

    def draw(elements: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(
            data.draw(st.lists(elements, min_size=batch * length, max_size=batch * length))
        ).view(batch, length)

    active = draw(st.booleans())
    masked = active & draw(st.booleans())
    tokens = draw(st.integers(0, V - 2)).masked_fill(masked, MASK)
    step = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch)))
    view = View(tokens, masked, active, step, MASK, 4)
    decision = Decision(
        draw(st.integers(0, V - 2)),
        *(draw(st.booleans()) for _ in range(3)),
        done=torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))),
    )
    result = apply(view, decision, 4)
    had, has = masked.sum(1), result.masked.sum(1)
    assert torch.equal(result.tokens[~active], tokens[~active])
    assert torch.equal((result.tokens == MASK) & active, result.masked)
    assert not (result.masked & ~active).any()
    assert ((has < had) | (had == 0)).all()
    assert not (result.done & (has > 0)).any()
    assert result.done[step + 1 >= 4].all()
    assert not result.invalid.any()
    for row in range(batch):  # each row as it would be alone
        one = slice(row, row + 1)
        alone = apply(
            View(tokens[one], masked[one], active[one], step[one], MASK, 4),
            Decision(
                *(x[one] for x in (decision.tokens, decision.commit)),
                *(x[one] for x in (decision.edit, decision.remask) if x is not None),
                done=None if decision.done is None else decision.done[one],
            ),
            4,
        )
        for name in Advance.__slots__:
            assert torch.equal(getattr(alone, name), getattr(result, name)[one])
