"""Soft parallel decoding, one step at a time, on logits worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scripted import MASK, V, after, logits_of, opened, rows
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.decoding import get_strategy
from dmax.decoding.block import Advance, Decision, Output, View, apply
from dmax.decoding.spd import SoftParallelDecoding, is_confident, is_consistent, prefix
from dmax.errors import InputError
from dmax.params import DecodingParams


def block(tokens: list[int], masked: str, active: str | None = None, step: int = 0) -> View:
    """A block whose positions are masked where `masked` has an `x`."""
    return replace(
        opened((), len(tokens)),
        tokens=torch.tensor([tokens]),
        masked=rows([masked]),
        active=rows([active or "x" * len(tokens)]),
        step=torch.tensor([step]),
    )


def step(
    given: View,
    logits: Tensor,
    threshold: float | None = None,
    stop_confidence: float = 0.9,
    top_k: int = 1,
    **options: Any,
) -> tuple[Decision, Advance]:
    params = DecodingParams(
        "spd", threshold, stop_confidence=stop_confidence, top_k=top_k, options=options
    )
    strategy = get_strategy(params)
    output = Output(logits, MASK)
    assert not output.broken.any()
    decision, _ = strategy.step(given, output, strategy.open(given))
    return decision, apply(given, decision)


# --- promote --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masked", "confidence", "expected"),
    [
        # It ends at the first below the threshold, whatever follows.
        ("xxxxx", [0.9, 0.6, 0.51, 0.4, 0.95], "xxx.."),
        ("xxxxx", [0.4, 0.9, 0.9, 0.9, 0.9], "x...."),  # none qualifies: the leftmost
        ("..xxx", [0.1, 0.1, 0.9, 0.4, 0.9], "..x.."),  # decoded positions do not end the run
        ("x.x.x", [0.9, 0.1, 0.9, 0.1, 0.9], "x.x.x"),
        (".....", [0.9, 0.9, 0.9, 0.9, 0.9], "....."),
    ],
)
def test_the_confident_prefix(masked: str, confidence: list[float], expected: str) -> None:
    assert torch.equal(prefix(rows([masked]), torch.tensor([confidence]), 0.5), rows([expected]))


# --- converge -------------------------------------------------------------------------------------


def test_a11_consistent_needs_every_position_decoded_and_unchanged() -> None:
    masked = rows(["...", "...", "..x", "..x"])
    changed = rows(["...", ".x.", "...", "x.."])
    assert is_consistent(masked, changed).tolist() == [True, False, False, False]


def test_a8_confident_needs_every_position_decoded() -> None:
    active = rows(["xxx", "xxx"])
    masked = rows(["...", "..x"])
    confidence = torch.full((2, 3), 0.99)
    assert is_confident(active, masked, confidence, 0.9).tolist() == [True, False]


def test_confidence_counts_at_active_positions_only() -> None:
    active = rows([".xx", "xxx"])
    masked = rows(["...", "..."])
    confidence = torch.tensor([[0.1, 0.95, 0.95]]).expand(2, -1)
    assert is_confident(active, masked, confidence, 0.9).tolist() == [True, False]


def test_a7_confidence_equal_to_the_bound_stops() -> None:
    active = rows(["xx"])
    masked = rows([".."])
    confidence = torch.full((1, 2), 0.9)
    below = confidence.nextafter(torch.zeros(()))
    for bound in (0.9, torch.tensor([[0.9]])):  # for all, or a row each
        assert is_confident(active, masked, confidence, bound).all()
        assert not is_confident(active, masked, below, bound).any()


# --- a step ---------------------------------------------------------------------------------------


def test_a_step_promotes_revises_and_feeds() -> None:
    given = block([1, MASK, MASK, MASK], ".xxx")
    decision, result = step(given, logits_of([2, 3, 4, 0], [0.4, 0.8, 0.3, 0.9]))
    assert result.tokens.tolist() == [[2, 3, MASK, MASK]]
    assert torch.equal(result.masked, rows(["..xx"]))
    assert not result.done.any()
    assert decision.soft is not None
    assert torch.equal(after(given, result).decoded, rows(["xx.."]))  # what is fed as blends
    torch.testing.assert_close(decision.soft.probs[0, :2, 0], torch.tensor([0.4, 0.8]))
    assert decision.soft.ids[0, :2, 0].tolist() == [2, 3]


def test_a8_never_stops_while_masks_remain() -> None:
    """The published test fires on confidence and leaves masks when the threshold is above it."""
    given = opened((), 4)
    _, result = step(given, logits_of([0, 1, 2, 3], [0.97, 0.92, 0.96, 0.97]), threshold=0.95)
    assert torch.equal(result.masked, rows([".xxx"]))
    assert not result.done.any()


def test_a9_mask_is_never_chosen_but_its_share_lowers_the_confidence() -> None:
    logits = torch.full((1, 2, V), -10.0)
    logits[0, :, MASK] = 10.0
    logits[0, :, 3] = 9.0
    decision, result = step(opened((), 2), logits)
    assert (result.tokens != MASK).sum() == 1  # the leftmost, by fallback
    assert (decision.tokens == 3).all()
    expected = 1 / (1 + torch.tensor(1.0).exp())
    assert decision.confidence is not None
    torch.testing.assert_close(decision.confidence[0, 0], expected)


def test_a10_a_block_ends_after_as_many_steps_as_it_has_positions() -> None:
    given = block([1, 2, 3, MASK], "...x", step=3)
    _, result = step(given, logits_of([0, 1, 2, 3], [0.3] * 4))
    assert result.done.all()
    assert result.capped.all()
    assert not result.masked.any()


def test_a11_consistency_needs_every_mask_gone() -> None:
    _, result = step(block([1, MASK], ".x"), logits_of([1, 2], [0.6, 0.3]))
    assert not result.done.any()  # a promotion is a change
    given = replace(opened((), 2, max_steps=9), tokens=torch.tensor([[1, 2]]), masked=rows([".."]))
    _, result = step(given, logits_of([1, 2], [0.6, 0.3]))
    assert result.done.all()
    assert not result.capped.any()


def test_a16_without_soft_inputs_decoded_tokens_are_still_revised() -> None:
    decision, result = step(block([1, 2], ".."), logits_of([3, 2], [0.3, 0.9]), soft_inputs=False)
    assert decision.soft is None
    assert result.tokens.tolist() == [[3, 2]]
    assert not result.done.any()


def test_one_forward_suffices_when_everything_is_sure() -> None:
    _, result = step(opened((), 3), logits_of([0, 1, 2], [0.95, 0.9, 0.99]))
    assert result.done.all()
    assert result.tokens.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "is_done"),
    [
        ({}, True),
        ({"stop_on_confidence": False}, False),
        ({"stop_confidence": 0.99}, False),
    ],
)
def test_the_confidence_rule_can_be_moved_and_switched_off(
    settings: dict[str, Any], is_done: bool
) -> None:
    _, result = step(opened((), 3), logits_of([0, 1, 2], [0.95] * 3), **settings)
    assert bool(result.done) is is_done


def test_the_prompts_tail_is_never_written_nor_fed_softly() -> None:
    given = opened((1, 2), 4)
    decision, result = step(given, logits_of([4, 4, 4, 4], [0.99] * 4))
    assert result.tokens.tolist() == [[1, 2, 4, 4]]
    assert decision.soft is not None
    assert torch.equal(after(given, result).decoded, rows(["..xx"]))


def test_threshold_zero_promotes_all_with_or_without_the_prefix_rule() -> None:
    logits = logits_of([0, 1, 2, 3], [0.3, 0.9, 0.2, 0.4])
    _, with_rule = step(opened((), 4), logits, threshold=0.0)
    _, without = step(opened((), 4), logits, threshold=0.0, prefix_only=False)
    assert torch.equal(with_rule.tokens, without.tokens)
    assert not with_rule.masked.any()


def test_masks_stay_a_suffix_of_the_block() -> None:
    torch.manual_seed(0)
    given = opened((), 8)
    for _ in range(8):
        _, result = step(given, torch.randn(1, 8, V) * 2, threshold=0.4)
        masked = result.masked[0].int().tolist()
        assert masked == sorted(masked)
        given = after(given, result)
        if result.done.all():
            break
    assert result.done.all()


# --- feed -----------------------------------------------------------------------------------------


def test_top_k_feeds_the_chosen_token_first() -> None:
    decision, _ = step(opened((), 1), logits_of([2], [0.5]), top_k=3)
    assert decision.soft is not None
    assert decision.soft.ids[0, 0, 0] == 2
    assert len(set(decision.soft.ids[0, 0].tolist())) == 3
    assert MASK not in decision.soft.ids
    torch.testing.assert_close(decision.soft.probs[0, 0], torch.tensor([0.5, 0.5 / 7, 0.5 / 7]))


def test_the_prediction_is_fed_at_decoded_positions_only() -> None:
    given = block([5, 6, MASK], "..x", ".xx")
    decision, result = step(given, logits_of([1, 2, 3], [0.5, 0.8, 0.3]))
    soft = decision.soft
    assert soft is not None
    decoded = after(given, result).decoded
    assert torch.equal(decoded, rows([".xx"]))  # position 2 has just been decoded, by fallback
    assert soft.ids.tolist() == [[[1], [2], [3]]]
    torch.testing.assert_close(soft.probs, torch.tensor([[[0.5], [0.8], [0.3]]]))


@pytest.mark.parametrize(
    ("renormalize", "length"), [(True, 0.8 * 3 + 0.2 * 4), (False, (2.4**2 + 0.8**2) ** 0.5)]
)
def test_a17_a_blend_by_hand(renormalize: bool, length: float) -> None:
    """A token of length 3 and a mask of length 4 at right angles, π = 0.8.

    Their blend is (2.4, 0.8); with equation 10 it has the length 3.2.
    """
    table = torch.zeros(V, 2)
    table[2] = torch.tensor([3.0, 0.0])
    table[5] = torch.tensor([1.0, 1.0])
    table[MASK] = torch.tensor([0.0, 4.0])
    given = block([5, MASK, MASK], ".xx", ".xx")
    logits = logits_of([1, 2, 3], [0.5, 0.8, 0.3])
    decision, result = step(given, logits)
    assert decision.soft is not None
    decoded = after(given, result).decoded
    soft = SoftTokens(decoded, decision.soft.ids, decision.soft.probs, renormalize)
    embeds = embed_tokens(lambda ids: table[ids], result.tokens, soft, MASK)[0]
    blend = torch.tensor([2.4, 0.8])
    torch.testing.assert_close(embeds[1], length * blend / blend.norm())
    assert torch.equal(embeds[0], table[5])  # the prompt's tail stays hard
    assert torch.equal(embeds[2], table[MASK])  # a mask stays the pure mask embedding


# --- settings -------------------------------------------------------------------------------------


def test_params_and_options_reach_the_strategy() -> None:
    params = DecodingParams("spd", threshold=0.2, top_k=2, options={"prefix_only": False})
    assert get_strategy(params) == SoftParallelDecoding(2, 0.2, 0.9, prefix_only=False)
    assert get_strategy(DecodingParams("spd")) == SoftParallelDecoding(1, 0.5, 0.9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("soft_inputs", "no"), ("prefix_only", 0), ("renormalize", None), ("stop_on_confidence", 1)],
)
def test_a_switch_is_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        get_strategy(DecodingParams("spd", options={name: value}))
    assert error.value.message == f"`{name}` must be true or false, got {value!r}"


def test_an_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown strategy 'spdd'; choose from auto, "):
        get_strategy(DecodingParams(strategy="spdd"))
