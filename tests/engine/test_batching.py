"""Requests that come and go: prompts in chunks, shared prefixes, early ends, planned memory, captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import EOS, L, confident, engine_of, request, run, scripted

from dmax.cache import BlockCache
from dmax.engine.engine import RIDING_BLOCKS, Engine
from dmax.engine.graphs import GraphedSteps, Step
from dmax.engine.prefix import PrefixCache
from dmax.engine.request import Completion, FinishedEvent, Request
from dmax.engine.rows import Row, Rows, Shape
from dmax.errors import InputError
from dmax.params import DecodingParams

COUNT = [1, 2, 3, 4, 5, 6, 7, 8]


def drain(engine: Engine) -> dict[int, Any]:
    """Steps until nothing is left; the completions by request."""
    done = {}
    while engine.is_busy():
        done |= {
            event.index: event.completion
            for event in engine.step()
            if isinstance(event, FinishedEvent)
        }
    return done


def tokens_of(completions: dict[int, Completion]) -> dict[int, tuple[int, ...]]:
    return {index: completion.token_ids for index, completion in completions.items()}


def random_prompts(*lengths: int, shared: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(300, (shared,), generator=generator).tolist()
    return [tuple(start + torch.randint(300, (n,), generator=generator).tolist()) for n in lengths]


# --- joining and leaving --------------------------------------------------------------------------


def test_requests_join_at_any_step_and_free_their_slot_at_once() -> None:
    engine = scripted(confident(COUNT * 5, 0.6), max_batch_size=2, max_length=5 * L)
    long, short = request((1,), 0, max_new_tokens=4 * L), request((1,), 1, max_new_tokens=L - 1)
    engine.add(long)
    engine.step()
    engine.add(short)
    engine.add(request((1, 2, 3), 2, max_new_tokens=5))
    finished = drain(engine)
    assert list(finished) == [1, 2, 0]  # the third took the second's slot while the first still ran
    for r in (long, short):
        assert finished[r.index] == run(scripted(confident(COUNT * 5, 0.6)), r)[r.index]


def test_a_long_prompt_is_encoded_between_the_steps_of_others() -> None:
    engine = scripted(
        confident([1] * 160, 0.6), max_batch_size=2, max_length=160, prefill_tokens=2 * L
    )
    engine.add(request((1,) * 3, 0, max_new_tokens=2 * L))
    engine.step()
    engine.add(request((1,) * (12 * L), 1, max_new_tokens=L))
    for _ in range(3):  # a chunk of two blocks a round, and a step of the first request each time
        before = engine._flights[0].counters.num_forwards
        engine.step()
        assert engine._flights[0].counters.num_forwards == before + 1
    assert engine._flights[1].counters.num_prefill_forwards == 3
    assert engine._flights[1].counters.num_forwards == 0
    assert drain(engine)[1].counters.num_prefill_forwards == 6


@pytest.mark.parametrize(
    ("num_blocks", "prefills", "own"), [(0, 0, 0), (RIDING_BLOCKS, 1, 0), (5 + RIDING_BLOCKS, 2, 1)]
)
def test_a_short_prompt_goes_along_with_the_first_step(
    golden: tuple[str, Any, dict[str, Any]], num_blocks: int, prefills: int, own: int
) -> None:
    _, checkpoint, _ = golden
    length, calls = checkpoint.special_ids.block_length, []
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=length)
    (prompt,) = random_prompts(num_blocks * length + 3)
    handle = checkpoint.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    folded = run(engine_of(checkpoint, prefill_tokens=5 * length), Request(0, prompt, params))[0]
    handle.remove()
    counters = folded.counters
    assert counters.num_prefill_forwards == prefills
    assert len(calls) == counters.num_forwards + own
    apart = run(engine_of(checkpoint, commit="separate"), Request(0, prompt, params))[0]
    assert apart.token_ids == folded.token_ids
    assert apart.counters.num_commit_forwards == 1  # of the first block, none for the prompt
    assert apart.counters.num_positions == counters.num_positions


def test_chunks_do_not_change_what_is_decoded(golden: tuple[str, Any, dict[str, Any]]) -> None:
    _, checkpoint, _ = golden
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=24)
    requests = [Request(index, ids, params) for index, ids in enumerate(random_prompts(70, 40, 5))]
    whole = run(engine_of(checkpoint), *requests)
    chunked = run(
        engine_of(checkpoint, prefill_tokens=checkpoint.special_ids.block_length), *requests
    )
    assert tokens_of(chunked) == tokens_of(whole)
    assert chunked[0].counters.num_prefill_forwards == 70 // checkpoint.special_ids.block_length


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
    assert drain(engine)[1].token_ids == ()


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    now = [0.0]
    engine = scripted(
        confident(COUNT * 5), max_batch_size=1, max_length=5 * L, clock=lambda: now[0]
    )
    engine.add(request((1,), 0, max_new_tokens=4 * L, deadline=5.0))
    engine.add(request((1,), 1, deadline=5.0))
    engine.step()
    engine.step()
    now[0] = 5.0
    finished = drain(engine)
    assert (finished[0].finish_reason, len(finished[0].token_ids)) == ("deadline", 2 * L - 1)
    assert (finished[1].finish_reason, finished[1].token_ids) == ("deadline", ())


def test_nan_logits_end_one_request_and_not_the_others() -> None:
    table = confident(COUNT * 5)
    table[2 * L + 1] = torch.nan
    engine = scripted(table, max_batch_size=2, max_length=5 * L)
    engine.add(request((1,) * (2 * L), 0, max_new_tokens=L))
    engine.add(request((1,), 1, max_new_tokens=L - 1))
    with pytest.raises(InputError, match="NaN logits for prompt 0"):
        drain(engine)
    assert drain(engine)[1].token_ids == tuple(COUNT[1:])


def test_what_others_did_in_a_round_that_raised_is_told_in_the_next() -> None:
    table = confident(COUNT * 5)
    table[2 * L + 1] = torch.nan
    engine = scripted(table, max_batch_size=4, max_length=5 * L)
    engine.add(
        request((1,), 0, max_new_tokens=L - 1)
    )  # settled before the broken one, done with its first step
    engine.add(request((1,) * (2 * L), 1, max_new_tokens=L))
    engine.add(request((1,), 2, max_new_tokens=2 * L - 1))  # settled behind it
    engine.add(request((2,) * (2 * L), 3, max_new_tokens=L))
    for broken in (1, 3):
        with pytest.raises(InputError, match=f"NaN logits for prompt {broken}"):
            engine.step()
    finished = drain(engine)
    assert list(finished) == [0, 2]
    assert finished[0].token_ids == tuple(COUNT[1:])
    assert (
        finished[2]
        == run(scripted(confident(COUNT * 5)), request((1,), 2, max_new_tokens=2 * L - 1))[2]
    )


def test_a_run_that_is_given_up_leaves_nothing_behind() -> None:
    engine = scripted(confident(COUNT * 5, 0.6), max_batch_size=1)
    requests = [request((1,), index) for index in range(3)]
    for event in engine.run(requests, provisional=True):
        assert event.index == 0
        break
    assert not engine.is_busy()
    assert not any(engine.cancel(index) for index in range(3))
    assert run(engine, *requests) == run(
        scripted(confident(COUNT * 5, 0.6), max_batch_size=1), *requests
    )


def test_ignoring_eos_goes_on_to_the_limit() -> None:
    tokens = [1, 2, 3, EOS, 5, 6, 7, 8] * 4
    completion = run(
        scripted(confident(tokens)), request((1, 2), max_new_tokens=12, ignore_eos=True)
    )[0]
    assert completion.token_ids == (3, EOS, 5, 6, 7, 8, 1, 2, 3, EOS, 5, 6)
    assert completion.finish_reason == "length"


def test_a_stop_ends_the_request_with_its_block() -> None:
    def find_stop(ids: Any) -> int | None:
        return next((n for n in range(2, len(ids) + 1) if tuple(ids[n - 2 : n]) == (8, 1)), None)

    asked = request((1, 2), max_new_tokens=4 * L)
    completion = run(
        scripted(confident(COUNT * 6)), Request(0, asked.prompt_ids, asked.params, find_stop)
    )[0]
    assert completion.token_ids == (3, 4, 5, 6, 7, 8, 1)  # over the border of two blocks
    assert completion.finish_reason == "stop"
    assert completion.counters.num_forwards == 2


# --- memory ---------------------------------------------------------------------------------------


def test_memory_is_planned_at_the_start() -> None:
    engine = scripted(confident(COUNT * 9), max_batch_size=3, max_length=3 * L + 1)
    cache = engine._runner.cache
    assert (cache.capacity, len(cache.lengths)) == (4 * L, 3)
    engine.add(request((1,), 0, max_new_tokens=4 * L - 1))
    with pytest.raises(InputError, match=r"needs 40 positions, the engine was planned for 32"):
        engine.add(request((1,), 1, max_new_tokens=4 * L))
    drain(engine)
    assert engine._runner.cache is cache


def test_versions_of_a_block_count_against_the_plan() -> None:
    engine = scripted(confident(COUNT * 9), max_length=4 * L)
    with pytest.raises(InputError, match=r"needs 48 positions"):
        engine.add(
            request((1,), 1, max_new_tokens=4 * L - 1, strategy="lopa", options={"num_branches": 3})
        )


def test_a_busy_engine_without_a_plan_refuses_what_does_not_fit() -> None:
    engine = scripted(confident(COUNT * 9))
    engine.add(request((1,), 0, max_new_tokens=L))
    with pytest.raises(InputError, match="while others are running"):
        engine.add(request((1,), 1, max_new_tokens=4 * L))
    drain(engine)
    engine.add(request((1,), 1, max_new_tokens=4 * L))
    assert len(drain(engine)[1].token_ids) == 4 * L


# --- shared prefixes ------------------------------------------------------------------------------


def test_a_shared_prefix_is_encoded_once(golden: tuple[str, Any, dict[str, Any]]) -> None:
    _, checkpoint, _ = golden
    length = checkpoint.special_ids.block_length
    cache = PrefixCache(length, 2**24)
    params = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=16)
    prompts = random_prompts(length + 1, length + 2, length, shared=3 * length)
    plain = run(engine_of(checkpoint), *[Request(i, ids, params) for i, ids in enumerate(prompts)])
    engine = engine_of(checkpoint, prefix_cache=cache, max_batch_size=1)
    shared = run(engine, *[Request(i, ids, params) for i, ids in enumerate(prompts)])
    assert tokens_of(shared) == tokens_of(plain)
    assert (cache.hits, cache.misses) == (6, 6)
    again = run(engine, Request(0, prompts[0], params))[0]
    assert again.counters.num_prefill_forwards == 0
    assert again.token_ids == plain[0].token_ids


def test_the_prefix_cache_drops_the_oldest_leaves() -> None:
    store, block = BlockCache(1, 1, 4, 1, 1), 8 * 2  # bytes of a block of two positions
    cache = PrefixCache(2, 3 * block)

    def put(*ids: int) -> None:
        store.rollback(0)
        store.write(0, *[torch.tensor(ids, dtype=torch.float32).view(1, -1, 1, 1)] * 2)
        cache.store(store, 0, ids)

    def known(*ids: int) -> int:
        store.rollback(0)
        return cache.restore(store, 0, ids)

    put(1, 2, 3, 4)
    put(1, 2, 5, 6)
    assert cache.num_bytes == 3 * block
    assert known(1, 2, 3, 4) == 4
    assert store.keys[0][0, :, 0, 0].tolist() == [1, 2, 3, 4]
    put(7, 8)
    assert (known(1, 2, 5, 6), known(1, 2, 3, 4), known(7, 8)) == (
        2,
        4,
        2,
    )  # the stem stays as long as it has leaves
    assert cache.num_bytes == 3 * block
    assert known(1, 9, 3, 4) == 0
    assert PrefixCache(2, block - 1).store(store, 0, (1, 2)) is None


# --- captured steps -------------------------------------------------------------------------------


def test_captured_steps_decode_the_same(
    golden: tuple[str, Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder that only repeats the step: filled-up batches, rounded spans and fixed inputs are as on a GPU."""
    _, checkpoint, _ = golden
    captured = []

    def record(step: Step) -> Step:
        step()  # as the warm-up does
        captured.append(step)
        return step

    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: record)
    prompts = random_prompts(3, 17, 16, 40, 1)
    for strategy, threshold in (("threshold", 0.9), ("threshold", 0.3), ("d2f", 0.9)):
        params = DecodingParams(strategy=strategy, threshold=threshold, max_new_tokens=48)
        requests = [Request(index, ids, params) for index, ids in enumerate(prompts)]
        eager = run(engine_of(checkpoint), *requests)
        assert run(engine_of(checkpoint, cuda_graphs=True), *requests) == eager
        assert (
            run(engine_of(checkpoint, cuda_graphs=True, max_batch_size=3), *requests[::-1]) == eager
        )
    assert captured


def test_spd_steps_are_captured_with_their_soft_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmax.engine.graphs.CudaCapture", lambda: lambda step: step)
    table = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    requests = [request((1,) * n, n, threshold=0.3, max_new_tokens=3 * L) for n in (1, 9, 20)]
    assert run(scripted(table, react=3.0, cuda_graphs=True), *requests) == run(
        scripted(table, react=3.0), *requests
    )


@torch.inference_mode()
def test_steps_of_one_shape_share_a_graph() -> None:
    engine = scripted(
        confident([1] * 160, 0.6), max_batch_size=4, max_length=160, cuda_graphs=False
    )
    for index in range(3):
        engine.add(request((1,), index, max_new_tokens=2 * L))
    engine.step()
    lane = engine._flights[0].lane
    num_captures = 0

    def record(step: Step) -> Step:
        nonlocal num_captures
        num_captures += 1
        return step

    steps = GraphedSteps(3, 160, record)
    for num_rows in (3, 3, 3, 4, 2, 2):
        rows, nothing = (
            [Row(slot, 0, 0, slot) for slot in range(num_rows)],
            torch.zeros(0, L, dtype=torch.long),
        )
        flags = steps(
            engine._runner, lane, Shape.of(rows, num_rows, L), Rows(torch.tensor(rows).T, nothing)
        )
        assert flags.shape == (6, num_rows)
    assert (
        num_captures == 2
    )  # three rows filled up to four, and two; four in order, read without a copy, came once
