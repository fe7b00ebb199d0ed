"""Slots, chunks of prompts, deadlines and cancellation, on numbers alone."""

from __future__ import annotations

from typing import Any

from dmax.engine.request import Request
from dmax.engine.scheduler import Scheduler
from dmax.params import DecodingParams


class Clock:
    """Time as the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(index: int, **params: Any) -> Request:
    return Request(index, (1,), DecodingParams(**params))


def scheduler(
    num_slots: int = 2, prefill_tokens: int = 64, riding_tokens: int = 0, clock: Clock | None = None
) -> Scheduler:
    return Scheduler(num_slots, prefill_tokens, riding_tokens, clock or Clock())


def test_first_come_first_served_into_the_lowest_free_slot() -> None:
    plan = scheduler()
    for index in range(4):
        plan.add(request(index))
    assert [(slot, r.index) for slot, r in plan.admit()] == [(0, 0), (1, 1)]
    assert plan.admit() == []
    plan.release(1, request(1))
    plan.release(0, request(0))
    assert [(slot, r.index) for slot, r in plan.admit()] == [(0, 2), (1, 3)]


def test_chunks_are_bounded_and_of_one_length() -> None:
    plan = scheduler(num_slots=5)
    plan.unfilled.update({0: 32, 1: 160, 2: 32, 3: 32, 4: 64})
    assert plan.next_prompts(True) == (
        [],
        [0],
        32,
    )  # 2 would share it, but 1 came first and wants a whole round
    plan.filled(0, 32)
    for left in (96, 32):
        assert plan.next_prompts(True) == ([], [1], 64)
        plan.filled(1, 64)
        assert plan.unfilled[1] == left
    assert plan.next_prompts(True) == ([], [1, 2], 32)  # not 3: 64 tokens a round
    for slot in (1, 2):
        plan.filled(slot, 32)
    assert plan.next_prompts(True) == ([], [3], 32)
    plan.filled(3, 32)
    assert plan.next_prompts(True) == ([], [4], 64)
    plan.filled(4, 64)
    assert plan.next_prompts(True) == ([], [], 0)


def test_short_prompts_ride_within_the_same_bounds() -> None:
    plan = scheduler(num_slots=5, prefill_tokens=96, riding_tokens=32)
    plan.unfilled.update({0: 32, 1: 64, 2: 8, 3: 32, 4: 128})
    assert plan.next_prompts(True) == ([0], [1], 64)
    plan.filled(0, 32)
    plan.filled(1, 64)
    assert plan.next_prompts(True) == ([2, 3], [], 0)  # 4 wants a whole round
    plan.filled(2, 8)
    plan.filled(3, 32)
    assert plan.next_prompts(True) == ([], [4], 96)
    plan.filled(4, 96)
    assert plan.next_prompts(True) == ([4], [], 0)  # what is left of a long prompt rides as well
    plan.filled(4, 32)
    plan.unfilled.update({0: 32, 1: 32, 2: 32, 3: 32})
    assert plan.next_prompts(False) == (
        [],
        [0, 1, 2],
        32,
    )  # nobody waits for them: they start together
    for slot in (0, 1, 2):
        plan.filled(slot, 32)
    assert plan.next_prompts(False) == ([3], [], 0)
    assert scheduler(prefill_tokens=16, riding_tokens=32).riding_tokens == 16


def test_deadlines_run_from_submission() -> None:
    clock = Clock()
    plan = scheduler(clock=clock)
    late, patient = request(0, deadline=2.0), request(1)
    clock.now = 10.0
    plan.add(late)
    plan.add(patient)
    clock.now = 11.9
    assert plan.ends_early(late) is None
    clock.now = 12.0
    assert plan.ends_early(late) == "deadline"
    assert plan.ends_early(patient) is None


def test_only_what_is_there_can_be_cancelled() -> None:
    plan = scheduler()
    plan.add(request(7))
    assert plan.cancel(8) is False
    assert plan.cancel(7) is True
    assert plan.ends_early(request(7)) == "cancelled"
    plan.forget(request(7))
    assert plan.cancel(7) is False
