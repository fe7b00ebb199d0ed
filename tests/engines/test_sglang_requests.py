"""What requests may ask of SGLang, and what becomes of those that are refused, ended or broken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import load
from sglang_engine import answers, broken_model, differences, running


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with running() as started:
        yield started


def is_well(engine: Any) -> bool:
    """Whether the engine still decodes as `dmax.LLM` does."""
    return not differences(answers(engine, load("spd")), load("spd"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"custom_params": {"dmax_strategy": "mbd"}}, "needs 2 open blocks, and SGLang has one"),
        ({"custom_params": {"dmax_strategy": "lopa"}}, "needs 2 branches"),
        ({"custom_params": {"dmax_strategy": "spdd"}}, "unknown strategy"),
        ({"custom_params": {"dmax_treshold": 0.5}}, "has no option `dmax_treshold`"),
        ({"custom_params": {"dmax_threshold": 7}}, "`threshold` must be a number between 0 and 1"),
        ({"custom_params": {"dmax_threshold": [0.5]}}, "`threshold` must be a number"),
        ({"custom_params": {"dmax_top_k": 10**9}}, "`top_k` must be"),
        ({"temperature": 0.7, "top_p": 0.9}, "no place for `top_p`"),
        ({"frequency_penalty": 1.0}, "no place for `frequency_penalty`"),
        ({"min_new_tokens": 5}, "no place for `min_new_tokens`"),
        ({"logit_bias": {"5": 2.0}}, "no place for `logit_bias`"),
        ({"temperature": 0.7, "sampling_seed": -5}, "`seed` must be a whole number"),
        ({"temperature": 2000.0}, "`temperature` must be a number between 0 and 1000"),
    ],
)
def test_a_wrong_option_is_refused_with_a_sentence(
    engine: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(input_ids=[1, 2, 3], sampling_params=given)


def test_logprobs_are_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match="no place for `return_logprob`"):
        engine.generate(input_ids=[1, 2, 3], return_logprob=True)


def test_a_prompt_with_the_mask_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match="holds the mask token 977"):
        engine.generate(input_ids=[1, 977, 3])


def test_after_refusals_the_engine_decodes_as_before(engine: Any) -> None:
    assert is_well(engine)


def test_requests_that_name_no_temperature_are_greedy(engine: Any) -> None:
    wanted = load("spd")
    prompts = [list(each.prompt) for each in wanted]
    found = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 96})
    assert not differences(found, wanted)


def test_a_request_is_ended_in_the_middle_of_a_block(engine: Any) -> None:
    # More of them, one after the other, than there are places for open blocks.
    prompt = list(load("spd")[0].prompt)
    long = {"max_new_tokens": 800, "ignore_eos": True}

    async def end_early(name: str) -> str:
        chunks = await engine.async_generate(
            input_ids=prompt, sampling_params=long, stream=True, rid=name
        )
        told: dict[str, Any] = {}
        async for chunk in chunks:
            engine.tokenizer_manager.abort_request(name)
            told = chunk["meta_info"]
        assert told["completion_tokens"] < 800
        reason: str = told["finish_reason"]["type"]
        return reason

    async def end_several(number: int) -> list[str]:
        return await asyncio.gather(*[end_early(f"{number}-{each}.") for each in range(6)])

    for number in range(5):
        reasons = engine.loop.run_until_complete(end_several(number))
        assert reasons == ["abort"] * 6
    assert is_well(engine)


def test_streaming_gives_block_by_block_what_is_given_at_once(engine: Any) -> None:
    wanted = load("spd")[0]
    [whole] = answers(engine, [wanted])
    chunks = engine.generate(
        input_ids=list(wanted.prompt), sampling_params={"max_new_tokens": 96}, stream=True
    )
    seen = list(chunks)
    assert len(seen) >= 3
    assert seen[-1]["text"] == whole["text"]
    assert seen[-1]["meta_info"]["dmax_num_forwards"] == whole["meta_info"]["dmax_num_forwards"]


def test_broken_logits_end_their_request_and_no_other(tmp_path: Path) -> None:
    poison = 600  # the token whose embedding is not a number
    with running(model_path=broken_model(tmp_path / "broken", poison)) as engine:
        wanted = [each for each in load("64_spd") if poison not in each.prompt][:4]

        async def together() -> list[Any]:
            good = [
                engine.async_generate(
                    input_ids=list(each.prompt), sampling_params={"max_new_tokens": 96}
                )
                for each in wanted
            ]
            bad = engine.async_generate(
                input_ids=[*wanted[0].prompt[:40], poison], sampling_params={"max_new_tokens": 96}
            )
            return await asyncio.gather(*good[:2], bad, *good[2:], return_exceptions=True)

        for _ in range(3):
            found = engine.loop.run_until_complete(together())
            bad = found.pop(2)
            assert "the model gave NaN logits" in getattr(bad, "detail", "")
            assert not differences(found, wanted)
