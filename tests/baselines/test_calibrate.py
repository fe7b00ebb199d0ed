"""Bounds for SchED: the rule on numbers worked out by hand, and a calibrated model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dmax.baselines.calibrate import Calibration, Margins, calibrate, choose_bounds
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks.word_problems import problems

ROOT = Path(__file__).parents[2]


def margins(blocks: list[list[tuple[float, bool]]], steps: int) -> Margins:
    """Of each block the margin at every step, and whether all predictions were final."""
    shape = (steps, len(blocks))
    margin = torch.zeros(shape)
    final = torch.ones(shape, dtype=torch.bool)
    is_open = torch.zeros(shape, dtype=torch.bool)
    for n, block in enumerate(blocks):
        for t, (value, is_final) in enumerate(block):
            margin[t, n] = value
            final[t, n] = is_final
            is_open[t, n] = True
    return Margins(margin, final, is_open)


# Over 3 steps the cosine schedule from 1 to 1/3 is 1, 2/3, 1/3.
FOUR = margins(
    [
        [(1.0, False), (2.0, True), (2.0, True)],  # too early at bounds up to 1
        [(1.0, False), (2.0, False), (1.0, True)],  # up to max(1, 2 / (2/3)) = 3
        [(9.0, True), (9.0, True), (9.0, True)],  # never
        [(5.0, False), (6.0, True)],  # up to 5; a shorter block
    ],
    3,
)


@pytest.mark.parametrize(
    ("risk", "high", "premature", "forwards"),
    [
        # Bounds 5.01, 3.34, 1.67: left after step 3, after no step, after 1 and after 2.
        (0.0, 5.01, 0.0, (3 + 3 + 1 + 2) / 4),
        # Bounds 3.01, 2.01, 1.003: the first two blocks just miss the second bound.
        (0.3, 3.01, 0.25, (3 + 3 + 1 + 1) / 4),
        # Bounds 1.01 and 0.673.
        (0.6, 1.01, 0.5, (2 + 2 + 1 + 1) / 4),
        (1.0, 0.01, 0.75, 1.0),
    ],
)
def test_bounds_are_just_above_what_too_many_blocks_would_leave_too_early_at(
    risk: float, high: float, premature: float, forwards: float
) -> None:
    found = choose_bounds(FOUR, 3, risk=risk, ratio=1 / 3)
    assert found.high == pytest.approx(high)
    assert found.low == pytest.approx(high / 3)
    assert (found.num_blocks, found.premature) == (4, premature)
    assert found.forwards_per_block == forwards
    assert found.sequential_forwards_per_block == 11 / 4
    assert found.premature <= risk


def test_a_block_of_which_nothing_is_premature_sets_no_bound() -> None:
    found = choose_bounds(margins([[(9.0, True), (9.0, True)]], 2), 2, risk=0.0, ratio=1.0)
    assert found == Calibration(0.01, 0.01, 1, 0.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-base", dtype="float32", max_batch_size=4)


def test_calibration_follows_the_decoding_it_is_for(llm: LLM) -> None:
    questions = [problem.question for problem in problems(1, seed=3)]
    found = calibrate(llm, questions, risk=0.0)

    def decode(high: float, low: float) -> list[tuple[tuple[int, ...], int]]:
        params = DecodingParams("sched", options={"high": high, "low": low})
        outputs = llm.generate(questions, params)
        return [(output.token_ids, output.num_forwards) for output in outputs]

    sequential = decode(1e9, 1e9)
    early = decode(found.high, found.low)
    assert [tokens for tokens, _ in early] == [tokens for tokens, _ in sequential]  # no risk
    num_sequential = sum(forwards for _, forwards in sequential)
    num_early = sum(forwards for _, forwards in early)
    assert num_sequential == found.num_blocks * found.sequential_forwards_per_block
    assert num_early == pytest.approx(found.num_blocks * found.forwards_per_block)
    assert found.forwards_per_block <= found.sequential_forwards_per_block


def test_what_cannot_be_calibrated_on_is_one_clear_error(llm: LLM) -> None:
    with pytest.raises(InputError, match="none of 1 prompts is answered within 2 tokens"):
        calibrate(llm, ["Tom has 3 apples."], max_new_tokens=2)
    with pytest.raises(InputError, match="`risk` must be a number between 0 and 1, got 2"):
        calibrate(llm, ["Tom has 3 apples."], risk=2)


def test_the_snippet_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (snippet,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        if "calibrate" in code
    ]
    assert "problems(100," in snippet
    exec(snippet.replace("problems(100,", "problems(1,"), {})
    assert "high" in capsys.readouterr().out
