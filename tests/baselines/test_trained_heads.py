"""Learn2PD and DEMASK on numbers worked out by hand; their heads are made for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import MASK, logits_of, opened, play, rows
from torch import Tensor

from dmax.baselines.demask import within_dependency
from dmax.baselines.heads import Head, Tensors, save_head
from dmax.decoding import get_strategy
from dmax.decoding.block import Output
from dmax.errors import InputError
from dmax.params import DecodingParams


def saved(folder: Path, kind: str, length: int, tensors: Tensors, hidden_size: int = 4) -> str:
    file = folder / f"{kind}.safetensors"
    save_head(Head(kind, "0" * 16, length, hidden_size, 1, tensors), file)  # type: ignore[arg-type]
    return str(file)


def passing(length: int, scale: float, bias: float) -> Tensors:
    """A filter whose logit is scale · c_i + bias."""
    return {
        "inner.weight": torch.eye(length),
        "inner.bias": torch.zeros(length),
        "outer.weight": scale * torch.eye(length),
        "outer.bias": torch.full((length,), bias),
    }


def decoded(logits: Tensor, params: DecodingParams) -> list[int]:
    """How many masks each step decodes, on the same logits at each."""
    steps = play(params, lambda n, view: logits, opened((), logits.shape[1]))
    return [int((step.view.masked & ~step.advance.masked).sum()) for step in steps]


FOUR = logits_of([1, 2, 3, 4], [0.5, 0.95, 0.7, 0.92])


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.5, [3, 1]), (0.9, [2, 1, 1]), (1.0, [1, 1, 1, 1]), (0.0, [4])]
)
def test_learn2pd_decodes_what_the_filter_accepts_and_always_one(
    tmp_path: Path, threshold: float, expected: list[int]
) -> None:
    # sigmoid(20 c - 13) is 0.05, 0.998, 0.73 and 0.996
    head = saved(tmp_path, "learn2pd", 4, passing(4, 20.0, -13.0))
    assert decoded(FOUR, DecodingParams("learn2pd", threshold, options={"head": head})) == expected


def test_learn2pd_sees_decoded_positions_too(tmp_path: Path) -> None:
    # A position is accepted for the confidence of position 0 only, which the prompt has filled.
    tensors = passing(3, 1.0, -0.9)
    tensors["outer.weight"] = torch.tensor([[0.0, 0, 0], [100.0, 0, 0], [100.0, 0, 0]])
    tensors["outer.bias"] = torch.full((3,), -50.0)
    params = DecodingParams("learn2pd", options={"head": saved(tmp_path, "learn2pd", 3, tensors)})
    sure = logits_of([1, 2, 3], [0.6, 0.3, 0.3])
    unsure = logits_of([1, 2, 3], [0.4, 0.3, 0.3])
    assert len(play(params, lambda n, view: sure, opened((1,), 3))) == 1
    assert len(play(params, lambda n, view: unsure, opened((1,), 3))) == 2


def test_learn2pd_takes_shorter_blocks_than_its_filter_and_no_longer_ones(tmp_path: Path) -> None:
    head = saved(tmp_path, "learn2pd", 6, passing(6, 20.0, -13.0))
    assert decoded(FOUR, DecodingParams("learn2pd", 0.5, options={"head": head})) == [3, 1]
    strategy = get_strategy(DecodingParams("learn2pd", options={"head": head}))
    with pytest.raises(InputError, match="takes blocks of up to 6 positions, got 7"):
        strategy.open(opened((), 7))


# D[i][j]: how far deciding i moves the distribution at j
D = torch.tensor([[[9, 0.1, 0.2, 0.4], [0.3, 9, 0.0, 0.5], [0.1, 0.1, 9, 0.1], [0.0, 0.2, 0.3, 9]]])
CONFIDENCE = torch.tensor([[0.9, 0.6, 0.8, 0.7]])  # in the order 0, 2, 3, 1


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (0.0, "x..."),  # the first is free
        (0.15, "xx.."),  # 2 would cost D_02 = 0.2 and 3 D_03 = 0.4; 1 costs D_01 = 0.1
        (0.25, "x.x."),  # then 3 would add D_03 + D_23 = 0.5, 1 D_01 + D_21 = 0.2
        (0.45, "xxx."),  # 3 is passed over and 1 still tried
        (0.75, "x.xx"),  # now 3 fits, and 1 would add D_01 + D_21 + D_31 = 0.4
        (1.15, "xxxx"),
    ],
)
def test_the_set_grows_by_confidence_while_the_dependency_stays_within_the_bound(
    bound: float, expected: str
) -> None:
    every = rows(["xxxx"])
    assert torch.equal(within_dependency(every, every, CONFIDENCE, D, bound), rows([expected]))


def test_the_most_confident_needs_no_leave_and_others_do() -> None:
    every = rows(["xxxx"])
    none = rows(["...."])
    assert torch.equal(within_dependency(every, none, CONFIDENCE, D, 9.0), rows(["x..."]))
    assert torch.equal(within_dependency(every, rows([".x.."]), CONFIDENCE, D, 9.0), rows(["xx.."]))
    assert torch.equal(within_dependency(none, none, CONFIDENCE, D, 9.0), none)


@given(
    masked=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    bound=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
)
def test_the_set_equals_a_loop(masked: list[list[bool]], seed: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(len(masked), 5, generator=generator)
    dependency = torch.rand(len(masked), 5, 5, generator=generator)
    where = torch.tensor(masked)
    found = within_dependency(where, where, confidence, dependency, bound)
    for row, line in enumerate(masked):
        chosen = list[int]()
        spent = torch.zeros(())
        for j in sorted((j for j in range(5) if line[j]), key=lambda j: -confidence[row, j].item()):
            cost = torch.zeros(())
            for i in chosen:
                cost = cost + dependency[row, i, j]
            if spent + cost <= bound:
                chosen.append(j)
                spent = spent + cost
        assert found[row].nonzero().flatten().tolist() == sorted(chosen)


def influence(bias: float) -> Tensors:
    """A head for which every position moves every other by sigmoid(bias)."""
    return {
        "query": torch.zeros(4, 2),
        "key": torch.zeros(4, 2),
        "distance": torch.full((7,), bias),
    }


@pytest.mark.parametrize(
    ("threshold", "bound", "expected"),
    [
        # Half a unit a pair: 1 pair for the second, 2 for the third, 3 for the fourth.
        (0.0, 1.5, [3, 1]),
        (0.0, 3.0, [4]),
        (0.0, 0.49, [1, 1, 1, 1]),
        (0.9, 9.0, [2, 1, 1]),  # 0.95 and 0.92; then only the surest
    ],
)
def test_demask_keeps_to_its_bound_and_its_threshold(
    tmp_path: Path, threshold: float, bound: float, expected: list[int]
) -> None:
    head = saved(tmp_path, "demask", 4, influence(0.0))
    assert (
        decoded(FOUR, DecodingParams("demask", threshold, options={"head": head, "bound": bound}))
        == expected
    )


def test_demask_wants_the_hidden_states_its_head_was_trained_on(tmp_path: Path) -> None:
    head = saved(tmp_path, "demask", 4, influence(0.0))
    strategy = get_strategy(DecodingParams("demask", options={"head": head}))
    assert strategy.needs_hidden_states
    view = opened((), 4)
    with pytest.raises(InputError, match="needs hidden states of size 4, got none"):
        strategy.step(view, Output(FOUR, MASK), {})
    with pytest.raises(InputError, match="needs hidden states of size 4, got 5"):
        strategy.step(view, Output(FOUR, MASK, hidden_states=torch.zeros(1, 4, 5)), {})
    with pytest.raises(InputError, match="takes blocks of up to 4 positions, got 5"):
        strategy.open(opened((), 5))


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("learn2pd", {"filter": 1}, "strategy `learn2pd` has no option `filter`; it has only head"),
        ("demask", {"bound": -1}, "`bound` must be a number of at least 0, got -1"),
        ("demask", {}, "strategy `demask` needs the option `head`"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    strategy: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as error:
        get_strategy(DecodingParams(strategy=strategy, options=options))
    assert message in error.value.message
