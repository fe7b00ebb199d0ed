"""Strategies by name, ours and a plugin's."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import dmax.decoding
from dmax.decoding import get_strategy, strategies
from dmax.decoding.spd import SoftParallelDecoding
from dmax.decoding.threshold import ThresholdDecoding
from dmax.errors import InputError
from dmax.params import DecodingParams


def test_every_name_gives_a_strategy_of_that_name(needed: dict[str, dict[str, str]]) -> None:
    assert {"spd", "threshold", "llada", "credit"} <= set(strategies())
    for name in strategies():
        assert get_strategy(DecodingParams(strategy=name, options=needed[name])).name == name


def test_each_strategy_has_its_own_default_threshold() -> None:
    spd, threshold = (get_strategy(DecodingParams(strategy=name)) for name in ("spd", "threshold"))
    assert isinstance(spd, SoftParallelDecoding)
    assert isinstance(threshold, ThresholdDecoding)
    assert (spd.threshold, threshold.threshold) == (0.5, 0.95)
    zero = get_strategy(DecodingParams(threshold=0.0))
    assert isinstance(zero, SoftParallelDecoding)
    assert zero.threshold == 0.0  # zero is a threshold, not "none given"


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(InputError) as error:
        get_strategy(DecodingParams(strategy="treshold"))
    assert (
        f"unknown strategy 'treshold'; choose from {', '.join(strategies())}" in error.value.message
    )
    assert error.value.hint == "did you mean `threshold`?"


def test_a_plugin_is_found_and_cannot_take_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "dmax.decoding.threshold:ThresholdDecoding"
    found = [EntryPoint(name, target, "dmax.strategies") for name in ("mine", "spd")]
    monkeypatch.setattr(
        dmax.decoding, "entry_points", lambda group: found if group == "dmax.strategies" else []
    )
    assert "mine" in strategies() and strategies().count("spd") == 1
    assert isinstance(get_strategy(DecodingParams(strategy="mine")), ThresholdDecoding)
    assert isinstance(get_strategy(DecodingParams(strategy="spd")), SoftParallelDecoding)
