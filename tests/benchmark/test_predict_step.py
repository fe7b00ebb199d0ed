"""The prediction of a step's time: its constants give what is known of code that was measured."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import predict_step  # noqa: E402
from count_kernels import Node  # noqa: E402
from predict_step import MEASURED, PLANNED, TODAY, Load, microseconds, reviewed, speed  # noqa: E402


def test_the_constants_of_the_review_give_what_it_expected() -> None:
    assert reviewed("bf16", PLANNED) == pytest.approx(5.24, abs=0.01)


@pytest.mark.parametrize("form", predict_step.STEPS_MEASURED)
def test_todays_constants_give_what_was_measured(form: str) -> None:
    constants = replace(MEASURED, ceilings=predict_step.REVIEWED_CEILINGS)
    measured = predict_step.STEPS_MEASURED[form]
    assert reviewed(form, constants) == pytest.approx(measured, rel=0.02)


def test_the_time_of_a_node_by_hand() -> None:
    constants = replace(PLANNED, copy=2.0, cache=4.0, ceilings={"int8": 8.0})
    load = Load(rows=2, context=100, form="int8")
    assert microseconds(Node("mul", activations=4_000_000), load, constants) == 2.2 + 1
    assert microseconds(Node("_new_kernel", is_early=True), load, constants) == 3.3 - 0.7
    mm = Node("mm", weights=6_000_000)
    assert microseconds(mm, load, constants) == pytest.approx(3.1 + 3)
    attend = Node("_attend_kernel", cache=2_000)
    assert microseconds(attend, load, constants) == pytest.approx(4.8 + 2 * 100 * 2_000 / 2e6)
    # An expert that all tokens take is the 257th of its stack, and always read.
    experts = Node("_gate_up_kernel", experts=257_000_000, num_experts=257)
    megabytes = load.distinct + 1
    expected = 1.3 + megabytes / 2.7 + megabytes / 8
    assert microseconds(experts, load, constants) == pytest.approx(expected)


def test_attention_goes_on_by_a_tile_of_keys_in_each_turn() -> None:
    constants = replace(PLANNED, turn=2.0)
    whole = Node(
        "_attend_kernel", most_shares=33, keys_of_share=130, programs=4, queries=128, keys=64
    )
    half = replace(whole, programs=8, queries=64)
    # 17 tiles in 7 shares, of 28 programs or 56; 257 in 33, on one multiprocessor or two on it.
    assert microseconds(whole, Load(1, 1024), constants) == pytest.approx(4.8 + 3 * 2)
    assert microseconds(half, Load(1, 1024), constants) == pytest.approx(4.8 + 3 * 1)
    for node in (whole, half):
        assert microseconds(node, Load(1, 16_384), constants) == pytest.approx(4.8 + 8 * 2)
    rows = replace(whole, most_shares=0, programs=256)
    assert microseconds(rows, Load(64, 1024), constants) == pytest.approx(4.8 + 2 * 17 * 2)


def test_the_measured_time_of_attention() -> None:
    """Commit aad5b1a at 1,024 positions: 213 us for 20 layers."""
    node = Node(
        "_attend_kernel",
        cache=2048,
        share=266_240,
        most_shares=33,
        keys_of_share=130,
        programs=4,
        queries=128,
        keys=64,
        activations=262_168,
    )
    assert 20 * microseconds(node, Load(1, 1024), TODAY) == pytest.approx(213, rel=0.01)


def test_blocks_draw_their_experts_apart() -> None:
    assert Load(1, 0).distinct == pytest.approx(69.5)
    assert Load(2, 0).distinct == pytest.approx(69.5 + 69.5 * (1 - 69.5 / 256))
    assert Load(64, 0).distinct == pytest.approx(256)


def test_many_tokens_are_bound_by_arithmetic() -> None:
    mm = Node("mm", weights=12_000_000)
    few, many = (microseconds(mm, Load(rows, 0), PLANNED) for rows in (1, 64))
    assert few == pytest.approx(3.1 + 4)
    assert many == pytest.approx(3.1 + 12e6 * 64 * 32 / 600e6)  # two operations for two bytes


def test_the_record_is_of_todays_code() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOLS / "predict_step.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_speed_counts_the_first_step_of_a_block() -> None:
    """A block of 32 takes 5.33 steps at TPF 6, of which one also commits the block before."""
    assert speed(4.0, 4.0, 1) == pytest.approx(6 / 4e-3)
    assert speed(4.0, 6.0, 2) == pytest.approx(2 * 32 / (6 + 13 / 3 * 4) * 1e3)
