"""Options are checked where they are made: one sentence with the field, the range and the value."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import deque
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from dmax.errors import InputError
from dmax.params import DecodingParams, EngineOptions


def test_defaults_are_the_public_ones() -> None:
    assert dataclasses.asdict(DecodingParams()) == {
        "strategy": "auto",
        "threshold": None,
        "stop_confidence": 0.9,
        "top_k": 1,
        "block_length": None,
        "max_new_tokens": 256,
        "temperature": 0.0,
        "seed": None,
        "stop": (),
        "ignore_eos": False,
        "deadline": None,
        "max_steps_per_block": None,
        "options": (),
    }


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": 0},
        {"threshold": 1},
        {"stop_confidence": 1},
        {"stop_confidence": 1e-9},
        {"top_k": 1},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2**31 - 1},
        {"temperature": 0},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"max_steps_per_block": 2**31 - 1},
        {"strategy": "a plugin's"},
        {"deadline": 0},
        {"stop": ("a", "b")},
    ],
)
def test_the_ends_of_every_range_are_valid(values: dict[str, Any]) -> None:
    assert dataclasses.asdict(DecodingParams(**values)).items() >= values.items()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("threshold", -0.1, "a number between 0 and 1"),
        ("threshold", 1.5, "a number between 0 and 1"),
        ("threshold", float("nan"), "a number between 0 and 1"),
        ("threshold", "0.5", "a number between 0 and 1"),
        ("threshold", True, "a number between 0 and 1"),
        ("stop_confidence", 0.0, "a number above 0 and at most 1"),
        ("stop_confidence", 1.01, "a number above 0 and at most 1"),
        ("stop_confidence", None, "a number above 0 and at most 1"),
        ("top_k", 0, "a whole number between 1 and 1024"),
        ("top_k", 1.0, "a whole number between 1 and 1024"),
        ("max_new_tokens", 0, "a whole number of at least 1"),
        ("block_length", 0, "a whole number of at least 1"),
        ("max_steps_per_block", 0, "a whole number of at least 1"),
        ("temperature", -1, "a number between 0 and 1000"),
        ("temperature", float("inf"), "a number between 0 and 1000"),
        ("temperature", float("nan"), "a number between 0 and 1000"),
        ("max_new_tokens", 2**31, "a whole number of at most 2147483647"),
        ("block_length", 2**31, "a whole number of at most 2147483647"),
        ("seed", 1.0, "a whole number between 0 and"),
        ("deadline", float("nan"), "a number of at least 0"),
        ("deadline", [], "a number of at least 0"),
        ("strategy", ["spd"], "a name"),
        ("seed", -1, "a whole number between 0 and"),
        ("seed", 2**63, "a whole number between 0 and"),
        ("strategy", None, "a name"),
        ("ignore_eos", "no", "true or false"),  # a string would count as true
        ("ignore_eos", 0, "true or false"),
    ],
)
def test_bad_values_are_named(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InputError) as error:
        DecodingParams(**{name: value})
    assert error.value.message.startswith(f"`{name}` must be {allowed}")
    assert error.value.message.endswith(f"got {value!r}")


@pytest.mark.parametrize("name", ["temperature", "max_new_tokens", "top_k", "seed", "threshold"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["+", "-", "unprintable"])
def test_numbers_of_hundreds_of_digits_are_refused(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be .* got a number of (401|5001) digits"):
        DecodingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", np.float32(0.5)),
        ("temperature", np.float64(0.5)),
        ("max_new_tokens", np.int64(8)),
        ("seed", np.uint8(3)),
    ],
)
def test_numbers_of_numpy_become_plain_ones(name: str, value: Any) -> None:
    found = getattr(DecodingParams(**{name: value}), name)
    assert found == value
    assert type(found) in (int, float)


def test_params_are_values() -> None:
    assert DecodingParams(threshold=0.5) == DecodingParams(threshold=0.5)
    assert hash(DecodingParams()) == hash(DecodingParams())  # the engine groups requests by them
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodingParams().threshold = 0.3  # type: ignore[misc]


def test_options_are_kept_in_one_form() -> None:
    one = DecodingParams(strategy="credit", options={"decay": 0.5, "alpha": 1.0})
    other = DecodingParams(strategy="credit", options=(("alpha", 1.0), ("decay", 0.5)))
    assert one == other and hash(one) == hash(other)
    assert one.options == (("alpha", 1.0), ("decay", 0.5))
    with pytest.raises(InputError, match="`options` must map names to values"):
        DecodingParams(options=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {1: 2},
        {1: 2, "a": 3},
        "alpha",
        [("alpha",)],
        itertools.repeat(("alpha", 1)),
        {"alpha": [1, 2]},
        {"alpha": {"a": 1}},
        {"alpha": functools.reduce(lambda inner, _: [inner], range(100_000), [])},
        {"alpha": object()},
    ],
    ids=lambda options: type(options).__name__,
)
def test_options_of_another_shape_are_refused(options: Any) -> None:
    with pytest.raises(InputError, match="`options` must map|option `alpha` must be") as error:
        DecodingParams(options=options)
    assert len(error.value.message) < 300


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), np.bool_(True), Fraction(1, 2)])
def test_options_are_values_that_json_has(value: Any) -> None:
    with pytest.raises(InputError, match="option `alpha` must be a number, a text, true or false"):
        DecodingParams(options={"alpha": value})
    plain = {"alpha": 3, "b": 0.5, "c": True, "d": "e", "f": None, "g": np.float64(0.5)}
    json.dumps(dataclasses.asdict(DecodingParams(options=plain)))


def test_one_stop_text_is_a_list_of_one() -> None:
    assert DecodingParams(stop="####").stop == DecodingParams(stop=["####"]).stop == ("####",)
    assert DecodingParams(stop=deque(["a", "b"])).stop == ("a", "b")


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], deque([1]), 3, None, b"a", {"a"}, {"a": 1}])
def test_stop_texts_are_texts(stop: Any) -> None:
    with pytest.raises(InputError, match="`stop` must be a text or a list of texts"):
        DecodingParams(stop=stop)


@pytest.mark.parametrize(
    "stop", [["a"] * 1_000_000, "a" * 1_000_000, "\ud800"], ids=["many", "long", "surrogate"]
)
def test_stop_texts_are_few_and_short(stop: Any) -> None:
    with pytest.raises(InputError, match="`stop` (takes at most|holds half)"):
        DecodingParams(stop=stop)


# --- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_batch_size", 0, "a whole number between 1 and 65536"),
        ("max_batch_size", 1.0, "a whole number between 1 and 65536"),
        ("max_batch_size", None, "a whole number between 1 and 65536"),
        ("max_batch_size", 10**9, "a whole number between 1 and 65536"),
        ("max_length", 2**31, "a whole number of at most 2147483647"),
        ("max_length", 0, "a whole number of at least 1"),
        ("prefill_tokens", 0, "a whole number of at least 1"),
        ("prefix_cache_mib", -1, "a whole number between 0 and 16777216"),
        ("prefix_cache_mib", 10**9, "a whole number between 0 and 16777216"),
        ("prefill_tokens", "512", "a whole number of at least 1"),
        ("cuda_graphs", "yes", "true, false or None"),
        ("compile_model", "no", "true or false"),  # a string would count as true
        ("warm_up", "no", "true or false"),
    ],
)
def test_bad_options_of_the_engine_are_named(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InputError) as error:
        EngineOptions(**{name: value})
    assert error.value.message == f"`{name}` must be {allowed}, got {value!r}"


def test_an_engine_without_a_plan_is_the_default() -> None:
    assert dataclasses.asdict(EngineOptions()) == {
        "max_batch_size": 16,
        "max_length": None,
        "prefill_tokens": 512,
        "prefix_cache_mib": 0,
        "cuda_graphs": None,
        "compile_model": False,
        "warm_up": False,
    }
