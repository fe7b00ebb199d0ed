"""Strategies by name, ours and a plugin's, and the settings that each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch

import dmax.decoding
from dmax.decoding import check_strategy, get_strategy, strategies
from dmax.decoding.block import Decision, Output, State, View, leftmost, predict
from dmax.decoding.spd import SoftParallelDecoding
from dmax.decoding.strategy import Number, Strategy, number, whole
from dmax.decoding.threshold import ThresholdDecoding
from dmax.errors import InputError
from dmax.params import DecodingParams


def test_every_name_gives_a_strategy_of_that_name(needed: dict[str, dict[str, str]]) -> None:
    assert {"spd", "threshold", "llada", "credit"} <= set(strategies())
    for name in strategies():
        strategy = get_strategy(DecodingParams(strategy=name, options=needed[name]))
        assert isinstance(strategy, Strategy)
        assert strategy.name == name
        assert (type(strategy).__doc__ or "").strip()  # it says where it comes from


def test_auto_means_threshold_decoding_where_no_checkpoint_is_asked() -> None:
    assert isinstance(get_strategy(DecodingParams()), ThresholdDecoding)
    assert isinstance(get_strategy(DecodingParams(strategy="auto")), ThresholdDecoding)
    assert "auto" not in strategies()


def test_each_strategy_has_its_own_default_threshold() -> None:
    spd, threshold = (get_strategy(DecodingParams(strategy=name)) for name in ("spd", "threshold"))
    assert isinstance(spd, SoftParallelDecoding)
    assert isinstance(threshold, ThresholdDecoding)
    assert (spd.threshold, threshold.threshold) == (0.5, 0.95)
    zero = get_strategy(DecodingParams(strategy="spd", threshold=0.0))
    assert isinstance(zero, SoftParallelDecoding)
    assert zero.threshold == 0.0  # zero is a threshold, not "none given"


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(InputError) as error:
        get_strategy(DecodingParams(strategy="treshold"))
    choices = ", ".join(("auto", *strategies()))
    assert f"unknown strategy 'treshold'; choose from {choices}" in error.value.message
    assert error.value.hint == "did you mean `threshold`?"


def test_a_strategy_is_checked_before_a_model_is_there() -> None:
    check_strategy(DecodingParams(strategy="credit", options={"alpha": 0.5}))
    check_strategy(DecodingParams(options={"alpha": 0.5}))  # "auto" may turn out to be `credit`
    with pytest.raises(InputError, match="alpha"):
        check_strategy(DecodingParams(strategy="spd", options={"alpha": 0.5}))


def test_a_plugin_is_found_and_cannot_take_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "dmax.decoding.threshold:ThresholdDecoding"
    found = [EntryPoint(name, target, "dmax.strategies") for name in ("mine", "spd")]
    monkeypatch.setattr(
        dmax.decoding, "entry_points", lambda group: found if group == "dmax.strategies" else []
    )
    assert "mine" in strategies() and strategies().count("spd") == 1
    assert isinstance(get_strategy(DecodingParams(strategy="mine")), ThresholdDecoding)
    assert isinstance(get_strategy(DecodingParams(strategy="spd")), SoftParallelDecoding)


def test_a_plugin_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("mine", "notthere.module:Mine", "dmax.strategies")]
    monkeypatch.setattr(dmax.decoding, "entry_points", lambda group: found)
    with pytest.raises(InputError) as error:
        get_strategy(DecodingParams(strategy="mine"))
    assert error.value.message == (
        "the plugin `mine` (notthere.module:Mine) cannot be loaded: No module named 'notthere'"
    )
    assert error.value.hint == "mend or uninstall the package that it belongs to"


def test_what_of_ours_cannot_be_loaded_is_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dmax.decoding._STRATEGIES, "spd", "dmax.decoding.gone:Gone")
    with pytest.raises(ModuleNotFoundError):
        get_strategy(DecodingParams(strategy="spd"))


# --- what a strategy is ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Custom(Strategy):
    """A strategy as another package would write it: settings, and one method."""

    name: ClassVar[str] = "custom"
    default_threshold: ClassVar[float] = 0.25

    top_k: int
    threshold: Number = number(high=1)
    weight: Number = number(0.5, high=1)
    bound: Number | None = number(None, optional=True)
    rounds: int = whole(3, low=1)
    careful: bool = False

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        return Decision(predict(view, output).tokens, leftmost(view.masked)), state


def custom(options: dict[str, Any] | None = None, **params: Any) -> Custom:
    return Custom.from_params(DecodingParams("custom", options=options or {}, **params))


def test_settings_come_from_the_params_and_from_the_options() -> None:
    assert custom() == Custom(1, 0.25)
    assert custom({"rounds": 2, "careful": True}, threshold=0.5, top_k=4) == Custom(
        4, 0.5, rounds=2, careful=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 2}, "`weight` must be a number between 0 and 1, got 2"),
        ({"bound": -1}, "`bound` must be a number of at least 0, got -1"),
        (
            {"bound": 10**400},
            "`bound` must be a number of at least 0, got a number of 401 digits",
        ),  # no float is as large
        ({"rounds": 0}, "`rounds` must be a whole number of at least 1, got 0"),
        ({"careful": "no"}, "`careful` must be true or false, got 'no'"),  # a text would be true
        (
            {"wieght": 1},
            "strategy `custom` has no option `wieght`; it has only weight, bound, rounds, careful",
        ),
        ({"top_k": 2}, "strategy `custom` has no option `top_k`"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        custom(options)
    assert message in error.value.message


def test_only_what_is_a_number_may_differ_within_a_forward() -> None:
    strategy = custom({"weight": 1}, threshold=0.5)
    assert strategy.numbers() == {"threshold": 0.5, "weight": 1.0}
    assert custom({"bound": 2}).numbers() == {"threshold": 0.25, "weight": 0.5, "bound": 2.0}
    values = torch.tensor([[0.1], [0.9]])
    other = strategy.with_numbers({"threshold": values})
    assert other.threshold is values
    assert (other.weight, other.rounds, strategy.threshold) == (1, 3, 0.5)


def test_what_a_strategy_does_not_say_is_the_usual() -> None:
    strategy = custom()
    assert not strategy.needs_hidden_states
    assert (strategy.extra_steps, strategy.blocks, strategy.num_branches) == (0, 1, 1)
    view = View(
        tokens=torch.tensor([[1, 2]]),
        masked=torch.tensor([[True, True]]),
        active=torch.tensor([[True, True]]),
        step=torch.zeros(1, dtype=torch.long),
        max_steps=torch.tensor([2]),
        mask_token_id=7,
    )
    assert strategy.open(view) == {}
    assert torch.equal(strategy.branches(view, {}), view.tokens[:, None])
