"""Soft parallel decoding, one step at a time, on logits worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmax.decoding import get_strategy, strategies
from dmax.decoding.block import Advance, Decision, Output, View, apply
from dmax.decoding.spd import SoftParallelDecoding
from dmax.errors import InputError
from dmax.params import DecodingParams

V, MASK = 6, 5


def view(
    tokens: list[int], masked: list[int], active: list[int] | None = None, step: int = 0
) -> View:
    return View(
        tokens=torch.tensor([tokens]),
        masked=torch.tensor([masked], dtype=torch.bool),
        active=torch.tensor([active or [1] * len(tokens)], dtype=torch.bool),
        step=torch.tensor([step]),
        mask_token_id=MASK,
        max_steps=len(tokens),
    )


def logits(tokens: list[int], confidences: list[float]) -> Tensor:
    """Logits [1, L, V] whose argmax and probability are the given ones; MASK gets next to nothing."""
    rows = []
    for token, confidence in zip(tokens, confidences, strict=True):
        probs = torch.full((V,), (1 - confidence) / (V - 2))
        probs[token], probs[MASK] = confidence, 1e-9
        rows.append(probs.log())
    return torch.stack(rows)[None]


def step(given: View, raw: Tensor, **settings: Any) -> tuple[Decision, Advance]:
    strategy = get_strategy(DecodingParams(**settings))
    output = Output(raw, MASK)
    broken = output.broken
    assert not broken.any()
    decision, _ = strategy.step(given, output, strategy.open(given))
    return decision, apply(given, decision, given.max_steps)


def test_a_step_promotes_revises_and_feeds() -> None:
    given = view([1, MASK, MASK, MASK], [0, 1, 1, 1])
    decision, after = step(given, logits([2, 3, 4, 0], [0.4, 0.8, 0.3, 0.9]))
    assert after.tokens.tolist() == [[2, 3, MASK, MASK]]
    assert after.masked.tolist() == [[False, False, True, True]]
    assert not after.done.any()
    assert decision.soft is not None
    assert decision.soft.where.tolist() == [[True, True, False, False]]
    torch.testing.assert_close(decision.soft.probs[0, :2, 0], torch.tensor([0.4, 0.8]))
    assert decision.soft.ids[0, :2, 0].tolist() == [2, 3]


def test_a8_never_stops_while_masks_remain() -> None:
    """The published test fires on confidence alone and leaves masks behind when the threshold is above it."""
    given = view([MASK] * 4, [1] * 4)
    _, after = step(given, logits([0, 1, 2, 3], [0.97, 0.92, 0.96, 0.97]), threshold=0.95)
    assert after.masked.tolist() == [[False, True, True, True]]
    assert not after.done.any()


def test_a9_mask_is_never_chosen_but_its_share_lowers_the_confidence() -> None:
    given = view([MASK] * 2, [1] * 2)
    raw = torch.full((1, 2, V), -10.0)
    raw[0, :, MASK], raw[0, :, 3] = 10.0, 9.0
    decision, after = step(given, raw)
    assert (after.tokens != MASK).sum() == 1  # the leftmost, by fallback
    assert (decision.tokens == 3).all()
    expected = 1 / (1 + torch.tensor(1.0).exp())
    assert decision.confidence is not None
    torch.testing.assert_close(decision.confidence[0, 0], expected)


def test_a10_a_block_ends_after_as_many_steps_as_it_has_positions() -> None:
    given = view([1, 2, 3, MASK], [0, 0, 0, 1], step=3)
    _, after = step(given, logits([0, 1, 2, 3], [0.3] * 4))
    assert after.done.all()
    assert after.capped.all()
    assert not after.masked.any()


def test_a11_consistency_needs_every_mask_gone() -> None:
    given = view([1, MASK], [0, 1])
    _, after = step(given, logits([1, 2], [0.6, 0.3]))
    assert not after.done.any()  # a promotion is a change
    given = view([1, 2], [0, 0], step=1)
    _, after = step(given, logits([1, 2], [0.6, 0.3]))
    assert after.done.all()
    assert not after.capped.any()


def test_a16_without_soft_inputs_decoded_tokens_are_still_revised() -> None:
    decision, after = step(view([1, 2], [0, 0]), logits([3, 2], [0.3, 0.9]), soft_inputs=False)
    assert decision.soft is None
    assert after.tokens.tolist() == [[3, 2]]
    assert not after.done.any()


def test_one_forward_suffices_when_everything_is_sure() -> None:
    _, after = step(view([MASK] * 3, [1] * 3), logits([0, 1, 2], [0.95, 0.9, 0.99]))
    assert after.done.all()
    assert after.tokens.tolist() == [[0, 1, 2]]


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
    _, after = step(view([MASK] * 3, [1] * 3), logits([0, 1, 2], [0.95] * 3), **settings)
    assert bool(after.done) is is_done


def test_the_prompts_tail_is_never_written_nor_fed_softly() -> None:
    given = view([1, 2, MASK, MASK], [0, 0, 1, 1], active=[0, 0, 1, 1])
    decision, after = step(given, logits([4, 4, 4, 4], [0.99] * 4))
    assert after.tokens.tolist() == [[1, 2, 4, 4]]
    assert decision.soft is not None
    assert decision.soft.where.tolist() == [[False, False, True, True]]


def test_threshold_zero_promotes_all_with_or_without_the_prefix_rule() -> None:
    given = view([MASK] * 4, [1] * 4)
    raw = logits([0, 1, 2, 3], [0.3, 0.9, 0.2, 0.4])
    with_rule, without = (
        step(given, raw, threshold=0.0),
        step(given, raw, threshold=0.0, prefix_only=False),
    )
    assert torch.equal(with_rule[1].tokens, without[1].tokens)
    assert not with_rule[1].masked.any()


def test_masks_stay_a_suffix_of_the_block() -> None:
    torch.manual_seed(0)
    given = view([MASK] * 8, [1] * 8)
    for count in range(8):
        _, after = step(given, torch.randn(1, 8, V) * 2, threshold=0.4)
        masked = after.masked[0].int().tolist()
        assert masked == sorted(masked)
        given = view(after.tokens[0].tolist(), masked, step=count + 1)
        if after.done.all():
            break
    assert after.done.all()


def test_top_k_feeds_the_chosen_token_first() -> None:
    decision, _ = step(view([MASK], [1]), logits([2], [0.5]), top_k=3)
    assert decision.soft is not None
    assert decision.soft.ids[0, 0, 0] == 2
    assert len(set(decision.soft.ids[0, 0].tolist())) == 3
    assert MASK not in decision.soft.ids
    torch.testing.assert_close(decision.soft.probs[0, 0], torch.tensor([0.5, 0.125, 0.125]))


def test_params_reach_the_strategy() -> None:
    strategy = get_strategy(DecodingParams(threshold=0.2, top_k=2, prefix_only=False))
    assert isinstance(strategy, SoftParallelDecoding)
    assert (strategy.threshold, strategy.top_k, strategy.prefix_only) == (0.2, 2, False)
    default = get_strategy(DecodingParams())
    assert isinstance(default, SoftParallelDecoding)
    assert (default.threshold, default.stop_confidence, default.top_k) == (0.5, 0.9, 1)
    assert {"spd", "threshold"} <= set(strategies())


def test_an_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown strategy 'spdd'; choose from autoregressive, "):
        get_strategy(DecodingParams(strategy="spdd"))
