"""The baselines on numbers worked out by hand, and their settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripted import MASK, TABLE, Step, V, logits_of, opened, play, rows
from torch import Tensor

from dmax.baselines.sched import ScheduledExit, mean_margin
from dmax.decoding import get_strategy, strategies
from dmax.decoding.block import Output
from dmax.errors import InputError
from dmax.params import DecodingParams

FOUR = logits_of([1, 2, 3, 4], [0.5, 0.95, 0.7, 0.92])


def decoded(steps: list[Step]) -> list[int]:
    """How many masks each step decoded."""
    return [int((step.view.masked & ~step.advance.masked).sum()) for step in steps]


def run(
    logits: Tensor | Callable[[int], Tensor], length: int, tail: tuple[int, ...] = (), **params: Any
) -> list[Step]:
    """Play a block on the same logits at every step, or on `logits(step)`."""
    script = logits if callable(logits) else lambda n: logits
    return play(DecodingParams(**params), lambda n, view: script(n), opened(tail, length))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"strategy": "autoregressive"}, [1, 1, 1, 1]),
        ({"strategy": "llada"}, [1, 1, 1, 1]),
        ({"strategy": "llada", "options": {"steps": 3}}, [2, 1, 1]),
        ({"strategy": "llada", "options": {"steps": 1}}, [4]),
        ({"strategy": "fast_dllm"}, [2, 1, 1]),
        ({"strategy": "fast_dllm", "threshold": 0.49}, [4]),
        ({"strategy": "fast_dllm_factor"}, [2, 1, 1]),  # 4 (0.3) > 1; then 3 (0.5) > 1
        ({"strategy": "hierarchy"}, [2, 2]),  # 0.95 and 0.92; then the runs {0} and {2}
        ({"strategy": "hierarchy", "options": {"low": 0.6}}, [2, 1, 1]),
        ({"strategy": "dparallel", "threshold": 0.0}, [1, 1, 1, 1]),
        ({"strategy": "dparallel", "threshold": 1.0}, [2, 1, 1]),
        # One more forward that edits nothing.
        ({"strategy": "joint_threshold", "threshold": 0.9}, [2, 1, 1, 0]),
        (
            {"strategy": "joint_threshold", "threshold": 0.9, "options": {"edit_threshold": None}},
            [2, 1, 1],
        ),
    ],
)
def test_how_many_are_decoded_at_each_step(params: dict[str, Any], expected: list[int]) -> None:
    assert decoded(run(FOUR, 4, **params)) == expected


def test_autoregressive_decoding_goes_from_left_to_right() -> None:
    steps = run(FOUR, 4, (7,), strategy="autoregressive")
    masked = [step.advance.masked for step in steps]
    assert torch.equal(torch.cat(masked), rows(["..xx", "...x", "...."]))


# --- llada ----------------------------------------------------------------------------------------


def test_llada_spreads_the_rest_over_the_first_steps() -> None:
    logits = logits_of([1] * 7, [0.5] * 7)
    assert decoded(run(logits, 7, strategy="llada", options={"steps": 4})) == [2, 2, 2, 1]
    assert decoded(run(logits, 7, (1, 2), strategy="llada", options={"steps": 4})) == [2, 1, 1, 1]


# --- joint_threshold ------------------------------------------------------------------------------


def test_joint_threshold_edits_what_it_is_sure_is_wrong() -> None:
    script = [
        logits_of([1, 2, 3], [0.96, 0.96, 0.6]),
        logits_of([4, 5, 3], [0.95, 0.80, 0.97]),  # the first is edited, the second not sure enough
        logits_of([4, 2, 3], [0.95, 0.95, 0.97]),
    ]
    steps = run(lambda n: script[min(n, 2)], 3, strategy="joint_threshold")
    assert [step.advance.tokens[0].tolist() for step in steps] == [
        [1, 2, MASK],
        [4, 2, 3],
        [4, 2, 3],
    ]


def test_joint_threshold_gives_up_after_its_post_steps() -> None:
    # It changes its mind for ever.
    script = [logits_of([1, 2], [0.97, 0.97]), logits_of([2, 1], [0.97, 0.97])]
    params = DecodingParams(strategy="joint_threshold", options={"post_steps": 3})
    steps = play(params, lambda n, view: script[n % 2], opened((), 2, max_steps=20))
    assert len(steps) == 1 + 3
    assert not steps[-1].advance.capped.any()
    assert get_strategy(params).extra_steps == 3
    off = get_strategy(DecodingParams(strategy="joint_threshold", options={"edit_threshold": None}))
    assert off.extra_steps == 0


# --- credit ---------------------------------------------------------------------------------------


def test_credit_follows_its_equations() -> None:
    """A position whose favourite is token 1 twice, then token 2, while the others keep theirs.

    The credits by hand are in the dense form, with a number for every token.
    """
    alpha = 0.7
    decay = 0.8
    power = 0.2
    script = [
        logits_of([1, 5, 6], [0.5, 0.3, 0.3]),
        logits_of([1, 5, 6], [0.4, 0.3, 0.3]),
        logits_of([2, 5, 6], [0.4, 0.3, 0.3]),
    ]
    strategy = get_strategy(DecodingParams(strategy="credit", threshold=1.0))
    view = opened((), 3)
    state = strategy.open(view)
    credit = torch.zeros(V)
    for n, logits in enumerate(script):
        output = Output(logits, MASK)
        decision, state = strategy.step(replace(view, step=view.step + n), output, state)
        best = int(output.logits[0, 0].argmax())
        credit = decay * credit
        credit[best] += float(output.probs[0, 0, best]) ** power
        raised = (logits[0, 0] + alpha * credit.log1p()).softmax(-1)
        assert decision.confidence is not None
        torch.testing.assert_close(decision.confidence[0, 0], raised[:MASK].max())
        assert decision.tokens[0, 0] == raised[:MASK].argmax()


def test_credit_never_goes_to_mask() -> None:
    logits = logits_of([MASK], [0.9])
    state = run(logits, 1, strategy="credit")
    assert state[-1].advance.tokens.tolist() == [[0]]


# --- sched ----------------------------------------------------------------------------------------


def test_sched_leaves_once_the_margin_reaches_the_bound() -> None:
    def clear(margin: float) -> Tensor:
        logits = torch.zeros(1, 3, V)
        logits[..., 2] = margin
        return logits

    options = {"high": 8.0, "low": 2.0, "schedule": "linear"}  # over 3 steps the bound is 8, 5, 2
    assert decoded(run(clear(8.1), 3, strategy="sched", options=options)) == [3]
    assert decoded(run(clear(5.1), 3, strategy="sched", options=options)) == [1, 2]
    assert decoded(run(clear(1.9), 3, strategy="sched", options=options)) == [1, 1, 1]
    steady = {**options, "steady": True}
    # There is no step before the first.
    assert decoded(run(clear(8.1), 3, strategy="sched", options=steady)) == [1, 2]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [7.5, 5.0, 2.5]),
        ("linear", [7.5, 5.0, 2.5]),
        ("exponential", [7.5, 2.5 + 5 * math.exp(-2), 2.5 + 5 * math.exp(-4)]),
    ],
)
def test_sched_bounds(schedule: Any, expected: list[float]) -> None:
    bound = ScheduledExit(schedule=schedule).bound(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(bound, torch.tensor(expected))


def test_the_mean_margin_is_over_masks() -> None:
    logits = torch.tensor([[[5.0, 1.0, 0.0], [3.0, 2.0, 0.0], [9.0, 0.0, 0.0]]])
    torch.testing.assert_close(mean_margin(logits, rows(["xx."])), torch.tensor([[2.5]]))
    assert mean_margin(logits, rows(["..."])).item() == 0


# --- iter_smooth ----------------------------------------------------------------------------------


def test_iter_smooth_feeds_masks_with_their_expectation() -> None:
    logits = logits_of([1, 2], [1.0, 0.6])
    first = run(logits, 2, strategy="iter_smooth")[0]
    assert first.advance.masked.tolist() == [[False, True]]
    assert first.decision.embeds is not None
    torch.testing.assert_close(first.decision.embeds[0, 0], TABLE[1])
    expected = TABLE[MASK] + 0.15 * (logits[0, 1].softmax(-1) @ TABLE)
    torch.testing.assert_close(first.decision.embeds[0, 1], expected)


def test_iter_smooth_grows_more_lenient_from_step_to_step() -> None:
    logits = logits_of([1] * 4, [0.97] * 4)  # bounds 1, 0.98, 0.96
    assert decoded(run(logits, 4, strategy="iter_smooth")) == [1, 1, 2]


def test_iter_smooth_needs_embeddings() -> None:
    strategy = get_strategy(DecodingParams(strategy="iter_smooth"))
    view = replace(opened((), 4), embed=None)
    with pytest.raises(InputError, match="feeds mixtures of embeddings and was given none"):
        strategy.step(view, Output(FOUR, MASK), {})


# --- float64 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", sorted(set(strategies()) - {"demask", "learn2pd"}))
def test_every_method_decodes_float64_as_float32(strategy: str) -> None:
    def tokens(dtype: torch.dtype) -> list[list[int]]:
        return [
            step.advance.tokens.tolist()[0]
            for step in run(FOUR.to(dtype), 4, (), strategy=strategy)
        ]

    assert tokens(torch.float64) == tokens(torch.float32)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (
            "credit",
            {"alfa": 1},
            "strategy `credit` has no option `alfa`; it has only alpha, decay, power",
        ),
        ("threshold", {"x": 1}, "strategy `threshold` has no option `x`; it has none"),
        ("spd", {"threshold": 1}, "strategy `spd` has no option `threshold`"),
        ("credit", {"decay": 2}, "`decay` must be a number between 0 and 1, got 2"),
        ("llada", {"steps": 0}, "`steps` must be a whole number of at least 1, got 0"),
        ("fast_dllm_factor", {"factor": -1}, "`factor` must be"),
        ("hierarchy", {"low": "x"}, "`low` must be"),
        ("entropy_bound", {"bound": -0.1}, "`bound` must be"),
        (
            "sched",
            {"schedule": "step"},
            "`schedule` must be one of cosine, linear, exponential, got 'step'",
        ),
        ("sched", {"high": 1.0}, "`high` must be a number of at least 2.5, got 1.0"),
        ("joint_threshold", {"post_steps": 1.5}, "`post_steps` must be a whole number"),
        ("iter_smooth", {"weight": -1}, "`weight` must be"),
        ("d2f", {"blocks": 0}, "`blocks` must be a whole number between 1 and 64, got 0"),
        ("mbd", {"opens_at": 2}, "`opens_at` must be a number between 0 and 1, got 2"),
        ("lopa", {"num_branches": 0}, "`num_branches` must be"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    strategy: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        get_strategy(DecodingParams(strategy=strategy, options=options))
    assert message in error.value.message
