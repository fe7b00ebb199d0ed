"""Settings of decoding, of its 18 methods and of the engine: any value at all in any of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import values
from hypothesis import strategies as st
from oracle import attempt, fuzz, refused

from dmax import LLM, DecodingParams, GenerationOutput
from dmax.decoding import _STRATEGIES
from dmax.errors import InputError
from dmax.params import EngineOptions

PROMPT = "Tom has 3 apples."
SHORT = {"max_new_tokens": 12, "max_steps_per_block": 8}
FIELDS = [entry.name for entry in dataclasses.fields(DecodingParams)]
ENGINE_FIELDS = [entry.name for entry in dataclasses.fields(EngineOptions)]
LOADING = (
    "model",
    "dtype",
    "device",
    "mask_token_id",
    "eos_token_id",
    "block_length",
    "attn_implementation",
    "experts_implementation",
    "quantization",
)
OPTIONS = (
    "alpha beta bound blocks count decay factor forces_at head high low margin num_branches "
    "opens_at power rate renormalize schedule soft_inputs steady steps sure_from "
    "threshold top_k weight"
).split()


def check_output(llm: LLM, output: GenerationOutput, params: DecodingParams) -> None:
    """What holds of every completion, whatever the settings."""
    config: Any = llm.model.config
    num_tokens = len(output.token_ids)
    assert num_tokens <= params.max_new_tokens
    assert config.mask_token_id not in output.token_ids
    assert all(0 <= token < config.vocab_size for token in output.token_ids)
    assert output.finish_reason in ("stop", "length", "deadline")
    assert isinstance(output.text, str)
    if output.finish_reason != "deadline":
        assert output.num_forwards >= 1
    assert output.tokens_per_forward * output.num_forwards == pytest.approx(num_tokens)


def check_same(llm: LLM, params: DecodingParams, output: GenerationOutput) -> None:
    """Decoding again gives the same, unless chance or the clock has a part in it."""
    is_random = params.temperature > 0 and params.seed is None
    if not is_random and params.deadline is None:
        assert llm.generate(PROMPT, params) == [output]


def decode(llm: LLM, **settings: Any) -> tuple[GenerationOutput, DecodingParams]:
    params = DecodingParams(**settings)
    [output] = llm.generate(PROMPT, params)
    return output, params


@fuzz(200, settings=st.dictionaries(st.sampled_from(FIELDS), values(), min_size=1, max_size=2))
def test_any_value_of_any_setting(llm: LLM, settings: dict[str, Any]) -> None:
    outcome = attempt(lambda: decode(llm, **(SHORT | {"strategy": "spd"} | settings)))
    if not isinstance(outcome, InputError):
        output, params = outcome
        check_output(llm, output, params)
        check_same(llm, params, output)


@fuzz(
    180,
    strategy=st.sampled_from(sorted(_STRATEGIES)),
    options=st.dictionaries(
        st.sampled_from(OPTIONS), st.one_of(st.floats(), st.integers(-3, 99), values()), max_size=2
    ),
)
def test_any_option_of_any_method(
    llm: LLM, own_heads: Path, strategy: str, options: dict[str, Any]
) -> None:
    needed = {"head": str(own_heads)} if strategy in ("demask", "learn2pd") else {}
    settings = {"strategy": strategy, "options": needed | options}
    outcome = attempt(lambda: decode(llm, **SHORT, **settings))
    if not isinstance(outcome, InputError):
        output, params = outcome
        check_output(llm, output, params)
        check_same(llm, params, output)


@fuzz(50, options=st.dictionaries(st.sampled_from(ENGINE_FIELDS), values(), min_size=1, max_size=1))
def test_any_option_of_the_engine(llm: LLM, options: dict[str, Any]) -> None:
    options = (
        {**options, "compile_model": False} if options.get("compile_model") is True else options
    )
    params = DecodingParams(strategy="threshold", **SHORT)

    def run() -> list[GenerationOutput]:
        return LLM.from_checkpoint(llm.checkpoint, **options).generate([PROMPT, "Hi"], params)

    outcome = attempt(run)
    if not isinstance(outcome, InputError):
        assert outcome == llm.generate([PROMPT, "Hi"], params)


@fuzz(60, arguments=st.dictionaries(st.sampled_from(LOADING), values(), min_size=1, max_size=1))
def test_any_argument_of_a_model(llm: LLM, checkpoint: Path, arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {"model": str(checkpoint), "dtype": "float32", "device": "cpu"}
    outcome = attempt(lambda: LLM(**(given | arguments)), checkpoint)
    if not isinstance(outcome, InputError):
        params = DecodingParams(strategy="threshold", **SHORT)
        [output] = outcome.generate(PROMPT, params)
        check_output(outcome, output, params)


NOT_NUMBERS = (math.nan, math.inf, -math.inf, "1", b"1", None, [1], {}, 1j, True, torch.tensor(1.0))
NUMBERS = ("stop_confidence", "top_k", "max_new_tokens", "temperature")


@fuzz(
    30,
    name=st.sampled_from(NUMBERS),
    value=st.sampled_from(NOT_NUMBERS),
    others=st.fixed_dictionaries({"threshold": st.floats(0, 1), "ignore_eos": st.booleans()}),
)
def test_what_is_no_number_is_never_taken_for_one(
    name: str, value: Any, others: dict[str, Any]
) -> None:
    settings = {**others, name: value}
    refused(attempt(lambda: DecodingParams(**settings)), f"{value!r} is no number")
