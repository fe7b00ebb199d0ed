"""Open blocks: what the model reads of them next, and that each row keeps to its own settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parts import MASK, L, V, confident
from torch import nn

from dmax.blend import blend
from dmax.decoding import get_strategy
from dmax.decoding.block import Output
from dmax.engine.blocks import OpenBlocks
from dmax.engine.step import decide
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

EMBEDDING = nn.Embedding(V, 4)
PARAMS = DecodingParams("spd", threshold=0.5)


def opened(*known: tuple[int, ...], params: DecodingParams = PARAMS) -> OpenBlocks:
    """A block for each beginning, all with the same settings."""
    strategy = get_strategy(params)
    ids = SpecialIds(MASK, (V - 2,), V - 2, L)
    blocks = OpenBlocks(strategy, len(known), ids, EMBEDDING, torch.device("cpu"))
    for slot, tokens in enumerate(known):
        blocks.admit(slot, strategy, params)
        blocks.open(slot, tokens)
    return blocks


@torch.no_grad()
def test_the_first_forward_reads_the_prompt_and_masks() -> None:
    blocks = opened((3, 4))
    expected = EMBEDDING(torch.tensor([[3, 4, *[MASK] * (L - 2)]]))
    assert torch.equal(blocks.inputs(torch.tensor([0])), expected)


@torch.no_grad()
@pytest.mark.parametrize("renormalize", [True, False])
def test_after_a_step_decoded_positions_are_read_as_blends_and_no_others(
    renormalize: bool,
) -> None:
    blocks = opened((3, 4), params=replace(PARAMS, options={"renormalize": renormalize}))
    rows = torch.tensor([0])
    logits = torch.cat((confident([5] * 4, 0.7), confident([6] * 4, 0.3)))[None]
    decide(blocks, rows, Output(logits, MASK))
    assert blocks.tokens[0].tolist() == [3, 4, 5, 5, MASK, MASK, MASK, MASK]
    read = blocks.inputs(rows)[0]
    mask = EMBEDDING(torch.tensor(MASK))
    five = EMBEDDING(torch.tensor([5]))
    expected = blend(five, mask, torch.tensor([0.7]), renormalize=renormalize)
    torch.testing.assert_close(read[2], expected)
    assert torch.equal(read[:2], EMBEDDING(torch.tensor([3, 4])))
    assert torch.equal(read[4:], mask.expand(4, -1))


@torch.no_grad()
def test_a_row_that_opens_anew_reads_nothing_of_its_last_block() -> None:
    blocks = opened(())
    rows = torch.tensor([0])
    decide(blocks, rows, Output(confident([5] * L, 0.7)[None], MASK))
    assert not torch.equal(blocks.inputs(rows), EMBEDDING(blocks.tokens))
    blocks.open(0)
    assert torch.equal(blocks.inputs(rows), EMBEDDING(torch.full((1, L), MASK)))


@torch.no_grad()
def test_hard_inputs_are_the_tokens() -> None:
    blocks = opened((), params=replace(PARAMS, options={"soft_inputs": False}))
    rows = torch.tensor([0])
    decide(blocks, rows, Output(confident([5] * L, 0.7)[None], MASK))
    assert torch.equal(blocks.inputs(rows), EMBEDDING(blocks.tokens))


@torch.no_grad()
def test_rows_of_one_step_keep_to_their_own_numbers() -> None:
    blocks = opened((), ())
    strict = replace(PARAMS, threshold=0.9)
    blocks.admit(1, get_strategy(strict), strict)
    logits = confident([5] * L, 0.7).expand(2, -1, -1)
    decide(blocks, torch.tensor([0, 1]), Output(logits, MASK))
    assert blocks.masked.sum(dim=1).tolist() == [0, L - 1]
