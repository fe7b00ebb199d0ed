"""SPD's decision in one kernel: what it stores and its flags, bit for bit those of the twin.

The twin is `SoftParallelDecoding.step`, `apply` and `OpenBlocks.store`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmax.confidence import Candidates, GumbelNoise
from dmax.decoding import get_strategy
from dmax.decoding.block import Output
from dmax.decoding.spd import SoftParallelDecoding
from dmax.engine import step as engine_step
from dmax.engine.blocks import OpenBlocks
from dmax.engine.step import decide
from dmax.kernels import using
from dmax.kernels.decide import MAX_BLOCK_LENGTH, fits_kernel
from dmax.llm import LLM
from dmax.outputs import StreamEvent
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds
from dmax.tasks.word_problems import problems

MASK = 9
EOS = 8
STORED = ("tokens", "masked", "active", "written", "confidence", "step", "flags")
NAN = float("nan")


def spd(**changes: Any) -> DecodingParams:
    return DecodingParams("spd", 0.5, **{"stop_confidence": 0.75} | changes)


def new_blocks(
    requests: list[tuple[DecodingParams, int]], length: int, device: torch.device
) -> OpenBlocks:
    """A block for each pair of settings and number of prompt tokens it begins with."""
    strategy = get_strategy(requests[0][0])
    ids = SpecialIds(MASK, (EOS,), EOS, length)
    blocks = OpenBlocks(strategy, len(requests), ids, nn.Embedding(MASK + 1, 4).to(device), device)
    blocks.open(0)
    with using("torch"):  # a first step makes what later ones find in its place
        decided(blocks, torch.tensor([0]), random_candidates(1, length, requests[0][0].top_k))
    for slot, (params, num_known) in enumerate(requests):
        blocks.admit(slot, get_strategy(params), params)
        blocks.open(slot, [3] * num_known)
        blocks.written[slot] = False
    for values in blocks.feedback.values():
        values.zero_()
    return blocks


def predicted_by(ids: Tensor, probs: Tensor, broken: Tensor | None = None) -> Candidates:
    """Candidates [B, L, k] as a head gives them."""
    return Candidates(ids, probs, probs[..., 0].isnan() if broken is None else broken)


def random_candidates(num_blocks: int, length: int, k: int) -> Candidates:
    """Few tokens and coarse probabilities: blocks agree with themselves, and thresholds are met.

    One token in fifty is MASK, one block in twelve holds a NaN.
    """
    ids = torch.randint(2, (num_blocks, length, k))
    ids[torch.rand(ids.shape) < 0.02] = MASK
    probs = torch.randint(1, 9, (num_blocks, length, k)) / 8
    ids[torch.rand(num_blocks) < 0.3] = 1  # a block that agrees with what it was
    probs[torch.rand(num_blocks) < 0.2] = 0.875  # and one that is sure
    is_broken = (torch.rand(num_blocks, 1) < 1 / 12) & (torch.rand(num_blocks, length) < 0.1)
    probs[is_broken] = NAN
    return predicted_by(ids, probs)


def decided(blocks: OpenBlocks, rows: Tensor, predicted: Candidates) -> Tensor:
    """Flags of a step with these candidates."""
    device = blocks.tokens.device
    on_device = Candidates(*(each.to(device) for each in predicted))

    def top(k: int, noise: GumbelNoise | None) -> Candidates:
        return on_device

    return decide(blocks, rows.to(device), Output(torch.empty(0), MASK, top)).cpu()


def stored(blocks: OpenBlocks) -> dict[str, Tensor]:
    return {name: getattr(blocks, name).cpu() for name in STORED} | {
        name: values.cpu() for name, values in blocks.feedback.items()
    }


def check_step(twin: OpenBlocks, fused: OpenBlocks, rows: Tensor, predicted: Candidates) -> Tensor:
    """One step of both; the flags of the twin."""
    expected = decided(twin, rows, predicted)
    with using("triton"):
        found = decided(fused, rows, predicted)
    assert found.dtype == torch.bool
    assert found.tolist() == expected.tolist()
    want = stored(twin)
    have = stored(fused)
    assert have.keys() == want.keys()
    for name, values in want.items():
        assert have[name].dtype == values.dtype
        assert torch.equal(have[name].nan_to_num(nan=-1), values.nan_to_num(nan=-1)), name
    return expected


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of every launch of the kernel."""
    found = list[int]()
    launch = engine_step.decide_in_place

    def counted(blocks: OpenBlocks, rows: Tensor, *rest: Any, **switches: bool) -> Tensor:
        found.append(len(rows))
        return launch(blocks, rows, *rest, **switches)

    monkeypatch.setattr(engine_step, "decide_in_place", counted)
    return found


CASES: dict[str, tuple[int, int, dict[str, bool]]] = {
    "as published": (32, 1, {}),
    "any confident position": (8, 1, {"prefix_only": False}),
    "tokens fed back": (8, 1, {"soft_inputs": False}),
    "three candidates": (8, 3, {}),
    "consistency alone": (8, 1, {"stop_on_confidence": False}),
    "confidence alone": (8, 1, {"stop_on_consistency": False}),
    "no criterion": (5, 1, {"stop_on_confidence": False, "stop_on_consistency": False}),
    "a length that is no power of two": (48, 2, {"prefix_only": False}),
    "the longest block": (MAX_BLOCK_LENGTH, 1, {}),
    "one position": (1, 1, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_those_of_the_twin(
    name: str, triton_device: torch.device, launches: list[int]
) -> None:
    length, k, switches = CASES[name]
    params = spd(top_k=k, options=switches)
    requests = [
        (params, 0),
        (params, length // 2),  # the end of a prompt
        (replace(params, threshold=0.875, stop_confidence=0.25), 0),
        (replace(params, threshold=0.0), 0),
        (replace(params, max_steps_per_block=2), length // 3),
        (replace(params, max_steps_per_block=1), 0),
        (params, length),  # nothing to decode
    ]
    twin = new_blocks(requests, length, torch.device("cpu"))
    fused = new_blocks(requests, length, triton_device)
    seen = torch.zeros(6, dtype=torch.bool)
    for _ in range(16):
        rows = torch.randperm(len(requests))[: torch.randint(1, 6, ())]
        flags = check_step(twin, fused, rows, random_candidates(len(rows), length, k))
        seen |= flags.any(dim=1)
        for row in rows[flags[0]].tolist():  # done: the next block of the sequence
            for blocks in (twin, fused):
                blocks.open(row, [3] * requests[row][1])
    done, forced, capped, invalid, broken, _ = seen.tolist()
    assert done and not forced
    assert length < 8 or (capped and invalid and broken)
    assert len(launches) == 16


def test_the_surest_position_is_the_leftmost_of_equals_and_a_nan_before_all(
    triton_device: torch.device,
) -> None:
    params = spd(top_k=1, options={"prefix_only": False})
    for probs, expected in (
        ([0.25, 0.375, 0.375, 0.125], 1),
        ([0.25, 0.375, NAN, NAN], 2),
    ):
        twin, fused = (
            new_blocks([(params, 0)], 4, device) for device in (torch.device("cpu"), triton_device)
        )
        predicted = predicted_by(
            torch.ones(1, 4, 1, dtype=torch.long), torch.tensor([probs])[..., None]
        )
        check_step(twin, fused, torch.tensor([0]), predicted)
        assert (~twin.masked[0]).nonzero().tolist() == [[expected]]


def test_a_row_that_is_named_often_is_written_once(triton_device: torch.device) -> None:
    """Idle places of a batch share a row; more of them than one look back takes in."""
    params = spd(top_k=1)
    twin, fused = (
        new_blocks([(params, 0)] * 3, 4, device) for device in (torch.device("cpu"), triton_device)
    )
    rows = torch.tensor([1] + [2] * 70 + [0])
    predicted = random_candidates(len(rows), 4, 1)
    once = Candidates(*(each[[0, 1, -1]] for each in predicted))
    expected = decided(twin, rows[[0, 1, -1]], once)
    with using("triton"):
        flags = decided(fused, rows, predicted)
    assert flags[:, [0, 1, -1]].tolist() == expected.tolist()
    assert not flags[:, 2:-1].any()
    for name, values in stored(twin).items():
        assert torch.equal(stored(fused)[name], values), name
    assert fused.step.tolist() == [1, 1, 1]


def test_the_kernel_takes_what_it_can(kernels: torch.device, launches: list[int]) -> None:
    def launches_for(params: DecodingParams, predicted: Candidates, length: int = 4) -> bool:
        blocks = new_blocks([(params, 0)], length, kernels)
        launches.clear()
        decided(blocks, torch.tensor([0]), predicted)
        return bool(launches)

    ids = torch.ones(1, 4, 1, dtype=torch.long)
    probs = torch.rand(1, 4, 1)
    predicted = predicted_by(ids, probs)
    assert launches_for(spd(), predicted)
    assert not launches_for(spd(), predicted_by(ids, probs.double()))
    assert not launches_for(DecodingParams("threshold"), predicted)
    assert not launches_for(DecodingParams("mbd", options={"blocks": 2}), predicted)
    length = MAX_BLOCK_LENGTH + 1
    assert not launches_for(spd(), random_candidates(1, length, 1), length)
    with using("torch"):
        assert not fits_kernel(predicted)


def test_a_strategy_that_derives_from_spd_takes_its_own_step() -> None:
    class Other(SoftParallelDecoding):
        pass

    settings: dict[str, Any] = {"top_k": 2, "threshold": 0.5, "stop_confidence": 0.9}
    assert SoftParallelDecoding(**settings).fused() is not None
    assert Other(**settings).fused() is None


@pytest.mark.parametrize(
    "changes",
    [{}, {"options": {"prefix_only": False}}, {"temperature": 0.7, "seed": 5}],
    ids=["prefix", "any", "sampled"],
)
def test_tiny_dmax_decodes_the_same(
    changes: dict[str, Any],
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[int],
) -> None:
    """Every forward of three answers; with the second model, the decision alone is a kernel."""
    prompts = [problem.question for problem in problems(3, seed=11)]
    params = DecodingParams("spd", 0.4, max_new_tokens=48, **changes)

    def events() -> list[StreamEvent]:
        llm = LLM("tiny-dmax", dtype="float32", device=str(triton_device), cuda_graphs=False)
        with using("torch"):
            return [event for prompt in prompts for event in llm.stream(prompt, params)]

    expected = events()
    assert not launches
    monkeypatch.setattr(engine_step, "fits_kernel", lambda _: True)
    assert events() == expected
    assert len(launches) > 10
