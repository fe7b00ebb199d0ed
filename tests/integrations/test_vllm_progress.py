"""Blocks as vLLM's draft tokens, without vLLM: the tokens and forwards of our own engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from host import Host, decode_alone, small_engine

from dmax.baselines.credit import CreditDecoding
from dmax.decoding import get_strategy
from dmax.engine.engine import Engine
from dmax.errors import InputError
from dmax.integrations.slots import Slots
from dmax.integrations.vllm.logprobs import best
from dmax.integrations.vllm.progress import block_rows
from dmax.params import DecodingParams

SETTINGS: list[dict[str, Any]] = [
    {"strategy": "spd", "threshold": 0.3},
    {"strategy": "spd", "threshold": 0.6, "top_k": 2},
    {"strategy": "threshold", "threshold": 0.4},
    {"strategy": "threshold", "threshold": 0.8},
    {"strategy": "credit", "threshold": 0.6},
    {"strategy": "joint_threshold", "threshold": 0.5},
    {"strategy": "iter_smooth", "threshold": 0.6},
    {"strategy": "spd", "threshold": 0.5, "max_steps_per_block": 2},
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return small_engine(len(SETTINGS))


def prompts(engine: Engine, number: int) -> list[tuple[int, ...]]:
    """Prompts of 3, 6, 9, … tokens: shorter than a block, with and without a tail in the last."""
    generator = torch.Generator().manual_seed(1)
    mask = engine.special_ids.mask_token_id
    vocabulary = [token for token in range(engine.model.config.vocab_size) if token != mask]
    picked = [
        torch.randint(len(vocabulary), (3 * size,), generator=generator).tolist()
        for size in range(1, number + 1)
    ]
    return [tuple(vocabulary[index] for index in indices) for indices in picked]


def params_of(engine: Engine, settings: dict[str, Any]) -> DecodingParams:
    return DecodingParams(max_new_tokens=3 * engine.block_length, **settings)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_mixed_batch_gives_what_our_engine_gives(engine: Engine, is_async: bool) -> None:
    host = Host(engine, len(SETTINGS), is_async=is_async)
    asked = prompts(engine, len(SETTINGS))
    for slot, (prompt, settings) in enumerate(zip(asked, SETTINGS, strict=True)):
        host.add(slot, prompt, params_of(engine, settings))
    host.run()
    num_commits = 0
    for slot, guest in host.guests.items():
        wanted = decode_alone(engine, asked[slot], guest.params)
        assert tuple(guest.generated[: len(wanted.token_ids)]) == wanted.token_ids
        assert guest.forwards.num_forwards == wanted.num_forwards
        num_commits += guest.forwards.num_commit_forwards
    assert (num_commits > 0) == is_async, "a commit goes along with the next block if it can"


@pytest.mark.parametrize("is_async", [False, True])
def test_samples_are_those_of_our_engine(engine: Engine, is_async: bool) -> None:
    settings = {"strategy": "spd", "threshold": 0.3, "temperature": 0.8, "seed": 3}
    host = Host(engine, 2, is_async=is_async)
    asked = prompts(engine, 2)
    host.add(0, asked[0], params_of(engine, settings))
    host.add(1, asked[1], params_of(engine, {"strategy": "spd", "threshold": 0.3}))
    host.run()
    for slot, guest in host.guests.items():
        wanted = decode_alone(engine, asked[slot], guest.params)
        assert tuple(guest.generated[: len(wanted.token_ids)]) == wanted.token_ids


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_preempted_request_goes_on_as_if_nothing_had_been(
    engine: Engine, temperature: float
) -> None:
    settings = {"strategy": "spd", "threshold": 0.3, "temperature": temperature, "seed": 3}
    [prompt] = prompts(engine, 1)
    params = params_of(engine, settings)
    wanted = decode_alone(engine, prompt, params)
    for at in range(1, wanted.num_forwards + 1, 5):
        host = Host(engine, 1)
        guest = host.add(0, prompt, params)
        for _ in range(at):
            host.step()
        host.preempt(0)
        host.run()
        assert tuple(guest.generated[: len(wanted.token_ids)]) == wanted.token_ids, at


def test_probabilities_are_those_of_the_last_decision(engine: Engine) -> None:
    prompt = prompts(engine, 1)[0]
    host = Host(engine, 1)
    guest = host.add(
        0, prompt, params_of(engine, {"strategy": "spd", "threshold": 0.3}), logprobs=2
    )
    kept = host.progress.logprobs
    settled: list[float] = []
    original = kept.keep

    def keep(slots: list[int], rows: torch.Tensor, blocks: Any, logits: torch.Tensor) -> None:
        original(slots, rows, blocks, logits)
        settled[:] = blocks.confidence[0].tolist()  # SPD decides every token of a block anew

    kept.keep = keep  # type: ignore[assignment, method-assign]
    while not guest.generated:
        host.step()
    order = torch.arange(engine.block_length)[None]
    ids, values, ranks = kept.of(torch.tensor([0]), order, 2)
    first = len(prompt)  # of what is generated in the block
    assert ids[0, first:, 0].tolist() == guest.generated
    assert values[0, first:, 0].exp().tolist() == pytest.approx(settled[first:])
    assert (ranks[0, first:] == 1).all(), "without a temperature the best token is chosen"
    assert torch.equal(values[0, first:, 0], values[0, first:, 1])


def test_a_request_with_broken_logits_ends_and_the_others_go_on(engine: Engine) -> None:
    host = Host(engine, 2)
    asked = prompts(engine, 2)
    params = params_of(engine, {"strategy": "spd", "threshold": 0.3})
    broken = host.add(0, asked[0], params)
    whole = host.add(1, asked[1], params)
    host.step()
    original = host._logits

    def with_nan(*args: Any) -> torch.Tensor:
        logits = original(*args)
        logits[0, 0] = float("nan")
        return logits

    host._logits = with_nan  # type: ignore[method-assign]
    host.step()
    host._logits = original  # type: ignore[method-assign]
    assert broken.is_over
    host.run()
    wanted = decode_alone(engine, asked[1], params)
    assert tuple(whole.generated[: len(wanted.token_ids)]) == wanted.token_ids


def test_a_strategy_that_does_not_go_with_the_model_ends_its_own_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(engine, 2)
    host = Host(engine, 2)
    params = params_of(engine, {"strategy": "spd", "threshold": 0.3})
    other = host.add(0, asked[0], params_of(engine, {"strategy": "credit", "threshold": 0.6}))
    whole = host.add(1, asked[1], params)

    def fail(*_: Any) -> None:
        raise InputError("the head is of another model")

    monkeypatch.setattr(CreditDecoding, "step", fail)
    host.run()
    assert len(other.generated) == 1, "one token that means nothing"
    wanted = decode_alone(engine, asked[1], params)
    assert tuple(whole.generated[: len(wanted.token_ids)]) == wanted.token_ids


def test_requests_are_cut_into_rows_of_a_block() -> None:
    starts, owners, behind = block_rows(np.array([0, 5, 9, 12], dtype=np.int32), 4)
    assert starts.tolist() == [0, 4, 5, 9, 12]
    assert owners.tolist() == [0, 0, 1, 2]
    assert behind.tolist() == [1, 0, 0, 0]


def test_mask_takes_part_in_the_softmax_and_is_no_choice() -> None:
    logits = torch.tensor([[[2.0, 1.0, 3.0, 0.0]]])
    ids, values, ranks = best(logits, torch.tensor([[1]]), 2, mask_token_id=2)
    assert ids.tolist() == [[[1, 0, 1]]]
    assert ranks.tolist() == [[2]]
    expected = logits[0, 0].log_softmax(dim=-1)[[1, 0, 1]]
    torch.testing.assert_close(values[0, 0], expected)


def test_open_blocks_of_idle_strategies_are_dropped_some_time(engine: Engine) -> None:
    embed = engine.model.get_input_embeddings()
    slots = Slots(engine.special_ids, 2, embed, torch.device("cpu"))
    busy = DecodingParams(strategy="threshold")
    slots.admit(0, get_strategy(busy), busy)
    kept = slots.blocks(0)
    for top_k in range(1, 40):
        params = DecodingParams(strategy="spd", top_k=top_k)
        slots.admit(1, get_strategy(params), params)
    assert slots.blocks(0) is kept
    assert len(slots._blocks) < 15


def test_numbers_of_requests_share_their_open_blocks(engine: Engine) -> None:
    embed = engine.model.get_input_embeddings()
    slots = Slots(engine.special_ids, 4, embed, torch.device("cpu"))
    for slot, threshold in enumerate((0.1, 0.5, 0.5, 0.9)):
        params = DecodingParams(strategy="spd", threshold=threshold, temperature=slot % 2)
        slots.admit(slot, get_strategy(params), params)
    groups = list(slots.groups([3, 1, 0, 2]))
    assert [indices for _, indices in groups] == [[0, 1, 2, 3]], "samples beside the greedy"
    assert all(blocks is slots.blocks(0) for blocks, _ in groups)
    assert slots.blocks(0).numbers["threshold"][:4, 0].tolist() == pytest.approx(
        [0.1, 0.5, 0.5, 0.9]
    )
