"""The rivals' rules on numbers worked out by hand, and their settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import MASK, TABLE, Step, V, logits_of, opened, play, rows
from torch import Tensor

from dmax.decoding import get_strategy, selection, strategies
from dmax.decoding.block import Output
from dmax.decoding.lopa import Lookahead
from dmax.decoding.sched import ScheduledExit, mean_margin
from dmax.errors import InputError
from dmax.params import DecodingParams

LINES = st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=32)), min_size=1, max_size=12)


def decoded(steps: list[Step]) -> list[int]:
    """How many masks each step decoded."""
    return [int((step.view.masked & ~step.advance.masked).sum()) for step in steps]


def run(logits: Any, length: int, tail: tuple[int, ...] = (), **params: Any) -> list[Step]:
    """Play a block on the same logits at every step, or on `logits(step)`."""
    script = logits if callable(logits) else lambda n: logits
    return play(DecodingParams(**params), lambda n, view: script(n), opened(tail, length))


# --- selection ------------------------------------------------------------------------------------


@given(line=LINES, count=st.integers(0, 13))
def test_top_takes_the_most_confident(line: list[tuple[bool, float]], count: int) -> None:
    masked, score = torch.tensor([[m for m, _ in line]]), torch.tensor([[c for _, c in line]])
    ranked = sorted((i for i, (m, _) in enumerate(line) if m), key=lambda i: (-line[i][1], i))
    expected = set(ranked[: max(count, 1)])
    assert (
        set(selection.top(masked, score, torch.tensor([count]))[0].nonzero().flatten().tolist())
        == expected
    )


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
    assert torch.equal(
        selection.within_error(masked, torch.tensor([confidence]), factor), rows([expected])
    )


@given(line=LINES, factor=st.floats(0, 3))
def test_factor_rule_equals_a_loop(line: list[tuple[bool, float]], factor: float) -> None:
    masked, confidence = torch.tensor([[m for m, _ in line]]), torch.tensor([[c for _, c in line]])
    ranked = sorted(
        (i for i, (m, _) in enumerate(line) if m), key=lambda i: (-confidence[0, i].item(), i)
    )
    count = 0
    while count < len(ranked) and confidence[0, ranked[count]] >= torch.tensor(
        1 - factor / (count + 2)
    ):
        count += 1
    expected = set(ranked[: max(count, 1)])
    assert (
        set(selection.within_error(masked, confidence, factor)[0].nonzero().flatten().tolist())
        == expected
    )


@pytest.mark.parametrize(
    ("masked", "confidence", "expected"),
    [
        ("xxx.xx", [0.2, 0.5, 0.4, 0.9, 0.1, 0.3], ".x...x"),
        (
            "x.x.xx",
            [0.2, 0.9, 0.4, 0.9, 0.3, 0.3],
            "x.x.x.",
        ),  # equals: the leftmost of its run alone
        ("......", [0.9] * 6, "......"),
        ("xxxxxx", [0.0] * 6, "x....."),
    ],
)
def test_run_maxima(masked: str, confidence: list[float], expected: str) -> None:
    assert torch.equal(
        selection.run_maxima(rows([masked]), torch.tensor([confidence])), rows([expected])
    )


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


def test_entropy_leaves_mask_out() -> None:
    output = Output(logits_of([1, MASK], [1 / V, 0.9]), MASK)
    expected = torch.full((1, 2), math.log(V - 1))  # the others are equals
    torch.testing.assert_close(selection.entropy(output.logits), expected)


# --- strategies -----------------------------------------------------------------------------------

FOUR = logits_of([1, 2, 3, 4], [0.5, 0.95, 0.7, 0.92])


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
        (
            {"strategy": "joint_threshold", "threshold": 0.9},
            [2, 1, 1, 0],
        ),  # one more forward that edits nothing
        (
            {"strategy": "joint_threshold", "threshold": 0.9, "options": {"edit_threshold": None}},
            [2, 1, 1],
        ),
    ],
)
def test_how_many_are_decoded_at_each_step(params: dict[str, Any], expected: list[int]) -> None:
    assert decoded(run(FOUR, 4, **params)) == expected


def test_llada_spreads_the_rest_over_the_first_steps() -> None:
    logits = logits_of([1] * 7, [0.5] * 7)
    assert decoded(run(logits, 7, strategy="llada", options={"steps": 4})) == [2, 2, 2, 1]
    assert decoded(run(logits, 7, (1, 2), strategy="llada", options={"steps": 4})) == [2, 1, 1, 1]


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
    script = [
        logits_of([1, 2], [0.97, 0.97]),
        logits_of([2, 1], [0.97, 0.97]),
    ]  # changes its mind for ever
    params = DecodingParams(strategy="joint_threshold", options={"post_steps": 3})
    steps = play(params, lambda n, view: script[n % 2], opened((), 2, max_steps=20))
    assert len(steps) == 1 + 3
    assert not steps[-1].advance.capped.any()
    assert get_strategy(params).extra_steps == 3  # type: ignore[attr-defined]
    off = get_strategy(DecodingParams(strategy="joint_threshold", options={"edit_threshold": None}))
    assert off.extra_steps == 0  # type: ignore[attr-defined]


def test_credit_follows_its_equations() -> None:
    """One masked position whose favourite is token 1 twice, then token 2: credits by hand, in the dense form."""
    alpha, decay, power = 0.7, 0.8, 0.2
    script = [logits_of([1], [0.5]), logits_of([1], [0.4]), logits_of([2], [0.4])]
    params = DecodingParams(strategy="credit", threshold=1.0)
    strategy = get_strategy(params)
    view = opened((), 1, max_steps=4)
    state, credit = strategy.open(view), torch.zeros(V)
    for n, logits in enumerate(script):
        output = Output(logits, MASK)
        view_now = opened((), 1, max_steps=4)
        view_now.step[:] = n
        decision, state = strategy.step(view_now, output, state)
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
    assert decoded(run(clear(8.1), 3, strategy="sched", options=steady)) == [
        1,
        2,
    ]  # there is no step before the first


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [7.5, 5.0, 2.5]),
        ("linear", [7.5, 5.0, 2.5]),
        ("exponential", [7.5, 2.5 + 5 * math.exp(-2), 2.5 + 5 * math.exp(-4)]),
    ],
)
def test_sched_bounds(schedule: Any, expected: list[float]) -> None:
    bound = ScheduledExit(schedule=schedule).bound(torch.tensor([0, 2, 4]), 5)
    torch.testing.assert_close(bound, torch.tensor(expected))


def test_mean_margin_is_over_masks() -> None:
    logits = torch.tensor([[[5.0, 1.0, 0.0], [3.0, 2.0, 0.0], [9.0, 0.0, 0.0]]])
    torch.testing.assert_close(mean_margin(logits, rows(["xx."])), torch.tensor([2.5]))
    assert mean_margin(logits, rows(["..."])).item() == 0


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


# --- windows and branches -------------------------------------------------------------------------


def test_what_need_not_progress_may_wait() -> None:
    masked, confidence = rows(["xxxx", "xxxx", "xxxx"]), torch.tensor([[0.5, 0.95, 0.7, 0.92]] * 3)
    forced = torch.tensor([True, False, False])
    assert torch.equal(
        selection.above(masked, confidence, 0.99, forced), rows([".x..", "....", "...."])
    )
    assert torch.equal(selection.above(masked, confidence, 0.9, forced), rows([".x.x"] * 3))
    assert torch.equal(
        selection.prefix(masked, confidence, 0.9, forced), rows(["x...", "....", "...."])
    )
    assert torch.equal(selection.prefix(masked, confidence, 0.5, forced), rows(["xxxx"] * 3))


def test_lopa_branches_on_the_surest_masks() -> None:
    strategy = Lookahead(threshold=0.9, num_branches=4)
    output = Output(FOUR, MASK)
    branches = strategy.branch(rows(["x.xx"]), output)
    assert torch.equal(branches, rows(["...x", "..x.", "x..."])[None])
    assert torch.equal(
        strategy.branch(rows([".x.."]), output), rows([".x..", "....", "...."])[None]
    )


def test_lopa_chooses_the_version_that_is_surest_on_average() -> None:
    strategy = Lookahead(threshold=0.9, num_branches=3)
    logits = torch.cat(
        (
            logits_of([1, 2, 3, 4], [0.9, 0.6, 0.6, 0.6]),  # masks at 1 to 3: 0.6 on average
            logits_of([1, 2, 3, 4], [0.9, 0.9, 0.7, 0.5]),  # 2 and 3: 0.6
            logits_of([1, 2, 3, 4], [0.1, 0.9, 0.1, 0.7]),  # 3: 0.7
        )
    )
    view = replace(opened((), 4, batch=3), masked=rows([".xxx", "..xx", "...x"]))
    assert strategy.choose(view, Output(logits, MASK)).tolist() == [2]
    view = replace(view, masked=rows([".xxx", "....", "...x"]))
    assert strategy.choose(view, Output(logits, MASK)).tolist() == [1]  # all decoded: 1


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


def test_options_are_kept_in_one_form() -> None:
    one = DecodingParams(strategy="credit", options={"decay": 0.5, "alpha": 1.0})
    other = DecodingParams(strategy="credit", options=(("alpha", 1.0), ("decay", 0.5)))
    assert one == other and hash(one) == hash(other)
    assert one.options == (("alpha", 1.0), ("decay", 0.5))
    with pytest.raises(InputError, match="`options` must map names to values"):
        DecodingParams(options=3)  # type: ignore[arg-type]


def test_every_strategy_says_where_it_comes_from(needed: dict[str, dict[str, str]]) -> None:
    for name in strategies():
        strategy = get_strategy(DecodingParams(strategy=name, options=needed[name]))
        assert (type(strategy).__doc__ or "").strip()
