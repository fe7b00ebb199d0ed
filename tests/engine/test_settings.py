"""Requests with settings of their own: which of them share forwards, and what memory that takes."""

from __future__ import annotations

import random
from typing import Any
from weakref import WeakSet

import pytest
import torch
from parts import (
    COUNT,
    EOS,
    L,
    ScriptedModel,
    confident,
    engine_of,
    random_prompts,
    request,
    run,
    scripted,
)
from torch import Tensor

from dmax.engine.blocks import OpenBlocks
from dmax.engine.engine import MAX_IDLE
from dmax.engine.request import Request
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams

Golden = tuple[str, Any, dict[str, Any]]
MANY = 1000


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> WeakSet[OpenBlocks]:
    """All `OpenBlocks` that an engine has made and still keeps."""
    found = WeakSet[OpenBlocks]()

    class Counted(OpenBlocks):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.add(self)

    monkeypatch.setattr("dmax.engine.engine.OpenBlocks", Counted)
    return found


def num_bytes(blocks: OpenBlocks) -> int:
    """Memory of its tensors."""
    tensors = [value for value in vars(blocks).values() if isinstance(value, Tensor)]
    for named in (blocks.numbers, blocks.state, blocks.feedback):
        tensors += named.values()
    return sum(tensor.nbytes for tensor in tensors)


def hard_table() -> Tensor:
    """Logits that take settings of any kind to decide about, with an EOS now and then."""
    generator = torch.Generator().manual_seed(1)
    table = 2 * torch.randn(6 * L, 12, generator=generator)
    table[3 * L - 2] = confident([EOS])[0]
    return table


def numbers(index: int) -> dict[str, Any]:
    """Settings that no two of the requests have in common."""
    chance = random.Random(index)
    return {
        "threshold": (index + 0.5) / MANY,
        "stop_confidence": 1 - chance.random(),
        "temperature": chance.choice([0.0, 0.3 + chance.random()]),
        "seed": index,
        "max_steps_per_block": chance.randrange(1, 2 * L),
        "ignore_eos": chance.random() < 0.5,
        "max_new_tokens": chance.randrange(1, 3 * L),
    }


def prompt(index: int) -> tuple[int, ...]:
    return tuple(random.Random(index).choices(range(10), k=1 + index % (2 * L)))


OPTIONS = {
    "spd": {},
    "threshold": {},
    "credit": {"alpha": 1.4, "decay": 1.0, "power": 1.0},
    "sched": {"high": 9.0, "low": 2.0, "rate": 8.0},
    "iter_smooth": {"weight": 0.6, "first": 0.3, "growth": 0.1},
    "mbd": {"opens_at": 1.0, "forces_at": 1.0},
    "hierarchy": {"low": 1.0},
}


def requests_of(strategy: str) -> list[Request]:
    """A thousand; options that are numbers lie between nothing and the largest in `OPTIONS`."""
    asked = []
    for index in range(MANY):
        chance = random.Random(-index)
        options = {name: chance.random() * most for name, most in OPTIONS[strategy].items()}
        if strategy == "sched":
            options["low"] = min(options["low"], options["high"])
        asked.append(
            request(prompt(index), index, strategy=strategy, options=options, **numbers(index))
        )
    return asked


@pytest.mark.parametrize("strategy", OPTIONS)
def test_requests_that_differ_in_numbers_share_every_forward(
    strategy: str, alive: WeakSet[OpenBlocks]
) -> None:
    requests = requests_of(strategy)
    # Room to encode all prompts at once: all start with the first step.
    engine = scripted(
        hard_table(), react=2.0, max_batch_size=MANY, max_length=6 * L, prefill_tokens=2 * L * MANY
    )
    model: ScriptedModel = engine.model
    for each in requests:
        engine.add(each)
    finished = {}
    num_steps = 0
    while engine.is_busy():
        for event in engine.step():
            if event.kind == "finished":
                finished[event.index] = event.output
        num_steps += 1
    assert model.num_calls == num_steps
    assert num_steps == max(output.num_forwards for output in finished.values())
    assert len(alive) == 1

    alone = scripted(hard_table(), react=2.0, max_batch_size=1)
    chosen = requests[:: MANY // 40]
    assert {each.index: run(alone, each)[each.index] for each in chosen} == {
        each.index: finished[each.index] for each in chosen
    }
    assert len({output.token_ids for output in finished.values()}) > MANY // 4
    assert len({output.num_forwards for output in finished.values()}) > 5


def test_memory_does_not_grow_with_the_number_of_settings(alive: WeakSet[OpenBlocks]) -> None:
    engine = scripted(hard_table(), react=2.0, max_batch_size=4, max_length=6 * L)
    requests = requests_of("spd")
    run(engine, *requests[:8])
    (blocks,) = alive
    expected = num_bytes(blocks)
    run(engine, *requests)
    assert list(alive) == [blocks]
    assert num_bytes(blocks) == expected


def test_what_is_no_number_keeps_a_bounded_number_of_open_blocks(
    alive: WeakSet[OpenBlocks],
) -> None:
    engine = scripted(confident(COUNT * 4, 0.6), max_batch_size=1)
    for steps in range(1, MANY + 1):
        asked = request((1, 2), strategy="llada", options={"steps": steps}, max_new_tokens=4)
        assert run(engine, asked)[0].num_forwards == min(steps, L - 2)
        assert len(alive) <= MAX_IDLE + 1


def test_open_blocks_in_use_are_never_dropped() -> None:
    num = 3 * MAX_IDLE
    table = confident(COUNT * 4, 0.6)

    def asked(steps: int) -> Request:
        return request((1, 2), steps, strategy="llada", options={"steps": steps + 1})

    together = run(scripted(table, max_batch_size=num), *map(asked, range(num)))
    assert together == {index: run(scripted(table), asked(index))[index] for index in range(num)}


def test_a_strategy_that_is_used_again_finds_its_open_blocks(alive: WeakSet[OpenBlocks]) -> None:
    engine = scripted(confident(COUNT * 4, 0.6), max_batch_size=2)
    run(engine, request((1, 2), threshold=0.3))
    (before,) = alive
    for index in range(MAX_IDLE - 1):
        run(engine, request((1, 2), strategy="llada", options={"steps": index + 1}))
    run(engine, request((1, 2), threshold=0.7))
    assert before in alive and len(alive) == MAX_IDLE


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("sched", {"high": 1e300, "low": 1e300}),
        ("credit", {"power": 1e300}),
        ("entropy_bound", {"bound": 1e300}),
    ],
)
def test_numbers_may_be_larger_than_a_tensor_holds(
    strategy: str, options: dict[str, float]
) -> None:
    def decoded(scale: float) -> GenerationOutput:
        own = {name: value * scale for name, value in options.items()}
        table = confident(COUNT * 4, 0.6)
        return run(scripted(table), request((1, 2), strategy=strategy, options=own))[0]

    assert decoded(1.0) == decoded(1e-265)  # 1e35, which it holds


def test_settings_of_a_slot_are_those_of_its_last_request() -> None:
    engine = scripted(confident(COUNT * 4, 0.6), max_batch_size=1)
    for threshold, stop, steps in ((0.5, 0.9, None), (0.9, 0.9, 3), (0.5, 0.5, None)):
        settings = {
            "threshold": threshold,
            "stop_confidence": stop,
            "max_steps_per_block": steps,
        }
        again = run(engine, request((1,), **settings))[0]
        fresh = run(scripted(confident(COUNT * 4, 0.6)), request((1,), **settings))[0]
        assert again == fresh
    assert fresh.num_forwards == 3


@pytest.mark.parametrize("strategy", ["threshold", "credit", "hierarchy"])
def test_greedy_and_sampled_requests_share_a_forward(golden: Golden, strategy: str) -> None:
    _, checkpoint, _ = golden
    prompts = random_prompts(3, 17, 16, 40, 1, 25)
    requests = [
        Request(
            index,
            ids,
            DecodingParams(
                strategy,
                threshold=0.6,
                max_new_tokens=24,
                temperature=0.7 * (index % 2),
                seed=index,
            ),
        )
        for index, ids in enumerate(prompts)
    ]
    engine = engine_of(checkpoint, max_length=64)
    for each in requests:
        engine.add(each)
    finished = {}
    while engine.is_busy():
        engine.prepare()
        assert len(list(engine.batches())) == 1
        for event in engine.step():
            if event.kind == "finished":
                finished[event.index] = event.output
    assert finished == {
        each.index: run(engine_of(checkpoint), each)[each.index] for each in requests
    }
