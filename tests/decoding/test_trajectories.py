"""Whole blocks on scripted logits: SPD's properties, and promises that nothing may break.

SPD's properties are those of section 8 in docs/paper.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import EOS, MASK, Step, V, after, embed, logits_of, noise_of, opened, play
from torch import Tensor

from dmax.decoding import get_strategy, strategies
from dmax.decoding.block import Advance, Decision, Output, State, View, apply, predict
from dmax.decoding.strategy import Strategy
from dmax.params import DecodingParams

L = 6
INF = float("inf")


def spd(threshold: float | None = None, top_k: int = 1, **options: bool) -> DecodingParams:
    return DecodingParams("spd", threshold, top_k=top_k, options=options)


def changing(seed: int, batch: int = 1, scale: float = 3.0) -> Tensor:
    """Logits [L + 1, B, L, V] that change at every step, so that no block settles by itself."""
    return scale * torch.randn(L + 1, batch, L, V, generator=torch.Generator().manual_seed(seed))


def trajectory(steps: list[Step]) -> list[Any]:
    return [step.advance.tokens.tolist() for step in steps]


# --- SPD ------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    tail=st.integers(0, L - 1),
)
def test_masks_are_always_a_suffix_and_every_step_promotes(
    seed: int, threshold: float, tail: int
) -> None:
    script = changing(seed)
    for step in play(spd(threshold), lambda n, view: script[n], opened([1] * tail, L)):
        before = step.view.masked[0]
        masked = step.advance.masked[0].int()
        assert (masked.diff() >= 0).all()
        assert not before.any() or masked.sum() < before.sum()
        assert not step.advance.forced.any()


@given(seed=st.integers(0, 1000))
def test_a15_at_threshold_zero_the_prefix_rule_makes_no_difference(seed: int) -> None:
    script = changing(seed)
    runs = [
        play(spd(0.0, prefix_only=on), lambda n, view: script[n], opened([1], L))
        for on in (True, False)
    ]
    assert not runs[0][0].advance.masked.any()
    assert trajectory(runs[0]) == trajectory(runs[1])


def test_a10_a_threshold_out_of_reach_decodes_left_to_right_in_as_many_steps_as_positions() -> None:
    logits = logits_of([1, 2, 3, 4, 5, 0], [0.6] * L)
    steps = play(spd(0.99), lambda n, view: logits, opened((), L))
    assert [int(step.advance.masked.sum()) for step in steps] == [5, 4, 3, 2, 1, 0]
    assert steps[-1].advance.capped.all()  # no step was left to look again


def test_a8_never_stops_while_masks_remain() -> None:
    """The published code stops at once with four masks left.

    All are over 0.9, yet 0.92 ends the prefix.
    """
    confidence = [0.97, 0.96, 0.92, 0.97, 0.97, 0.93]
    logits = logits_of([1, 2, 3, 4, 5, 0], confidence)
    steps = play(spd(0.95), lambda n, view: logits, opened((), L))
    assert [int(step.advance.masked.sum()) for step in steps] == [4, 3, 1, 0]
    assert trajectory(steps)[-1] == [[1, 2, 3, 4, 5, 0]]


def test_sure_blocks_take_one_forward_and_settled_ones_one_more_than_they_need() -> None:
    for confidence, forwards in ((0.95, 1), (0.6, 2)):
        logits = logits_of([1, 2, 3, 4, 5, 0], [confidence] * L)
        steps = play(spd(), lambda n, view, logits=logits: logits, opened((), L))
        assert len(steps) == forwards
        assert not steps[-1].advance.capped.any()


def test_unsure_revisions_are_made_and_the_block_waits_for_them_to_settle() -> None:
    script = [
        logits_of([1, 2], [0.6, 0.6]),
        logits_of([1, 3], [0.6, 0.3]),  # below the threshold, written all the same
        logits_of([1, 3], [0.6, 0.3]),
    ]
    steps = play(spd(), lambda n, view: script[n], opened((), 2, max_steps=9))
    assert trajectory(steps) == [[[1, 2]], [[1, 3]], [[1, 3]]]


@pytest.mark.parametrize("soft_inputs", [True, False])
def test_a16_soft_or_hard_inputs_decide_alike_on_the_same_logits(soft_inputs: bool) -> None:
    script = changing(3)
    steps = play(spd(soft_inputs=soft_inputs), lambda n, view: script[n], opened([1], L))
    usual = play(spd(), lambda n, view: script[n], opened([1], L))
    assert trajectory(steps) == trajectory(usual)
    assert all((step.decision.soft is not None) is soft_inputs for step in steps)


@given(seed=st.integers(0, 1000), top_k=st.sampled_from([1, 3]))
def test_a12_soft_inputs_follow_what_is_decoded_after_the_step(seed: int, top_k: int) -> None:
    script = changing(seed)
    for step in play(spd(top_k=top_k), lambda n, view: script[n], opened([1, 2], L)):
        soft = step.decision.soft
        assert soft is not None
        if not step.advance.capped.any():
            decoded = step.view.active & ~step.advance.masked
            assert torch.equal(soft.tokens[decoded], step.advance.tokens[decoded])
        assert (soft.probs.sum(dim=-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize(
    ("rules", "forwards"),
    [({"stop_on_consistency": False}, L), ({"stop_on_confidence": False}, 2), ({}, 2)],
)
def test_stop_rules_can_be_switched_off(rules: dict[str, bool], forwards: int) -> None:
    logits = logits_of([1, 2, 3, 4, 5, 0], [0.6] * L)
    assert len(play(spd(**rules), lambda n, view: logits, opened((), L))) == forwards


# --- promises -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hostile(Strategy):
    """Promotes nothing or everything, tries to undo and overwrite all it can, and lies."""

    name: ClassVar[str] = "hostile"

    kind: str

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        tokens = predict(view, output).tokens
        every = torch.ones_like(view.masked)
        if self.kind == "mask":
            tokens = torch.full_like(tokens, MASK)
        decision = Decision(
            tokens,
            promote=every if self.kind in ("vandal", "mask") else ~every,
            revise=every,
            remask=every if self.kind != "mask" else None,
            done=torch.full_like(view.step, self.kind == "liar", dtype=torch.bool),
        )
        return decision, state


def hostile_scripts() -> st.SearchStrategy[Tensor]:
    values = st.sampled_from([0.0, 1.0, -1.0, 30.0, 3e38, INF, -INF])
    random = st.integers(0, 1000).map(lambda seed: changing(seed, batch=3))
    drawn = st.lists(values, min_size=3 * L * V, max_size=3 * L * V).map(
        lambda flat: torch.tensor(flat).view(1, 3, L, V).repeat(L + 1, 1, 1, 1)
    )
    mask_wins = random.map(lambda script: script.index_fill(-1, torch.tensor(MASK), INF))
    eos_first = random.map(lambda script: script.index_fill(-1, torch.tensor(EOS), 50.0))
    flat = st.sampled_from([0.0, INF, -INF]).map(lambda value: torch.full((L + 1, 3, L, V), value))
    return st.one_of(random, drawn, mask_wins, eos_first, flat)


PARAMS = st.builds(
    DecodingParams,
    strategy=st.sampled_from(strategies()),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([1, 3, V + 1]),
    options=st.fixed_dictionaries({"prefix_only": st.booleans()}),
)
STRATEGIES = st.one_of(PARAMS, st.sampled_from(["idler", "liar", "vandal"]).map(Hostile))
HAS_PREFIX_RULE = ("spd", "mbd")

Needed = dict[str, dict[str, str]]


def ready(drawn: DecodingParams | Hostile, needed: Needed) -> Strategy:
    """The strategy, with the options that it has and those that it cannot do without."""
    if isinstance(drawn, Hostile):
        return drawn
    options = dict(drawn.options) if drawn.strategy in HAS_PREFIX_RULE else {}
    return get_strategy(replace(drawn, options=options | needed[drawn.strategy]))


@settings(max_examples=150)
@given(
    script=hostile_scripts(),
    drawn=STRATEGIES,
    tail=st.lists(st.integers(0, V - 1), max_size=L - 1),
)
def test_any_strategy_on_any_logits_ends_in_time_without_mask(
    needed: Needed, script: Tensor, drawn: DecodingParams | Hostile, tail: list[int]
) -> None:
    steps = play(ready(drawn, needed), lambda n, view: script[n], opened(tail, L, batch=3))
    final = steps[-1].advance
    assert len(steps) <= L
    assert not final.masked.any()
    assert (final.tokens[:, len(tail) :] != MASK).all()
    assert (final.tokens[:, : len(tail)] == torch.tensor(tail, dtype=torch.long)).all()
    assert not any(step.advance.invalid.any() for step in steps)


@settings(max_examples=60)
@given(script=hostile_scripts(), drawn=STRATEGIES, temperature=st.sampled_from([0.0, 0.7]))
def test_rows_are_bit_for_bit_what_they_are_alone(
    needed: Needed, script: Tensor, drawn: DecodingParams | Hostile, temperature: float
) -> None:
    strategy = ready(drawn, needed)

    def three_steps(rows: slice) -> tuple[Decision, Advance]:
        num_rows = rows.stop - rows.start
        own = noise_of([temperature] * num_rows, L, rows.start) if temperature else None
        view = opened([1], L, batch=num_rows, noise=own)
        state = strategy.open(view)
        for n in range(3):
            output = Output(script[n, rows], MASK, hidden_states=embed(view.tokens))
            decision, state = strategy.step(view, output, state)
            advance = apply(view, decision)
            view = replace(after(view, advance), noise=own)
        return decision, advance

    together, end = three_steps(slice(0, 3))
    for row in range(3):
        one = slice(row, row + 1)
        alone, alone_end = three_steps(one)
        for name in ("tokens", "masked", "done"):
            assert torch.equal(getattr(alone_end, name), getattr(end, name)[one])
        assert torch.equal(alone.tokens, together.tokens[one])
        if alone.confidence is not None and together.confidence is not None:
            assert torch.equal(alone.confidence, together.confidence[one])


@settings(max_examples=60)
@given(script=hostile_scripts(), drawn=PARAMS)
def test_numbers_for_every_row_decide_as_numbers_for_all(
    needed: Needed, script: Tensor, drawn: DecodingParams
) -> None:
    """In the engine a number is a column with a value for every sequence."""
    strategy = ready(drawn, needed)
    columns = {name: torch.full((3, 1), value) for name, value in strategy.numbers().items()}
    view = opened([1], L, batch=3)
    one = play(strategy, lambda n, view: script[n], view)
    other = play(strategy.with_numbers(columns), lambda n, view: script[n], view)
    assert trajectory(one) == trajectory(other)
    for first, second in zip(one, other, strict=True):
        # Powers of a column round differently from powers of a number (`credit`).
        torch.testing.assert_close(first.decision.confidence, second.decision.confidence)


@pytest.mark.parametrize("name", ["spd", "threshold"])
def test_nan_is_reported_and_never_raises_here(name: str) -> None:
    """The engine turns `broken` into an error; until then everything must hold."""
    logits = torch.full((1, L, V), torch.nan)
    assert Output(logits, MASK).broken.all()
    steps = play(DecodingParams(strategy=name), lambda n, view: logits, opened([1], L))
    assert not steps[-1].advance.masked.any()


def test_proposing_mask_is_reported_at_once() -> None:
    view = opened([1], L)
    output = Output(torch.zeros(1, L, V), MASK)
    decision, _ = Hostile("mask").step(view, output, {})
    assert apply(view, decision).invalid.all()
