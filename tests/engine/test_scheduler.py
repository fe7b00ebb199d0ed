"""Slots, chunks of prompts, deadlines and cancellation, on numbers only."""

from __future__ import annotations

from typing import Any

import pytest

from dmax.engine.request import Request
from dmax.engine.scheduler import SHORT_PROMPT, Scheduler
from dmax.errors import InputError
from dmax.params import DecodingParams


class Clock:
    """Time as the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(index: int, prompt: tuple[int, ...] = (1,), **params: Any) -> Request:
    return Request(index, prompt, DecodingParams(**params))


def scheduler(num_slots: int = 2, **changes: Any) -> Scheduler:
    """One with blocks of a single position: prompts of more than four tokens are long."""
    usual = {
        "block_length": 1,
        "vocab_size": 10,
        "context": None,
        "max_length": None,
        "prefill_tokens": 64,
        "clock": Clock(),
    }
    made = Scheduler(**usual | changes)
    made.plan(num_slots, capacity=64)
    return made


def test_first_come_first_served_into_the_lowest_free_slot() -> None:
    plan = scheduler()
    for index in range(4):
        plan.add(request(index))
    assert [(slot, r.index) for slot, r in plan.admit()] == [(0, 0), (1, 1)]
    assert list(plan.admit()) == []
    plan.release(1, request(1))
    plan.release(0, request(0))
    assert [(slot, r.index) for slot, r in plan.admit()] == [(0, 2), (1, 3)]


# --- prompts --------------------------------------------------------------------------------------


class Prompts:
    """What is left of prompts by slot, and whose turn it is."""

    def __init__(self, plan: Scheduler, left: dict[int, int]) -> None:
        self.plan = plan
        self.left = left

    def next(self, is_running: bool) -> tuple[list[int], list[int], int]:
        return self.plan.next_prompts(self.left, is_running)

    def filled(self, slot: int, num: int) -> None:
        self.left[slot] -= num
        if not self.left[slot]:
            del self.left[slot]


def test_chunks_are_bounded_and_of_one_length() -> None:
    prompts = Prompts(scheduler(), {0: 32, 1: 160, 2: 32, 3: 32, 4: 64})
    # 2 would share it, but 1 came first and wants a whole round.
    assert prompts.next(True) == ([], [0], 32)
    prompts.filled(0, 32)
    for left in (96, 32):
        assert prompts.next(True) == ([], [1], 64)
        prompts.filled(1, 64)
        assert prompts.left[1] == left
    assert prompts.next(True) == ([], [1, 2], 32)  # not 3: 64 tokens a round
    for slot in (1, 2):
        prompts.filled(slot, 32)
    assert prompts.next(True) == ([], [3], 32)
    prompts.filled(3, 32)
    assert prompts.next(True) == ([], [4], 64)
    prompts.filled(4, 64)
    assert prompts.next(True) == ([], [], 0)


def test_short_prompts_join_their_first_step_within_the_same_bounds() -> None:
    plan = scheduler(block_length=8, prefill_tokens=96)
    assert SHORT_PROMPT * plan.block_length == 32
    prompts = Prompts(plan, {0: 32, 1: 64, 2: 8, 3: 32, 4: 128})
    assert prompts.next(True) == ([0], [1], 64)
    prompts.filled(0, 32)
    prompts.filled(1, 64)
    assert prompts.next(True) == ([2, 3], [], 0)  # 4 wants a whole round
    prompts.filled(2, 8)
    prompts.filled(3, 32)
    assert prompts.next(True) == ([], [4], 96)
    prompts.filled(4, 96)
    assert prompts.next(True) == ([4], [], 0)  # what is left of a long prompt joins as well
    prompts.filled(4, 32)
    prompts.left.update({0: 32, 1: 32, 2: 32, 3: 32})
    # Nobody waits for them: they start together.
    assert prompts.next(False) == ([], [0, 1, 2], 32)
    for slot in (0, 1, 2):
        prompts.filled(slot, 32)
    assert prompts.next(False) == ([3], [], 0)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_short_prompt_that_is_more_than_a_round_does_not_join(is_running: bool) -> None:
    # Two blocks a round.
    prompts = Prompts(scheduler(block_length=8, prefill_tokens=20), {0: 32})
    assert prompts.next(is_running) == ([], [0], 16)
    prompts.filled(0, 16)
    assert prompts.next(is_running) == ([0], [], 0)


def test_a_round_encodes_a_block_at_least() -> None:
    prompts = Prompts(scheduler(block_length=8, prefill_tokens=1), {0: 16})
    assert prompts.next(True) == ([], [0], 8)


# --- what fits ------------------------------------------------------------------------------------


def test_blocks_are_decoded_whole_and_branches_take_room() -> None:
    plan = scheduler(block_length=8)
    asked = request(0, (1,) * 3, max_new_tokens=6)
    assert (plan.end(asked), plan.positions(asked)) == (16, 16)
    options = {"num_branches": 3}
    branching = request(0, (1,) * 3, max_new_tokens=6, strategy="lopa", options=options)
    assert (plan.end(branching), plan.positions(branching)) == (16, 32)


@pytest.mark.parametrize(
    ("prompt", "limits", "message"),
    [
        ((), {}, "prompt 3 is empty"),
        ((9, 10), {}, "prompt 3 holds a token id outside the vocabulary of 10"),
        ((-1,), {}, "prompt 3 holds a token id outside the vocabulary of 10"),
        ((1,), {"context": 15}, "it needs 16 positions, the model has 15"),
        ((1,), {"max_length": 8}, "it needs 16 positions, the engine was planned for 8"),
    ],
)
def test_what_can_never_fit_is_refused(
    prompt: tuple[int, ...], limits: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        scheduler(block_length=8, **limits).check(request(3, prompt, max_new_tokens=15))


def test_what_just_fits_is_taken() -> None:
    plan = scheduler(block_length=8, context=16, max_length=9)  # the plan has whole blocks
    plan.check(request(0, (1,), max_new_tokens=15))


# --- early ends -----------------------------------------------------------------------------------


def test_deadlines_run_from_submission() -> None:
    clock = Clock()
    plan = scheduler(clock=clock)
    late = request(0, deadline=2.0)
    patient = request(1)
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
    plan.drop(request(7))
    assert plan.cancel(7) is False
