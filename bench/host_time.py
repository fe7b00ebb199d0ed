"""Host time of a step: what the engine does in Python around the replay of a CUDA graph.

    python bench/host_time.py

A stub that replays nothing "captures" the steps, on a CPU, so that no kernel is launched or waited
for. What is measured is the time of the thread in `Engine.step`, in two cases: no block finishes,
and every block finishes in its fifth step, several blocks not all at once. What a GPU takes besides
(a copy to it, a launch and a copy back) is not in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from command_line import changed, given_options, result_path

from dmax.benchmark.measure import spread
from dmax.benchmark.report import Row, Table, console, figure
from dmax.benchmark.run import record_tables
from dmax.checkpoint import Checkpoint
from dmax.engine.blocks import OpenBlocks
from dmax.engine.engine import Engine
from dmax.engine.graphs import Replay
from dmax.engine.request import Request
from dmax.llm import LLM
from dmax.params import DecodingParams, EngineOptions, check_number

CPU = torch.device("cpu")
AIMS = {1: 60, 16: 100}
"""Microseconds of a step that were aimed at, by batch size."""
STEPS_OF_A_BLOCK = 5
WARM_UP = 3 * STEPS_OF_A_BLOCK  # steps: a shape is captured the second time it comes
LENGTH = 512  # positions of a sequence, one span of the cache
MOST_STEPS = 50  # timed: then the first sequences end, and a step has little left to do


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        batch_sizes: sequences decoded at once.
        steps: timed in each case, `MOST_STEPS` at most.
        model: whose sizes the tensors have.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16)
    steps: int = MOST_STEPS
    model: str = "tiny-dmax"

    def __post_init__(self) -> None:
        """Raises `InputError` for a size below 1, or a number of steps that is out of range."""
        for size in self.batch_sizes:
            check_number("batch_sizes", size, low=1, whole=True)
        check_number("steps", self.steps, low=1, high=MOST_STEPS, whole=True)


def tables(options: Options) -> Iterator[Table]:
    """The one table."""
    checkpoint = LLM(options.model, device="cpu").checkpoint
    rows: list[Row] = []
    for size in options.batch_sizes:
        row: Row = {"batch": size}
        for name, finishes in (("running_us", False), ("finishing_us", True)):
            row[name] = spread(host_times(checkpoint, size, options.steps, finishes=finishes))
        rows.append(row | {"aim_us": AIMS.get(size)})
    cells = [
        {
            "batch": str(row["batch"]),
            "no block finishes, us": figure(row["running_us"], ".0f"),
            "a block in five steps, us": figure(row["finishing_us"], ".0f"),
            "aim": figure(row["aim_us"], "d"),
        }
        for row in rows
    ]
    note = "Time of the thread in a step of the engine whose graph does nothing."
    yield Table("host", "host time of a step", rows, cells, note)


@torch.inference_mode()
def host_times(
    checkpoint: Checkpoint, batch_size: int, num_steps: int, *, finishes: bool
) -> list[float]:
    """Microseconds of each step of so many sequences.

    Args:
        checkpoint: the model.
        batch_size: sequences decoded at once.
        num_steps: timed.
        finishes: whether every block finishes in its fifth step.
    """
    length = checkpoint.special_ids.block_length
    params = DecodingParams("spd", max_new_tokens=LENGTH - 2 * length, ignore_eos=True)
    options = EngineOptions(max_batch_size=batch_size, max_length=LENGTH, cuda_graphs=True)
    with no_replays():
        engine = Engine(checkpoint.model, checkpoint.special_ids, options)
        for index in range(batch_size):
            engine.add(Request(index, (1,) * length, params))
        engine.step()
        ((blocks, _, _),) = engine.batches()
        times = []
        for number in range(WARM_UP + num_steps):
            decide(blocks, number if finishes else None)
            began = time.thread_time()
            engine.step()
            times.append((time.thread_time() - began) * 1e6)
    return times[WARM_UP:]


def decide(blocks: OpenBlocks, number: int | None) -> None:
    """Leave behind what the graph of a step would: no block is done, or a fifth of them are."""
    done = torch.zeros(len(blocks.flags), dtype=torch.bool)
    if number is not None:
        done = (torch.arange(len(done)) + number) % STEPS_OF_A_BLOCK == 0
    blocks.flags.zero_()
    blocks.flags[:, 0] = done


@contextmanager
def no_replays() -> Iterator[None]:
    """Have steps captured by what runs them once and then does nothing."""

    def capture(run: Replay) -> Replay:
        run()
        return lambda: None

    with patch("dmax.engine.graphs.CudaCapture", lambda: capture):
        yield


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="timed in each case")
    parser.add_argument("--output", type=Path, default=result_path("host_time", CPU))
    given: dict[str, Any] = given_options(parser)
    output = given.pop("output")
    options = changed(parser, Options(), given)
    torch.set_num_threads(1)
    record = record_tables(
        "host", CPU, asdict(options), tables(options), console=console(), output=output
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
