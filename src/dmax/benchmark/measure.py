"""Timing: contenders take turns, and a figure is the median of its repeats with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name")
T = TypeVar("T")
Spread = dict[str, float]
"""`median`, `low` and `high` of a measurement's repeats."""


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def in_turns(
    contenders: Mapping[Name, Callable[[], T]], repeats: int, *, warm_up: int = 1
) -> dict[Name, list[T]]:
    """Run everything once, then everything again, A B A B …, so that a slow minute hits all alike.

    Returns:
        Results of the `repeats` rounds after the `warm_up` ones, by name.
    """
    results: dict[Name, list[T]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, contender in contenders.items():
            result = contender()
            if turn >= warm_up:
                results[name].append(result)
    return results


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, on a GPU by events on its stream."""
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def copy_bandwidth(device: torch.device, num_bytes: int, repeats: int = 20) -> Spread:
    """Bytes per second of a copy within the device's memory, bytes read and bytes written."""
    # Random bytes, because zeros may copy faster.
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: milliseconds(lambda: target.copy_(source), device)}
    times = in_turns(copy, repeats, warm_up=3)["copy"]
    return spread([2 * num_bytes / (each / 1e3) for each in times])
