"""Several open blocks, and several versions of one: who sees whom, when blocks open and close, what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import EOS, L, confident, request, run, scripted
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.engine.request import BlockEvent, Counters
from dmax.engine.rows import Row, Rows, Shape
from dmax.engine.runner import ModelRunner

PROMPT = (1,) * L  # one block, prefilled


def table(*blocks: float | list[float]) -> Tensor:
    """Confidence of the 8 positions of each block behind the prompt; the argmax is 1 everywhere."""
    parts = [confident([1] * L)]
    for block in blocks:
        each = block if isinstance(block, list) else [block] * L
        parts.append(torch.cat([confident([1], probability) for probability in each]))
    return torch.cat(parts)


HALF = [0.99] * 4 + [0.6] * 4


def cost(script: Tensor, num_blocks: int = 2, **params: Any) -> Counters:
    """Counters of decoding `num_blocks` blocks behind the prompt."""
    return run(scripted(script), request(PROMPT, max_new_tokens=num_blocks * L, **params))[
        0
    ].counters


def d2f(script: Tensor, num_blocks: int = 2, **options: Any) -> Counters:
    return cost(script, num_blocks, strategy="d2f", threshold=0.9, options=options)


def test_d2f_decodes_the_next_block_meanwhile() -> None:
    # 4 of block 1; then one of it a forward, with all of block 2 beside the first of these.
    counters = d2f(table(HALF, 0.99), opens_at=0.5)
    assert (counters.num_forwards, counters.num_positions) == (5, L + 4 * 2 * L)
    alone = d2f(table(HALF, 0.99), blocks=1)
    assert (alone.num_forwards, alone.num_positions) == (
        6,
        5 * L + 2 * L,
    )  # the last commits block 1 as well


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


def test_the_window_never_holds_more_blocks_than_it_may_nor_passes_the_end() -> None:
    script = table(HALF, 0.6, 0.6, 0.6)
    assert d2f(script, 4, blocks=2, opens_at=0.0).num_positions <= 4 * 8 * 2 * L + 4 * L
    wide = d2f(script, 4, blocks=64, opens_at=0.0, forces_at=0.0)
    # Four blocks, each opening a forward after the one before: decoded after forwards 5, 9, 10 and
    # 11. The head commits with the next forward, so two finished blocks went through forwards 6 and
    # 10.
    assert wide.num_forwards == 11


def test_blocks_close_in_order_and_may_close_together() -> None:
    engine = scripted(table(HALF, 0.99))
    events = list(
        engine.run(
            [request(PROMPT, strategy="d2f", threshold=0.9, options={"opens_at": 0.5})],
            provisional=True,
        )
    )
    blocks = [event for event in events if isinstance(event, BlockEvent)]
    assert [(block.kind, block.position) for block in blocks[-2:]] == [
        ("committed", 0),
        ("committed", L),
    ]
    assert [block.position for block in blocks if block.kind == "provisional"] == [0] + [0, L] * 3
    assert all(
        any(block.masked) for block in blocks if block.kind == "provisional" and block.position == 0
    )


def test_no_block_opens_behind_an_eos() -> None:
    script = table(HALF, 0.99)
    script[L + 2] = confident([EOS])[0]
    completion = run(
        scripted(script), request(PROMPT, strategy="d2f", threshold=0.9, options={"opens_at": 0.5})
    )[0]
    assert completion.token_ids == (1, 1)
    assert completion.counters.num_positions == 5 * L


def test_an_eos_in_the_first_block_drops_what_was_decoded_behind_it() -> None:
    script = table(HALF, 0.99)
    script[2 * L - 1] = confident([EOS], 0.6)[0]  # the last position of block 1, decoded last
    completion = run(
        scripted(script), request(PROMPT, strategy="d2f", threshold=0.9, options={"opens_at": 0.5})
    )[0]
    assert completion.token_ids == (1,) * 7
    assert completion.finish_reason == "stop"


def test_mbd_revises_two_blocks_at_once() -> None:
    # Not sure enough to stop at once: each block takes a second forward that changes nothing.
    script, settings = table(0.6, 0.6), {"threshold": 0.5, "stop_confidence": 0.9}
    assert cost(script, strategy="spd", **settings).num_forwards == 4
    assert cost(script, strategy="mbd", options={"opens_at": 0.0}, **settings).num_forwards == 3
    assert (
        cost(script, strategy="mbd", options={"opens_at": 0.5}, **settings).num_forwards == 4
    )  # nothing is sure
    # Half of it is sure: the next block opens.
    assert (
        cost(table(HALF, 0.6), strategy="mbd", options={"opens_at": 0.5}, **settings).num_forwards
        == 3
    )


def test_lopa_counts_all_versions() -> None:
    counters = cost(table(0.6), 1, strategy="lopa", threshold=0.9, options={"num_branches": 3})
    assert counters.num_forwards <= 8
    assert counters.num_positions == L + (counters.num_forwards - 1) * 3 * L
    plain = cost(table(0.6), 1, strategy="lopa", threshold=0.9, options={"num_branches": 1})
    assert plain == cost(table(0.6), 1, strategy="threshold", threshold=0.9)


# --- a real model ---------------------------------------------------------------------------------


def opened(golden: tuple[str, Any, dict[str, Any]]) -> tuple[ModelRunner, Any, int, Tensor]:
    """A runner with one and two committed blocks in its two slots, and the tokens of four blocks."""
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    tokens = torch.randint(300, (2, 4 * length), generator=torch.Generator().manual_seed(2))
    runner = ModelRunner(
        checkpoint.model, length, 2, 6 * length, checkpoint.special_ids.mask_token_id
    )
    runner.prefill([0, 1], tokens[:, :length])
    runner.prefill([1], tokens[1:, length : 2 * length])
    return runner, checkpoint.model, length, tokens


def forward(
    runner: ModelRunner, rows: list[tuple[int, int, int]], tokens: Tensor, num_open: int
) -> Tensor:
    """Logits [R, L, V] of the last rows, MASK's at 0; each row is a slot, where it is written and where it stands."""
    length, num_pending = tokens.shape[1], len(rows) - num_open
    places = [Row(*row) for row in rows]
    settled, opened = tokens[:num_pending].tolist(), runner.embed(tokens[num_pending:])
    shape = Shape.of(places, num_open, length)
    logits = runner.denoise(shape, Rows.of(places, settled, length), opened).logits
    return logits.index_fill(-1, torch.tensor([runner.mask_token_id]), 0.0)


def full_logits(model: Any, tokens: Tensor, length: int, mask: int) -> Tensor:
    """Logits [B, P, V] without a cache, MASK's at 0."""
    index = torch.arange(tokens.shape[1])
    visible = dense_mask(block_causal(length), index, index)[None, None]
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=visible, position_ids=index[None]).logits
    return logits.index_fill(-1, torch.tensor([mask]), 0.0)


def test_an_open_block_sees_the_open_ones_before_it(
    golden: tuple[str, Any, dict[str, Any]],
) -> None:
    """Rows of one forward, of two sequences, in no order."""
    runner, model, length, tokens = opened(golden)
    rows = [(slot, start, start) for slot, start in ((1, 3), (0, 1), (1, 2), (0, 2))]
    rows = [(slot, start * length, base * length) for slot, start, base in rows]
    blocks = torch.stack([tokens[slot, start : start + length] for slot, start, _ in rows])
    logits = forward(runner, rows, blocks, 4)
    expected = full_logits(model, tokens, length, runner.mask_token_id)
    for found, (slot, start, _) in zip(logits, rows, strict=True):
        torch.testing.assert_close(
            found, expected[slot, start : start + length], atol=2e-5, rtol=1e-4
        )


def test_logits_are_made_of_open_rows_alone(
    golden: tuple[str, Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a model that makes them itself, because they are more than a product."""
    _, checkpoint, _ = golden
    expected, seen = forward(*settled_and_open(opened(golden))), []
    monkeypatch.setattr(checkpoint.model, "has_linear_head", False)
    head = checkpoint.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[0]))
    logits = forward(*settled_and_open(opened(golden)))
    handle.remove()
    assert seen == [2]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def settled_and_open(
    given: tuple[ModelRunner, Any, int, Tensor],
) -> tuple[ModelRunner, list[tuple[int, int, int]], Tensor, int]:
    """Arguments of `forward`: the next block of each slot on its way into the cache, and the open ones behind them."""
    runner, _, length, tokens = given
    rows = [
        (0, length, length),
        (1, 2 * length, 2 * length),
        (0, 2 * length, 2 * length),
        (1, 3 * length, 3 * length),
    ]
    return (
        runner,
        rows,
        torch.stack([tokens[slot, start : start + length] for slot, start, _ in rows]),
        2,
    )


def test_versions_share_positions_and_do_not_see_each_other(
    golden: tuple[str, Any, dict[str, Any]],
) -> None:
    runner, model, length, tokens = opened(golden)
    # The block behind the committed ones is pending: it is written by the same forward, and seen by
    # the versions.
    starts = (length, 2 * length)
    pending = torch.stack(
        [tokens[slot, start : start + length] for slot, start in enumerate(starts)]
    )
    versions = torch.randint(300, (2, 3, length), generator=torch.Generator().manual_seed(4))
    rows = [(slot, start, start) for slot, start in enumerate(starts)]
    for slot, start in enumerate(starts):
        rows += [(slot, start + (1 + version) * length, start + length) for version in range(3)]
    logits = forward(runner, rows, torch.cat((pending, versions.flatten(0, 1))), 6).unflatten(
        0, (2, 3)
    )
    for slot, start in enumerate(starts):
        for version in range(3):
            prefix = tokens[slot, : start + length]
            alone = torch.cat((prefix, versions[slot, version]))[None]
            expected = full_logits(model, alone, length, runner.mask_token_id)[0, -length:]
            torch.testing.assert_close(logits[slot, version], expected, atol=2e-5, rtol=1e-4)
    again = forward(
        runner, [(0, 2 * length, 2 * length), (1, 3 * length, 3 * length)], versions[:, 0], 2
    )
    torch.testing.assert_close(again, logits[:, 0], atol=2e-5, rtol=1e-4)
