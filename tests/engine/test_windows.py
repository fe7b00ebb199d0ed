"""Several open blocks, several branches of one: who sees whom, when blocks open, what counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from parts import EOS, L, confident, engine_of, random_prompts, request, run, scripted
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.outputs import Cost
from dmax.params import DecodingParams
from dmax.training.clean_stream import CleanStream

Golden = tuple[str, Any, dict[str, Any]]
PROMPT = (1,) * L  # one block, prefilled


def table(*blocks: float | list[float]) -> Tensor:
    """Confidence of the 8 positions of each block after the prompt; the argmax is 1 everywhere."""
    parts = [confident([1] * L)]
    for block in blocks:
        each = block if isinstance(block, list) else [block] * L
        parts.append(torch.cat([confident([1], probability) for probability in each]))
    return torch.cat(parts)


HALF = [0.99] * 4 + [0.6] * 4


def cost(script: Tensor, num_blocks: int = 2, **params: Any) -> Cost:
    """Cost of decoding `num_blocks` blocks after the prompt."""
    asked = request(PROMPT, max_new_tokens=num_blocks * L, **params)
    return run(scripted(script), asked)[0].cost


def d2f(script: Tensor, num_blocks: int = 2, **options: Any) -> Cost:
    return cost(script, num_blocks, strategy="d2f", threshold=0.9, options=options)


def test_d2f_decodes_the_next_block_meanwhile() -> None:
    # 4 of block 1; then one of it a forward, with all of block 2 beside the first of these.
    found = d2f(table(HALF, 0.99), opens_at=0.5)
    assert (found.num_forwards, found.num_positions) == (5, L + 4 * 2 * L)
    alone = d2f(table(HALF, 0.99), blocks=1)
    # The last forward writes block 1 into the cache as well.
    assert (alone.num_forwards, alone.num_positions) == (6, 5 * L + 2 * L)


def test_d2f_a_block_opens_once_the_one_before_is_decoded_far_enough() -> None:
    # 5/8 decoded after the second forward, 8/8 after the fifth.
    assert d2f(table(HALF, 0.99), opens_at=0.6).num_positions == 2 * L + 3 * 2 * L
    assert d2f(table(HALF, 0.99), opens_at=1.0).num_forwards == 6


@pytest.mark.parametrize(("forces_at", "num_forwards"), [(0.0, 9), (0.75, 11), (1.0, 13)])
def test_d2f_a_block_must_progress_once_the_one_before_is_decoded_far_enough(
    forces_at: float, num_forwards: int
) -> None:
    # Block 2 is never confident: one position a forward from the second, the fourth or the sixth
    # forward on.
    assert d2f(table(HALF, 0.6), opens_at=0.5, forces_at=forces_at).num_forwards == num_forwards


def test_no_more_blocks_are_open_than_may_be_and_none_past_the_end() -> None:
    script = table(HALF, 0.6, 0.6, 0.6)
    assert d2f(script, 4, blocks=2, opens_at=0.0).num_positions <= 4 * 8 * 2 * L + 4 * L
    wide = d2f(script, 4, blocks=64, opens_at=0.0, forces_at=0.0)
    # Four blocks, each opening a forward after the one before: decoded after forwards 5, 9, 10 and
    # 11. The first goes into the cache with the next forward, so two finished blocks went through
    # forwards 6 and 10.
    assert wide.num_forwards == 11


def test_blocks_close_in_order_and_may_close_together() -> None:
    engine = scripted(table(HALF, 0.99))
    asked = request(PROMPT, strategy="d2f", threshold=0.9, options={"opens_at": 0.5})
    *blocks, _ = engine.run([replace(asked, provisional=True)])
    assert [(block.kind, block.position) for block in blocks[-2:]] == [
        ("committed", 0),
        ("committed", L),
    ]
    provisional = [block for block in blocks if block.kind == "provisional"]
    assert [block.position for block in provisional] == [0] + [0, L] * 3
    assert all(any(block.masked) for block in provisional if block.position == 0)


def test_no_block_opens_after_an_eos() -> None:
    script = table(HALF, 0.99)
    script[L + 2] = confident([EOS])[0]
    asked = request(PROMPT, strategy="d2f", threshold=0.9, options={"opens_at": 0.5})
    output = run(scripted(script), asked)[0]
    assert output.token_ids == (1, 1)
    assert output.num_positions == 5 * L


def test_an_ignored_eos_does_not_keep_the_next_block_closed() -> None:
    script = table(HALF, 0.99)
    script[L + 2] = confident([EOS])[0]
    options = {"opens_at": 0.5}
    asked = request(PROMPT, strategy="d2f", threshold=0.9, options=options, ignore_eos=True)
    output = run(scripted(script), asked)[0]
    assert (len(output.token_ids), output.num_forwards) == (2 * L, 5)


def test_an_eos_in_the_first_block_drops_what_was_decoded_after_it() -> None:
    script = table(HALF, 0.99)
    script[2 * L - 1] = confident([EOS], 0.6)[0]  # the last position of block 1, decoded last
    asked = request(PROMPT, strategy="d2f", threshold=0.9, options={"opens_at": 0.5})
    output = run(scripted(script), asked)[0]
    assert output.token_ids == (1,) * 7
    assert output.finish_reason == "stop"


def test_mbd_revises_two_blocks_at_once() -> None:
    # Not sure enough to stop at once: each block takes a second forward that changes nothing.
    script = table(0.6, 0.6)
    settings = {"threshold": 0.5, "stop_confidence": 0.9}

    def mbd(script: Tensor, opens_at: float) -> int:
        options = {"opens_at": opens_at}
        return cost(script, strategy="mbd", options=options, **settings).num_forwards

    assert cost(script, strategy="spd", **settings).num_forwards == 4
    assert mbd(script, 0.0) == 3
    assert mbd(script, 0.5) == 4  # nothing is sure
    assert mbd(table(HALF, 0.6), 0.5) == 3  # half of it is sure: the next block opens


def test_lopa_counts_all_branches() -> None:
    found = cost(table(0.6), 1, strategy="lopa", threshold=0.9, options={"num_branches": 3})
    assert found.num_forwards <= 8
    assert found.num_positions == L + (found.num_forwards - 1) * 3 * L
    plain = cost(table(0.6), 1, strategy="lopa", threshold=0.9, options={"num_branches": 1})
    assert plain == cost(table(0.6), 1, strategy="threshold", threshold=0.9)


# --- a real model ---------------------------------------------------------------------------------


def started(golden: Golden, prompts: Sequence[tuple[int, ...]], **params: Any) -> Engine:
    """An engine that decodes these prompts, before its first step."""
    _, checkpoint, _ = golden
    engine = engine_of(checkpoint, max_batch_size=4, max_length=160)
    for index, prompt in enumerate(prompts):
        engine.add(Request(index, prompt, DecodingParams(max_new_tokens=48, **params)))
    return engine


@torch.inference_mode()
def next_forward(engine: Engine) -> list[tuple[Tensor, Tensor]]:
    """Tokens and logits [L, V] of every open block, or branch of one, in the next forward.

    The tokens are those of the whole sequence up to the end of the block. MASK's logits are 0.
    """
    engine.prepare()
    ((blocks, batch, sequences),) = engine.batches()
    embeds = blocks.inputs(batch.rows, batch.num_branches)
    logits = engine.runner.forward(batch.to(engine.runner.device), embeds).logits
    mask = torch.tensor([blocks.mask_token_id])
    found = iter(logits.index_fill(-1, mask, 0.0))
    pairs = []
    for sequence in sequences:
        finished = (*sequence.request.prompt_ids, *sequence.generated)[: sequence.start]
        before = torch.tensor(finished, dtype=torch.long)
        rows = torch.tensor(sequence.rows)
        branches = blocks.tokens[rows][:, None]
        if sequence.num_branches > 1:
            branches = blocks.strategy.branches(blocks.view(rows), blocks.state_of(rows))
        for block in branches:
            pairs += [(torch.cat((before, branch)), next(found)) for branch in block]
            before = torch.cat((before, block[0]))
    return pairs


def without_cache(model: Any, tokens: Tensor, length: int, mask: int) -> Tensor:
    """Logits [L, V] of the last block of a sequence, MASK's at 0."""
    index = torch.arange(len(tokens))
    visible = dense_mask(block_causal(length), index, index)[None, None]
    with torch.no_grad():
        output = model(input_ids=tokens[None], attention_mask=visible, position_ids=index[None])
    return output.logits[0, -length:].index_fill(-1, torch.tensor([mask]), 0.0)


def assert_as_without_cache(golden: Golden, pairs: list[tuple[Tensor, Tensor]]) -> None:
    _, checkpoint, _ = golden
    ids = checkpoint.special_ids
    for tokens, logits in pairs:
        expected = without_cache(checkpoint.model, tokens, ids.block_length, ids.mask_token_id)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


D2F = {
    "strategy": "d2f",
    "threshold": 0.9,
    "options": {"blocks": 3, "opens_at": 0.0, "forces_at": 0.0},
}


def test_an_open_block_sees_the_open_ones_before_it(golden: Golden) -> None:
    """Also finished ones, which the same forward writes into the cache."""
    engine = started(golden, random_prompts(3, 17, 40), **D2F)
    most_open = 0
    most_pending = 0
    while engine.is_busy():
        pairs = next_forward(engine)
        ((_, batch, sequences),) = engine.batches()
        most_open = max(most_open, *(len(sequence.rows) for sequence in sequences))
        most_pending = max(most_pending, batch.num_pending)
        assert_as_without_cache(golden, pairs)
        engine.step()
    assert (most_open, most_pending > 0) == (3, True)


@pytest.mark.parametrize("shift", [False, True])
@torch.inference_mode()
def test_training_on_multi_block_states_shows_what_decoding_shows(
    golden: Golden, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blends of two open blocks, as `mbd` feeds them, in the noisy stream of training."""
    _, checkpoint, _ = golden
    model = checkpoint.model
    monkeypatch.setattr(model.config, "shift", shift, raising=False)
    length = checkpoint.special_ids.block_length
    settings = {"threshold": 0.0, "options": {"opens_at": 0.0, "forces_at": 0.0}}
    engine = started(golden, random_prompts(length + 3), strategy="mbd", **settings)
    compared = 0
    while engine.is_busy():
        pairs = next_forward(engine)
        ((blocks, batch, _),) = engine.batches()
        if len(pairs) == 2:
            tokens = pairs[1][0]  # of the whole sequence, up to the end of the second block
            positions = torch.arange(len(tokens) - 2 * length, len(tokens))[None]
            places = torch.arange(2).repeat_interleave(length)[None]
            stream = CleanStream(model, tokens[None], length, positions, places)
            fed = blocks.inputs(batch.rows[-2:], 1).view(1, 2 * length, -1)
            found = stream.denoise(fed).logits()[0]
            mask = torch.tensor([checkpoint.special_ids.mask_token_id])
            expected = torch.cat([logits for _, logits in pairs])
            torch.testing.assert_close(
                found.index_fill(-1, mask, 0.0), expected, atol=2e-5, rtol=1e-4
            )
            compared += 1
        engine.step()
    assert compared > 0


def test_logits_are_made_of_open_rows_only(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a model that makes them itself, because they are more than a product."""
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    prompts = random_prompts(2 * length, length + 1)  # blocks that go into the cache at first
    params = {"strategy": "threshold", "threshold": 0.9}
    expected = next_forward(started(golden, prompts, **params))
    monkeypatch.setattr(checkpoint.model, "has_linear_head", False)
    seen = list[int]()
    head = checkpoint.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    engine = started(golden, prompts, **params)
    found = next_forward(engine)
    handle.remove()
    ((_, batch, _),) = engine.batches()
    assert (batch.num_pending, batch.num_rows) == (3, 5)
    assert seen == [2]
    for (_, logits), (_, wanted) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)


def test_branches_share_positions_and_do_not_see_each_other(golden: Golden) -> None:
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    lopa = {"strategy": "lopa", "threshold": 1.0, "options": {"num_branches": 3}}
    engine = started(golden, random_prompts(2 * length, 3 * length + 1), **lopa)
    engine.step()  # the first one, over blocks that have no branches yet
    for _ in range(3):
        pairs = next_forward(engine)
        assert len(pairs) == 2 * 3
        assert_as_without_cache(golden, pairs)
        engine.step()
