"""Requests that come and go: prompts in chunks, shared prefixes, early ends, planned memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from parts import (
    COUNT,
    EOS,
    L,
    V,
    confident,
    drain,
    engine_of,
    random_prompts,
    recorder,
    request,
    results,
    run,
    scripted,
)

from dmax.cache import BlockCache
from dmax.engine.engine import Engine
from dmax.engine.prefix_cache import PrefixCache
from dmax.engine.request import Request
from dmax.engine.scheduler import SHORT_PROMPT
from dmax.errors import InputError
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams

Golden = tuple[str, Any, dict[str, Any]]


def tokens_of(outputs: dict[int, GenerationOutput]) -> dict[int, tuple[int, ...]]:
    return {index: output.token_ids for index, output in outputs.items()}


# --- joining and leaving --------------------------------------------------------------------------


def test_requests_join_at_any_step_and_free_their_slot_at_once() -> None:
    table = confident(COUNT * 5, 0.6)
    engine = scripted(table, max_batch_size=2, max_length=5 * L)
    long = request((1,), 0, max_new_tokens=4 * L)
    short = request((1,), 1, max_new_tokens=L - 1)
    engine.add(long)
    engine.step()
    engine.add(short)
    engine.add(request((1, 2, 3), 2, max_new_tokens=5))
    finished = drain(engine)
    # The third took the second's slot while the first still ran.
    assert list(finished) == [1, 2, 0]
    for each in (long, short):
        assert finished[each.index] == run(scripted(table), each)[each.index]


def test_a_long_prompt_is_encoded_between_the_steps_of_others() -> None:
    table = confident([1] * 160, 0.6)
    engine = scripted(table, max_batch_size=2, max_length=160, prefill_tokens=2 * L)
    shown = request((1,) * 3, 0, strategy="autoregressive", max_new_tokens=2 * L)
    engine.add(replace(shown, provisional=True))
    engine.step()
    engine.add(request((1,) * (12 * L), 1, max_new_tokens=L))
    for round_ in (1, 2, 3):
        # A chunk of two blocks a round, and a step of the first request each time.
        (event,) = engine.step()
        assert (event.index, event.step) == (0, 1 + round_)
        assert engine.runner.cache.lengths[1] == round_ * 2 * L
    output = drain(engine)[1]
    assert output.num_prefill_forwards == 6
    assert output.num_forwards == 2


@pytest.mark.parametrize(
    ("num_blocks", "prefills", "own"), [(0, 0, 0), (SHORT_PROMPT, 1, 0), (5 + SHORT_PROMPT, 2, 1)]
)
def test_a_short_prompt_goes_along_with_the_first_step(
    golden: Golden, num_blocks: int, prefills: int, own: int
) -> None:
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=length)
    (prompt,) = random_prompts(num_blocks * length + 3)
    calls = list[int]()
    handle = checkpoint.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    output = run(engine_of(checkpoint, prefill_tokens=5 * length), Request(0, prompt, params))[0]
    handle.remove()
    cost = output.cost
    assert cost.num_prefill_forwards == prefills
    assert len(calls) == cost.num_forwards + own
    # Two open blocks, the first of which goes into the cache; the prompt does not count.
    assert cost.num_positions == (cost.num_forwards + 1) * length


def test_chunks_do_not_change_what_is_decoded(golden: Golden) -> None:
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=24)
    requests = [Request(index, ids, params) for index, ids in enumerate(random_prompts(70, 40, 5))]
    whole = run(engine_of(checkpoint), *requests)
    chunked = run(engine_of(checkpoint, prefill_tokens=length), *requests)
    assert tokens_of(chunked) == tokens_of(whole)
    assert chunked[0].num_prefill_forwards == 70 // length


# --- early ends -----------------------------------------------------------------------------------


def test_a_cancelled_request_keeps_its_finished_blocks_and_frees_its_slot() -> None:
    engine = scripted(confident(COUNT * 5), max_batch_size=1, max_length=5 * L)
    engine.add(request((1,), 0, max_new_tokens=4 * L))
    engine.add(request((1,), 1, max_new_tokens=7))
    engine.step()
    assert engine.cancel(0) is True
    finished = drain(engine)
    assert finished[0].finish_reason == "cancelled"
    assert finished[0].token_ids == tuple(COUNT[1:])
    assert finished[1].finish_reason == "length"
    assert engine.cancel(0) is False


def test_a_waiting_request_can_be_cancelled() -> None:
    engine = scripted(confident(COUNT * 5), max_batch_size=1, max_length=5 * L)
    for index in range(2):
        engine.add(request((1,), index))
    engine.cancel(1)
    output = drain(engine)[1]
    assert (output.finish_reason, output.token_ids) == ("cancelled", ())
    assert output.tokens_per_forward == 0.0  # there was no forward to divide by


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    now = [0.0]
    engine = scripted(
        confident(COUNT * 5), clock=lambda: now[0], max_batch_size=1, max_length=5 * L
    )
    engine.add(request((1,), 0, max_new_tokens=4 * L, deadline=5.0))
    engine.add(request((1,), 1, deadline=5.0))
    engine.step()
    engine.step()
    now[0] = 5.0
    finished = drain(engine)
    assert (finished[0].finish_reason, len(finished[0].token_ids)) == ("deadline", 2 * L - 1)
    assert (finished[1].finish_reason, finished[1].token_ids) == ("deadline", ())


def test_a_run_that_is_given_up_leaves_nothing_behind() -> None:
    table = confident(COUNT * 5, 0.6)
    engine = scripted(table, max_batch_size=1)
    requests = [request((1,), index) for index in range(3)]
    for event in engine.run([replace(each, provisional=True) for each in requests]):
        assert event.index == 0
        break
    assert not engine.is_busy()
    assert not any(engine.cancel(index) for index in range(3))
    assert run(engine, *requests) == run(scripted(table, max_batch_size=1), *requests)


def test_an_engine_in_use_does_not_run_others() -> None:
    engine = scripted(confident(COUNT * 5))
    engine.add(request((1,), 0))
    with pytest.raises(ValueError, match="the engine is busy"):
        next(engine.run([request((1,), 1)]))
    assert list(drain(engine)) == [0]


def test_ignoring_eos_goes_on_to_the_limit() -> None:
    tokens = [1, 2, 3, EOS, 5, 6, 7, 8] * 4
    asked = request((1, 2), max_new_tokens=12, ignore_eos=True)
    output = run(scripted(confident(tokens)), asked)[0]
    assert output.token_ids == (3, EOS, 5, 6, 7, 8, 1, 2, 3, EOS, 5, 6)
    assert output.finish_reason == "length"


def test_a_stop_ends_the_request_with_its_block() -> None:
    def find_stop(ids: Sequence[int]) -> int | None:
        ends = range(2, len(ids) + 1)
        return next((end for end in ends if tuple(ids[end - 2 : end]) == (8, 1)), None)

    params = DecodingParams(strategy="spd", max_new_tokens=4 * L)
    output = run(scripted(confident(COUNT * 6)), Request(0, (1, 2), params, find_stop))[0]
    assert output.token_ids == (3, 4, 5, 6, 7, 8, 1)  # over the border of two blocks
    assert output.finish_reason == "stop"
    assert output.num_forwards == 2


# --- memory ---------------------------------------------------------------------------------------


def test_memory_is_planned_at_the_start() -> None:
    engine = scripted(confident(COUNT * 9), max_batch_size=3, max_length=3 * L + 1)
    cache = engine.runner.cache
    assert (cache.capacity, len(cache.lengths)) == (4 * L, 3)
    engine.add(request((1,), 0, max_new_tokens=4 * L - 1))
    with pytest.raises(InputError, match=r"needs 40 positions, the engine was planned for 32"):
        engine.add(request((1,), 1, max_new_tokens=4 * L))
    drain(engine)
    assert engine.runner.cache is cache


def test_branches_of_a_block_count_against_the_plan() -> None:
    engine = scripted(confident(COUNT * 9), max_length=4 * L)
    options = {"num_branches": 3}
    with pytest.raises(InputError, match=r"needs 48 positions"):
        engine.add(request((1,), 1, max_new_tokens=4 * L - 1, strategy="lopa", options=options))


@pytest.mark.parametrize("strategy", ["spd", "threshold", "iter_smooth", "mbd", "lopa"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_memory_grows_under_requests_in_progress(
    strategy: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First for more sequences, then for a longer one; none of them notices."""
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: recorder([]))
    table = torch.randn(128, V, generator=torch.Generator().manual_seed(0))
    settings = {"strategy": strategy, "threshold": 0.4, "max_new_tokens": 4 * L, "ignore_eos": True}
    requests = [
        request((1,) * length, index, **settings)
        for index, length in enumerate((5, 3, 9, 70, 1, 2))
    ]
    alone = {each.index: run(scripted(table, react=3.0), each)[each.index] for each in requests}
    engine = scripted(table, react=3.0, cuda_graphs=cuda_graphs, max_batch_size=5)
    outputs: dict[int, GenerationOutput] = {}
    sizes = []
    for each in requests:
        engine.add_all([each])
        cache = engine.runner.cache
        sizes.append((len(cache.lengths) - cuda_graphs, cache.capacity >= 70 + 4 * L))
        for _ in range(2):
            outputs |= results(engine.step())
    assert outputs | drain(engine) == alone
    assert sizes == [(1, False), (2, False), (4, False), (4, True), (5, True), (5, True)]


@pytest.mark.parametrize("golden", ["llada2_moe_c"], indirect=True)
def test_keys_and_values_move_along_when_memory_grows(golden: Golden) -> None:
    _, checkpoint, _ = golden
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=48)
    prompts = random_prompts(70, 3, 200)
    requests = [Request(index, ids, params) for index, ids in enumerate(prompts)]
    alone = {each.index: run(engine_of(checkpoint), each)[each.index] for each in requests}
    engine = engine_of(checkpoint)
    for each in requests:
        engine.add_all([each])
        assert not results(engine.step())
    assert drain(engine) == alone


@pytest.mark.parametrize("golden", ["llada2_moe_c"], indirect=True)
def test_d11_what_the_cache_holds_behind_a_sequence_is_never_seen(golden: Golden) -> None:
    """Neither zeros, which the published engine attends to, nor anything else."""
    _, checkpoint, _ = golden
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=48)
    prompts = random_prompts(70, 3, 40)
    requests = [Request(index, ids, params) for index, ids in enumerate(prompts)]
    expected = run(engine_of(checkpoint), *requests)
    engine = engine_of(checkpoint)
    engine.add_all(requests)
    for layer in (*engine.runner.cache.keys, *engine.runner.cache.values):
        assert not layer.any()
        layer.fill_(30.0)
    assert drain(engine) == expected


# --- shared prefixes ------------------------------------------------------------------------------


def blocks_restored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets how many blocks of each prompt the prefix cache knew."""
    prefix_cache = engine.prefix_cache
    assert prefix_cache is not None
    restore = prefix_cache.restore
    known = list[int]()

    def counted(cache: BlockCache, slot: int, prompt_ids: tuple[int, ...]) -> None:
        restore(cache, slot, prompt_ids)
        known.append(cache.lengths[slot] // engine.block_length)

    monkeypatch.setattr(prefix_cache, "restore", counted)
    return known


def test_a_shared_prefix_is_encoded_once(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=16)
    prompts = random_prompts(length + 1, length + 2, length, shared=3 * length)
    requests = [Request(index, ids, params) for index, ids in enumerate(prompts)]
    plain = run(engine_of(checkpoint), *requests)
    engine = engine_of(checkpoint, prefix_cache_mib=16, max_batch_size=1)
    hits = blocks_restored(engine, monkeypatch)
    assert tokens_of(run(engine, *requests)) == tokens_of(plain)
    assert hits == [0, 3, 3]  # of four blocks each
    again = run(engine, requests[0])[0]
    assert again.num_prefill_forwards == 0
    assert again.token_ids == plain[0].token_ids


def test_the_prefix_cache_drops_the_oldest_leaves() -> None:
    store = BlockCache(1, 1, 4, 1, 1)
    block = 8 * 2  # bytes of a block of two positions
    cache = PrefixCache(2, 3 * block)

    def put(*ids: int) -> None:
        store.release(0)
        store.write(0, *[torch.tensor(ids, dtype=torch.float32).view(1, -1, 1, 1)] * 2)
        cache.store(store, 0, ids)

    def known(*ids: int) -> int:
        store.release(0)
        cache.restore(store, 0, ids)
        return store.lengths[0]

    def num_bytes() -> int:
        return sum(tensor.nbytes for kept in cache._blocks.values() for tensor in kept)

    put(1, 2, 3, 4)
    put(1, 2, 5, 6)
    assert num_bytes() == 3 * block
    assert known(1, 2, 3, 4) == 4
    assert store.keys[0][0, :, 0, 0].tolist() == [1, 2, 3, 4]
    put(7, 8)
    # The stem stays as long as it has leaves.
    assert (known(1, 2, 5, 6), known(1, 2, 3, 4), known(7, 8)) == (2, 4, 2)
    assert num_bytes() == 3 * block
    assert known(1, 9, 3, 4) == 0
    too_small = PrefixCache(2, block - 1)
    too_small.store(store, 0, (1, 2))
    assert not too_small._blocks
