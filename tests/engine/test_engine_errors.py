"""Requests that fail: each ends with its own error, and no other request notices."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from parts import (
    COUNT,
    EOS,
    MASK,
    L,
    ScriptedModel,
    confident,
    drain,
    engine_of,
    request,
    result,
    run,
    scripted,
)

from dmax.decoding import get_strategy
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.spd import SoftParallelDecoding
from dmax.decoding.strategy import Number, Strategy, number
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.outputs import StreamEvent
from dmax.params import DecodingParams, EngineOptions
from dmax.special_ids import SpecialIds

BROKEN = 2 * L + 1
"""The position whose logits are NaN: in the third block."""
BAD = 9
"""The token of a prompt that a strategy below cannot stand."""


def table_with_nan() -> torch.Tensor:
    table = confident(COUNT * 5)
    table[BROKEN] = torch.nan
    return table


def ends(events: list[StreamEvent]) -> dict[int, StreamEvent]:
    """The last events of requests, in the order in which they came."""
    return {event.index: event for event in events if event.kind == "finished"}


# --- broken logits --------------------------------------------------------------------------------


def test_a_broken_request_ends_with_an_event_that_carries_its_error() -> None:
    engine = scripted(table_with_nan())
    events = list(engine.run([request((1,) * BROKEN, index=3)]))
    (event,) = events
    assert (event.kind, event.index, event.output, event.token_ids) == ("finished", 3, None, ())
    assert isinstance(event.error, InputError)
    assert event.error.message == "the model gave NaN logits for prompt 3"
    assert event.error.hint == "check the checkpoint, or load it with dtype float32"


def test_what_was_decoded_before_is_reported_and_the_error_comes_last() -> None:
    engine = scripted(table_with_nan())
    events = list(engine.run([request((1,), max_new_tokens=4 * L)]))
    assert [event.kind for event in events] == ["committed", "committed", "finished"]
    assert [event.error is None for event in events] == [True, True, False]


def test_others_of_the_same_step_are_told_in_the_same_call() -> None:
    engine = scripted(table_with_nan(), max_batch_size=4, max_length=5 * L)
    fine = request((1,), 0, max_new_tokens=L - 1)
    longer = request((1,), 2, max_new_tokens=2 * L - 1)
    engine.add(fine)
    engine.add(request((1,) * (2 * L), 1, max_new_tokens=L))
    engine.add(longer)
    engine.add(request((2,) * (2 * L), 3, max_new_tokens=L))
    events = engine.step()
    assert [(event.index, event.kind) for event in events] == [
        (0, "committed"),
        (0, "finished"),
        (1, "finished"),
        (2, "committed"),
        (3, "finished"),
    ]
    ended = ends(events)
    assert result(ended[0]).token_ids == tuple(COUNT[1:])
    for index in (1, 3):
        with pytest.raises(InputError, match=f"NaN logits for prompt {index}"):
            result(ended[index])
    assert engine.is_busy()
    rest = engine.step()
    assert {event.index for event in rest} == {2}
    assert not engine.is_busy()
    assert engine.step() == []  # nothing was held back
    assert result(rest[-1]) == run(scripted(confident(COUNT * 5)), longer)[2]


def test_an_engine_is_free_once_its_only_request_is_broken() -> None:
    engine = scripted(table_with_nan(), max_batch_size=1, max_length=5 * L)
    engine.add(request((1,) * (2 * L), 0, max_new_tokens=L))
    engine.add(request((1,), 1, max_new_tokens=L - 1))
    (event,) = engine.step()
    assert event.error is not None
    assert engine.cancel(0) is False
    # The other one takes the slot that has become free.
    assert drain(engine)[1].token_ids == tuple(COUNT[1:])
    assert not engine.is_busy()


def test_run_goes_on_after_a_broken_request() -> None:
    requests = [
        request((1,), 0, max_new_tokens=L - 1),
        request((1,) * (2 * L), 1, max_new_tokens=L),
        request((1, 2), 2, max_new_tokens=L),
    ]
    for slots in (1, 2, 3):
        events = ends(list(scripted(table_with_nan(), max_batch_size=slots).run(requests)))
        assert {index: event.error is None for index, event in events.items()} == {
            0: True,
            1: False,
            2: True,
        }
        alone = run(scripted(confident(COUNT * 5)), requests[2])[2]
        assert result(events[2]) == alone


@pytest.mark.parametrize("strategy", ["spd", "threshold", "lopa", "d2f", "mbd", "llada"])
def test_every_strategy_leaves_broken_logits_to_the_engine(strategy: str) -> None:
    engine = scripted(table_with_nan(), max_batch_size=2)
    requests = [
        request((1,) * (2 * L + 1), 0, strategy=strategy),
        request((1,), 1, strategy=strategy, max_new_tokens=L - 1),
    ]
    events = ends(list(engine.run(requests)))
    assert events[0].error is not None and "NaN logits" in events[0].error.message
    assert result(events[1]).token_ids == tuple(COUNT[1:])


# --- strategies that cannot go on -----------------------------------------------------------------


@dataclass(frozen=True)
class Proposing(Strategy):
    """Proposes MASK for the position of a block that `at` says, if there is one."""

    name: ClassVar[str] = "proposing"

    at: Number = number(0)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        position = torch.arange(view.tokens.shape[1])
        tokens = predict(view, output).tokens.masked_fill(position == self.at, MASK)
        return Decision(tokens, promote=view.masked), state


def test_proposing_mask_ends_the_request_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = EntryPoint("proposing", f"{__name__}:Proposing", "dmax.strategies")
    monkeypatch.setattr("dmax.decoding.entry_points", lambda group: [plugin])
    engine = scripted(confident(COUNT * 5), max_batch_size=3)
    requests = [
        request((1,), index, strategy="proposing", options={"at": at}, max_new_tokens=L - 1)
        for index, at in enumerate((0, 3, L))  # the prompt's position, one that counts, none
    ]
    events = ends(list(engine.run(requests)))
    assert events[1].error is not None
    message = "strategy `proposing` proposed the mask token for prompt 1"
    assert events[1].error.message == message
    for index in (0, 2):
        assert result(events[index]).token_ids == tuple(COUNT[1:])


def head(heads: Path, strategy: str) -> dict[str, Any]:
    return {"strategy": strategy, "options": {"head": str(heads)}}


@pytest.mark.parametrize("golden", ["llada2_moe_c"], indirect=True)
def test_a_head_of_another_model_ends_its_own_requests(
    heads: Path, golden: tuple[str, Any, dict[str, Any]]
) -> None:
    """The head takes the blocks of this model, but hidden states of size 4."""
    _, checkpoint, _ = golden
    settings = [
        {"strategy": "threshold", "threshold": 0.9},
        head(heads, "demask"),
        head(heads, "demask"),
        {"strategy": "spd"},
    ]
    requests = [
        Request(index, (1, 2, 3), DecodingParams(max_new_tokens=16, **own))
        for index, own in enumerate(settings)
    ]
    engine = engine_of(checkpoint, max_length=64)
    for each in requests:
        engine.add(each)
    events = engine.step()
    ended = ends(events)
    assert list(ended) == [1, 2]
    for event in ended.values():
        assert isinstance(event.error, InputError)
        assert "needs hidden states of size 4, got " in event.error.message
        assert event.error.hint == "a head belongs to the model that it was trained on"
    finished = drain(engine)
    assert not engine.is_busy()
    for index in (0, 3):
        alone = run(engine_of(checkpoint, max_length=64), requests[index])
        assert finished[index] == alone[index]


@pytest.mark.parametrize("strategy", ["demask", "learn2pd"])
def test_blocks_that_are_too_long_for_a_head_end_its_own_requests(
    heads: Path, strategy: str
) -> None:
    model = ScriptedModel(confident(COUNT * 10)).eval()
    engine = Engine(model, SpecialIds(MASK, (EOS,), EOS, 2 * L), EngineOptions(max_batch_size=2))
    requests = [
        request((1, 2), 0, max_new_tokens=14),
        request((1,), 1, **head(heads, strategy)),
        request((1,), 2, **head(heads, strategy)),
        request((1, 2), 3, max_new_tokens=14),
    ]
    events = ends(list(engine.run(requests)))
    for index in (1, 2):
        error = events[index].error
        assert isinstance(error, InputError)
        assert "takes blocks of up to 8 positions, got 16" in error.message
    for index in (0, 3):
        assert result(events[index]).token_ids == tuple((COUNT * 2)[2:])
    assert not engine.is_busy()
    assert not any(engine.cancel(index) for index in range(4))


@dataclass(frozen=True)
class Failing(SoftParallelDecoding):
    """Fails with an error that is nobody's input, once a prompt holds BAD."""

    name: ClassVar[str] = "failing"

    where: str = "open"

    def open(self, view: View) -> State:
        if self.where == "open":
            raise RuntimeError("out of order")
        return super().open(view)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        if self.where == "step" and (~view.active & (view.tokens == BAD)).any():
            raise RuntimeError("out of order")
        return super().step(view, output, state)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = EntryPoint("failing", f"{__name__}:Failing", "dmax.strategies")
    monkeypatch.setattr("dmax.decoding.entry_points", lambda group: [plugin])


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("where", ["open", "step"])
def test_a_strategy_that_raises_ends_its_own_request(where: str) -> None:
    engine = scripted(confident(COUNT * 5), max_batch_size=2)
    raises = request((1, BAD), 0, strategy="failing", options={"where": where})
    others = [request((1,), index, max_new_tokens=L - 1) for index in (1, 2)]
    for _ in range(3):  # it has all its slots, so that no later request waits for ever
        events = ends(list(engine.run([raises, *others])))
        assert isinstance(events[0].error, RuntimeError)
        assert str(events[0].error) == "out of order"
        alone = run(scripted(confident(COUNT * 5)), *others)
        assert {index: result(events[index]) for index in (1, 2)} == alone
        assert not engine.is_busy()


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_those_who_share_its_forward_are_decoded_as_alone(temperature: float) -> None:
    def asks(prompt: tuple[int, ...], index: int) -> Request:
        return request(
            prompt,
            index,
            strategy="failing",
            options={"where": "step"},
            temperature=temperature,
            seed=index,
            max_new_tokens=2 * L,
        )

    fine = [asks((1,), 1), asks((1, 2), 2)]
    alone = {each.index: run(scripted(confident(COUNT * 5)), each)[each.index] for each in fine}
    engine = scripted(confident(COUNT * 5), max_batch_size=4)
    events = ends(list(engine.run([fine[0], asks((1, BAD), 0), fine[1]])))
    assert isinstance(events[0].error, RuntimeError)
    assert {index: result(events[index]) for index in (1, 2)} == alone


def test_a_strategy_that_does_not_exist_is_refused_with_the_request() -> None:
    with pytest.raises(InputError, match="unknown strategy 'spdd'"):
        request((1,), strategy="spdd")
    with pytest.raises(InputError, match="has no option `x`"):
        request((1,), options={"x": 1})
    assert request((1,)).strategy == get_strategy(DecodingParams("spd"))
