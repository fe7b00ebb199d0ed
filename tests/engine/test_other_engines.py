"""The two halves of a step, driven by a loop that runs the forward itself, without our cache.

`OpenBlocks.inputs` before a forward and `decide` after it are all that another engine needs. Here
it encodes the whole sequence anew at every step, under a mask that shows a block those before it.
Such a forward rounds differently, so the models are in float64: the last bits decide nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parts import engine_of, random_prompts, run
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.decoding import get_strategy
from dmax.decoding.block import Output
from dmax.engine.blocks import OpenBlocks
from dmax.engine.request import Request
from dmax.engine.step import decide
from dmax.params import DecodingParams


@pytest.fixture(scope="module")
def checkpoint(golden: tuple[str, Any, dict[str, Any]]) -> Checkpoint:
    """A published model in float64."""
    _, published, _ = golden
    ids = published.special_ids
    exact = load_checkpoint(
        published.path,
        dtype=torch.float64,
        device="cpu",
        mask_token_id=ids.mask_token_id,
        eos_token_id=list(ids.eos_token_ids),
        block_length=ids.block_length,
    )
    return replace(exact, special_ids=ids)


def whole_logits(model: Any, embeds: Tensor, block_length: int) -> Tensor:
    """Logits [R, T, V] of whole sequences, from their embeddings [R, T, D]."""
    position = torch.arange(embeds.shape[1])
    mask = dense_mask(block_causal(block_length), position, position)[None, None]
    output = model(inputs_embeds=embeds, attention_mask=mask, position_ids=position[None])
    logits: Tensor = output.logits
    return logits


@torch.inference_mode()
def decode(
    checkpoint: Checkpoint, prompt: tuple[int, ...], params: DecodingParams
) -> tuple[list[int], int]:
    """Tokens of whole blocks after a prompt, and the number of forwards over open blocks."""
    model: Any = checkpoint.model
    ids = checkpoint.special_ids
    length = ids.block_length
    embed = model.get_input_embeddings()
    strategy = get_strategy(params)
    blocks = OpenBlocks(strategy, 1, ids, embed, torch.device("cpu"))
    blocks.admit(0, strategy, params)
    row = torch.tensor([0])
    sequence = list(prompt)
    num_forwards = 0
    while len(sequence) < len(prompt) + params.max_new_tokens:
        start = len(sequence) // length * length
        blocks.open(0, sequence[start:])
        before = embed(torch.tensor(sequence[:start], dtype=torch.long))  # [start, D]
        num_branches = 1  # until the block has been read once
        done = False
        while not done:
            inputs = blocks.inputs(row, num_branches)  # [num_branches, L, D]
            whole = torch.cat((before.expand(num_branches, -1, -1), inputs), dim=1)
            logits = whole_logits(model, whole, length)[:, start:]
            flags = decide(blocks, row, Output(logits, ids.mask_token_id))
            done, _, _, invalid, broken, _ = flags[:, 0].tolist()
            assert not invalid
            assert not broken
            num_forwards += 1
            num_branches = strategy.num_branches
        sequence[start:] = blocks.tokens[0].tolist()
        if set(ids.eos_token_ids).intersection(sequence[len(prompt) :]):
            break
    return sequence[len(prompt) :], num_forwards


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "spd"},
        {"strategy": "spd", "threshold": 0.9, "top_k": 2},
        {"strategy": "spd", "threshold": 0.3, "options": {"soft_inputs": False}},
        {"strategy": "threshold", "threshold": 0.6},
        {"strategy": "hierarchy", "threshold": 0.6},
        {"strategy": "iter_smooth", "threshold": 0.6},
        {"strategy": "joint_threshold", "threshold": 0.6},
        {"strategy": "lopa", "threshold": 0.6, "options": {"num_branches": 3}},
    ],
    ids=str,
)
def test_another_engine_decodes_what_ours_does(
    checkpoint: Checkpoint, settings: dict[str, Any]
) -> None:
    length = checkpoint.special_ids.block_length
    params = DecodingParams(max_new_tokens=3 * length, **settings)
    prompts = random_prompts(3, 2 * length, 5 * length + 1)
    requests = [Request(index, prompt, params) for index, prompt in enumerate(prompts)]
    ours = run(engine_of(checkpoint), *requests)
    for each in requests:
        tokens, num_forwards = decode(checkpoint, each.prompt_ids, params)
        output = ours[each.index]
        assert output.token_ids == tuple(tokens[: len(output.token_ids)])
        assert output.num_forwards == num_forwards
