"""The loop: published trajectories, independence of neighbours, promises under hostile logits."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import (
    COUNT,
    EOS,
    MASK,
    L,
    V,
    confident,
    engine_of,
    random_prompts,
    request,
    result,
    run,
    scripted,
)
from safetensors.torch import load_file
from torch import Tensor

from dmax.decoding import get_strategy, strategies
from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.params import MOST, DecodingParams

GOLDEN = Path(__file__).parents[1] / "golden"
TRAJECTORIES = [
    (folder.name, index)
    for folder in sorted(GOLDEN.glob("llada2_moe_*"))
    for index, trajectory in enumerate(json.loads((folder / "expected.json").read_text())["spd"])
    if trajectory["float64_agrees"]
]


def test_spd_repeats_the_published_trajectories(golden: tuple[str, Any, dict[str, Any]]) -> None:
    """In float32 or in float64: a random network amplifies rounding, which processors differ in."""
    name, checkpoint, expected = golden
    precise = replace(checkpoint, model=deepcopy(checkpoint.model).double())
    tensors = load_file(GOLDEN / name / "expected.safetensors")
    for index, trajectory in enumerate(expected["spd"]):
        if not trajectory["float64_agrees"]:
            continue
        prompt = tuple(tensors[f"spd.{index}.prompt"].flatten().tolist())
        params = DecodingParams(
            strategy="spd",
            threshold=trajectory["threshold"],
            stop_confidence=trajectory["tau_acc"],
            max_new_tokens=trajectory["gen_length"],
        )
        found = []
        for each in (checkpoint, precise):
            *blocks, last = engine_of(each).run([Request(0, prompt, params)])
            tokens = [*prompt, *(token for block in blocks for token in block.token_ids)]
            found.append((result(last).num_forwards, tokens))
        published = (trajectory["nfe"], tensors[f"spd.{index}.tokens"].flatten().tolist())
        assert published in found, f"{name} trajectory {index}"


def test_there_are_trajectories_to_repeat() -> None:
    assert len(TRAJECTORIES) == 7


# --- prescribed logits ----------------------------------------------------------------------------


def test_confident_blocks_take_one_forward_each() -> None:
    output = run(scripted(confident(COUNT * 4)), request((1, 2, 3)))[0]
    assert output.token_ids == (4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3)
    assert output.prompt_token_ids == (1, 2, 3)
    assert output.finish_reason == "length"
    assert output.num_forwards == 3
    assert output.num_prefill_forwards == 0


def test_a13_finished_blocks_go_into_the_cache_with_the_next_forward() -> None:
    cost = run(scripted(confident(COUNT * 4)), request((1,) * 9))[0].cost
    assert (cost.num_forwards, cost.num_prefill_forwards, cost.num_commit_forwards) == (3, 1, 0)
    # Three open blocks, and the two of them that went through another forward on their way.
    assert cost.num_positions == (3 + 2) * L


def test_a14_output_is_cut_at_the_first_eos_and_its_block_decoded_whole() -> None:
    tokens = [1, 2, 3, 4, 5, EOS, 7, 8] + [1] * 24
    block, last = scripted(confident(tokens)).run([request((1, 2))])
    assert (block.kind, last.kind) == ("committed", "finished")
    assert block.token_ids == (3, 4, 5, EOS, 7, 8)
    assert last.token_ids == result(last).token_ids == (3, 4, 5)
    assert result(last).finish_reason == "stop"


def test_a14_eos_in_the_prompt_does_not_stop() -> None:
    output = run(scripted(confident([1] * 32)), request((EOS, 2)))[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 16


@pytest.mark.parametrize("steps", [1000, MOST])
def test_a_cap_that_no_block_reaches_is_none(steps: int) -> None:
    table = confident(COUNT * 4, 0.6)
    capped = run(scripted(table), request((1, 2), max_steps_per_block=steps))
    assert capped == run(scripted(table), request((1, 2)))


def test_eos_first_gives_an_empty_completion() -> None:
    output = run(scripted(confident([EOS] * 32)), request((1, 2)))[0]
    assert output.token_ids == ()
    assert output.finish_reason == "stop"


def test_a20_a_prompt_shorter_than_a_block_needs_no_prefill() -> None:
    table = confident([1] * 40)
    for length, prefills in ((1, 0), (L - 1, 0), (L, 1), (2 * L + 3, 1)):
        output = run(scripted(table), request((1,) * length))[0]
        assert output.num_prefill_forwards == prefills


def test_max_new_tokens_truncates_but_decodes_the_block() -> None:
    output = run(scripted(confident(COUNT * 4)), request((1, 2), max_new_tokens=3))[0]
    assert output.token_ids == (3, 4, 5)
    assert output.finish_reason == "length"
    assert output.num_forwards == 1


@pytest.mark.parametrize(("limit", "reason"), [(2, "length"), (4, "stop")])
def test_eos_past_the_limit_is_a_length_stop(limit: int, reason: str) -> None:
    tokens = [1, 2, 3, 4, 5, 6, EOS, 8] + [1] * 24
    output = run(scripted(confident(tokens)), request((1, 2), max_new_tokens=limit))[0]
    assert output.finish_reason == reason


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "prompt 0 is empty"),
        ((V,), {}, "outside the vocabulary"),
        ((1,) * 20, {"max_new_tokens": 64}, "the model has 32"),
    ],
)
def test_what_cannot_fit_is_refused_before_any_compute(
    prompt: tuple[int, ...], params: dict[str, int], message: str
) -> None:
    engine = scripted(confident([1] * 32))
    with pytest.raises(InputError, match=message):
        run(engine, request((1,), 1), request(prompt, **params))
    assert engine.model.num_calls == 0
    assert not engine.is_busy()


def hostile_tables() -> st.SearchStrategy[Tensor]:
    values = st.sampled_from([0.0, 1.0, -1.0, 30.0, float("inf"), float("-inf")])
    rows = st.lists(values, min_size=V, max_size=V)
    shaped = st.lists(rows, min_size=8, max_size=8).map(
        lambda rows: torch.tensor(rows).repeat(5, 1)
    )
    mask_wins = shaped.map(lambda table: table.index_fill(1, torch.tensor([MASK]), float("inf")))
    flat = st.sampled_from([torch.zeros(40, V), torch.full((40, V), float("-inf"))])
    return st.one_of(shaped, mask_wins, flat)


def policies() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "strategy": st.sampled_from(strategies()),
            "threshold": st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]),
            "top_k": st.sampled_from([1, 3]),
            "temperature": st.sampled_from([0.0, 1.0]),
            "seed": st.just(5),
        }
    )


@settings(max_examples=60, deadline=None)
@given(
    table=hostile_tables(),
    policy=policies(),
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=12),
)
def test_any_logits_end_without_mask_and_leave_the_prompt_alone(
    needed: dict[str, Any], table: Tensor, policy: dict[str, Any], prompt: list[int]
) -> None:
    policy = {**policy, "options": needed[policy["strategy"]]}
    *blocks, last = scripted(table, react=3.0).run([request(tuple(prompt), **policy)])
    assert last.kind == "finished"
    assert all(block.kind == "committed" for block in blocks)
    assert all(MASK not in block.token_ids and not any(block.masked) for block in blocks)
    strategy = get_strategy(DecodingParams(strategy=policy["strategy"], options=policy["options"]))
    most = L * strategy.blocks + strategy.extra_steps
    assert result(last).num_forwards <= most * len(blocks)
    generated = sum(len(block.token_ids) for block in blocks)
    # Only positions after the prompt were ever reported.
    assert (len(prompt) + generated) % L == 0


@settings(max_examples=25, deadline=None)
@given(
    table=hostile_tables(),
    policy=policies(),
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=2, max_size=5),
    slots=st.integers(1, 4),
)
def test_a_request_does_not_depend_on_its_neighbours(
    needed: dict[str, Any],
    table: Tensor,
    policy: dict[str, Any],
    prompts: list[list[int]],
    slots: int,
) -> None:
    policy = {**policy, "options": needed[policy["strategy"]]}
    requests = [request(tuple(prompt), index, **policy) for index, prompt in enumerate(prompts)]
    alone = {r.index: run(scripted(table, react=3.0), r)[r.index] for r in requests}
    together = run(scripted(table, react=3.0, max_batch_size=slots), *requests)
    reversed_order = run(scripted(table, react=3.0, max_batch_size=slots), *requests[::-1])
    assert alone == together == reversed_order


def test_different_settings_share_a_batch() -> None:
    table = confident(COUNT * 4, probability=0.6)
    requests = [
        request((1, 2), 0, threshold=0.5),
        request((1, 2, 3), 1, strategy="threshold", threshold=0.9),
        request((1,), 2, threshold=0.9),
    ]
    together = run(scripted(table), *requests)
    assert together == {r.index: run(scripted(table), r)[r.index] for r in requests}
    assert together[0].num_forwards < together[1].num_forwards


def test_sampling_depends_on_the_seed_only() -> None:
    table = torch.zeros(40, V)

    def sample(**params: Any) -> tuple[int, ...]:
        return run(scripted(table), request((1, 2), temperature=1.0, **params))[0].token_ids

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)


def test_batched_rows_of_a_real_model_decode_as_alone(
    golden: tuple[str, Any, dict[str, Any]],
) -> None:
    _, checkpoint, _ = golden
    prompts = random_prompts(3, 17, 16, 40, 1, 25)
    for strategy, threshold in (("threshold", 0.9), ("threshold", 0.3)):
        params = DecodingParams(strategy=strategy, threshold=threshold, max_new_tokens=24)
        requests = [Request(index, prompt, params) for index, prompt in enumerate(prompts)]
        alone = {r.index: run(engine_of(checkpoint), r)[r.index] for r in requests}
        assert run(engine_of(checkpoint), *requests) == alone
        assert run(engine_of(checkpoint, max_batch_size=2), *requests[::-1]) == alone
