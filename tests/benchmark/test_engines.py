"""bench/engines.py: engines on the same prompts, in processes of their own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import pytest
from engine_worker import Job

JOB = Job(
    engine="dmax",
    model="tiny-dmax",
    device="cpu",
    dtype="float32",
    tensor_parallel=1,
    batch_size=2,
    context=512,
    prompts=["Tom has 3 apples. He buys 2 more. How many apples has he?"] * 2,
    thresholds=[0.5, 0.9],
    strategy="spd",
    max_new_tokens=32,
    repeats=0,
)


def measured(token_ids: list[list[int]], forwards: list[int]) -> dict[str, Any]:
    return {
        "threshold": 0.5,
        "token_ids": token_ids,
        "forwards": forwards,
        "commit_forwards": [2 for _ in forwards],
        "prefill_forwards": [1 for _ in forwards],
        "seconds": [2.0, 4.0],
    }


def test_an_engine_is_compared_with_the_first_one() -> None:
    ours = measured([[1, 2, 3], [4, 5]], [2, 3])
    theirs = measured([[1, 2, 3], [4, 6]], [4, 3])
    table = engines.comparison(JOB, 2, {"dmax": [ours], "vllm": [theirs]})
    first, second = table.rows
    assert (first["same_tokens"], first["same_forwards"], first["prompts"]) == (2, 2, 2)
    assert (second["same_tokens"], second["same_forwards"]) == (1, 1)
    assert (second["num_forwards"], second["num_commit_forwards"]) == (7, 4)
    assert first["tpf"] == 1.0


def test_speed_is_reported_on_a_gpu_only() -> None:
    rows = {"dmax": [measured([[1, 2, 3], [4]], [2, 3])]}
    on_cpu = engines.comparison(JOB, 2, rows)
    assert "tokens_per_second" not in on_cpu.rows[0] and "tokens/s" not in on_cpu.cells[0]
    assert "interpreted" in on_cpu.note
    on_gpu = engines.comparison(replace(JOB, device="cuda"), 2, rows)
    assert on_gpu.rows[0]["tokens_per_second"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert on_gpu.cells[0]["tokens/s"] == "2 (1 to 2)"
    assert "interpreted" not in on_gpu.note


@pytest.mark.slow
def test_our_own_engine_does_its_job_in_a_process_of_its_own() -> None:
    results = engines.run(JOB, Path(sys.executable))
    assert results["settings"]["dtype"] == "float32"
    assert [row["threshold"] for row in results["rows"]] == JOB.thresholds
    for row in results["rows"]:
        assert len(row["token_ids"]) == len(row["forwards"]) == 2
        assert row["token_ids"][0] == row["token_ids"][1]
        assert row["commit_forwards"] == [0, 0] and row["seconds"] == []
