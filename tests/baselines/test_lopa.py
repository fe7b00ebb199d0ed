"""LoPA's branches: which masks they decode, which of them goes on, and a block by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from scripted import MASK, logits_of, opened, play, rows
from torch import Tensor

from dmax.baselines.lopa import Lookahead, best_branch
from dmax.decoding.block import Output, apply

SURE = [0.5, 0.95, 0.7, 0.92]
FOUR = logits_of([1, 2, 3, 4], SURE)


def remembered(tokens: list[int], probability: list[float]) -> dict[str, Tensor]:
    """What LoPA keeps of the last forward, for one block."""
    return {"tokens": torch.tensor([tokens]), "probability": torch.tensor([probability])}


def test_branches_decode_the_surest_masks_one_each() -> None:
    strategy = Lookahead(threshold=0.9, num_branches=4)
    state = remembered([1, 2, 3, 4], SURE)
    view = opened((), 4)
    block = replace(view, tokens=torch.tensor([[MASK, 6, MASK, MASK]]), masked=rows(["x.xx"]))
    assert strategy.branches(block, state).tolist() == [
        [[MASK, 6, MASK, MASK], [MASK, 6, MASK, 4], [MASK, 6, 3, MASK], [1, 6, MASK, MASK]]
    ]
    last = replace(view, tokens=torch.tensor([[5, MASK, 5, 5]]), masked=rows([".x.."]))
    as_it_stands = [5, MASK, 5, 5]
    assert strategy.branches(last, state).tolist() == [
        [as_it_stands, [5, 2, 5, 5], as_it_stands, as_it_stands]
    ]


def test_the_branch_whose_masks_are_surest_on_average_goes_on() -> None:
    confidence = torch.tensor(
        [
            [
                [0.9, 0.6, 0.6, 0.6],  # masks at 1 to 3: 0.6 on average
                [0.9, 0.9, 0.7, 0.5],  # 2 and 3: 0.6
                [0.1, 0.9, 0.1, 0.7],  # 3: 0.7
            ]
        ]
    )
    assert best_branch(rows([".xxx", "..xx", "...x"])[None], confidence).tolist() == [2]
    # All decoded counts as 1.
    assert best_branch(rows([".xxx", "....", "...x"])[None], confidence).tolist() == [1]
    equal = torch.full((1, 3, 4), 0.5)
    assert best_branch(rows(["xxxx", ".xxx", "..xx"])[None], equal).tolist() == [0]


def test_a_block_by_hand() -> None:
    script = [
        logits_of([1, 2, 3, 4], [0.5, 0.95, 0.7, 0.6]),
        torch.cat(
            (
                logits_of([1, 2, 3, 4], [0.6, 0.95, 0.5, 0.4]),  # of [M 2 M M]: 0.5 on average
                logits_of([5, 2, 6, 4], [0.92, 0.95, 0.3, 0.6]),  # of [M 2 3 M]: 0.76
            )
        ),
        torch.cat(
            (
                logits_of([5, 2, 3, 1], [0.9, 0.9, 0.9, 0.99]),  # of [5 2 3 M]: 0.99
                logits_of([5, 2, 3, 1], [0.2, 0.2, 0.2, 0.2]),  # of [5 2 3 4]: no mask, 1
            )
        ),
    ]
    strategy = Lookahead(threshold=0.9, num_branches=2)
    steps = play(strategy, lambda n, view: script[n], opened((), 4))
    assert [step.advance.tokens[0].tolist() for step in steps] == [
        [MASK, 2, MASK, MASK],  # only position 1 reaches the threshold
        [5, 2, 3, MASK],  # branch 1 has the token 3; from its logits position 0 gets the 5
        [5, 2, 3, 4],  # branch 1 has the token 4
    ]
    assert not any(step.advance.forced.any() or step.advance.capped.any() for step in steps)
    confidence = steps[-1].decision.confidence
    assert confidence is not None
    # What each position had when it was decoded.
    torch.testing.assert_close(confidence, torch.tensor([[0.92, 0.95, 0.7, 0.6]]))


def test_one_branch_is_the_base_rule() -> None:
    with_one = play(Lookahead(threshold=0.9, num_branches=1), lambda n, view: FOUR, opened((), 4))
    assert [int(step.advance.masked.sum()) for step in with_one] == [2, 1, 0]


def test_blocks_choose_their_branches_each_for_itself() -> None:
    strategy = Lookahead(threshold=0.9, num_branches=2)
    view = opened((), 2, batch=2, max_steps=9)
    first = torch.cat((logits_of([1, 2], [0.6, 0.5]), logits_of([3, 4], [0.4, 0.8])))
    state = strategy.open(view)
    decision, state = strategy.step(view, Output(first, MASK), state)
    advance = apply(view, decision)
    assert advance.tokens.tolist() == [[1, MASK], [MASK, 4]]
    view = replace(view, tokens=advance.tokens, masked=advance.masked, step=view.step + 1)
    assert strategy.branches(view, state).tolist() == [
        [[1, MASK], [1, 2]],
        [[MASK, 4], [3, 4]],
    ]
    second = torch.cat([logits_of([5, 6], [0.95, 0.95])] * 4)
    decision, state = strategy.step(view, Output(second, MASK), state)
    # The branch without masks goes on in both, with the tokens of the forward before.
    assert apply(view, decision).tokens.tolist() == [[1, 2], [3, 4]]
