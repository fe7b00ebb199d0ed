"""Host time of a step: how much Python there is around a replay, counted and not timed."""

from __future__ import annotations

import sys
from types import FrameType, SimpleNamespace
from typing import Any

import host_time
import pytest

from dmax.checkpoint import Checkpoint
from dmax.engine.engine import Engine
from dmax.errors import InputError
from dmax.llm import LLM


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return LLM("tiny-dmax", dtype="float32", device="cpu").checkpoint


@pytest.mark.parametrize(("batch_size", "most_calls"), [(1, 220), (16, 640)])
def test_a_step_takes_little_of_the_host(
    batch_size: int, most_calls: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of functions, in Python or not; one takes a tenth of a microsecond or more."""
    counts = list[int]()
    take_step = Engine.step

    def counted(engine: Engine) -> Any:
        num_calls = 0

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            return take_step(engine)
        finally:
            sys.setprofile(None)
            counts.append(num_calls)

    monkeypatch.setattr(Engine, "step", counted)
    host_time.host_times(checkpoint, batch_size, 8, finishes=False)
    assert counts[-1] == counts[-2] <= most_calls


def test_blocks_finish_as_they_are_told_to(checkpoint: Checkpoint) -> None:
    finished = list[int]()
    take_step = Engine.step

    def watched(engine: Engine) -> Any:
        events = take_step(engine)
        finished.append(sum(event.kind == "committed" for event in events))
        return events

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", watched)
        times = host_time.host_times(checkpoint, 4, 10, finishes=True)
    assert len(times) == 10
    assert sum(finished[-10:]) == 4 * 10 / host_time.STEPS_OF_A_BLOCK


def test_as_many_steps_as_there_may_be_all_have_every_sequence(checkpoint: Checkpoint) -> None:
    running = list[int]()
    take_step = Engine.step

    def watched(engine: Engine) -> Any:
        running.append(engine.load().num_running)
        return take_step(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", watched)
        host_time.host_times(checkpoint, 5, host_time.MOST_STEPS, finishes=True)
    assert set(running[1:]) == {5}
    with pytest.raises(InputError, match="`steps` must be a whole number between 1 and 50"):
        host_time.Options(steps=host_time.MOST_STEPS + 1)


def test_the_table(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "LLM", lambda *_, **__: SimpleNamespace(checkpoint=checkpoint))
    (table,) = host_time.tables(host_time.Options(batch_sizes=(1,), steps=5))
    (row,) = table.rows
    assert row["batch"] == 1 and row["aim_us"] == 60
    assert min(row[name]["low"] for name in ("running_us", "finishing_us")) > 0
    assert [cells["batch"] for cells in table.cells] == ["1"]
