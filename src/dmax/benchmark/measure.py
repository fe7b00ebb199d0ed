"""Timing: repeats in turns, medians with their spread, and where the time of a denoising loop goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.checkpoint import Checkpoint
from dmax.confidence import Candidates
from dmax.engine import runner
from dmax.engine.rows import Row, Rows, Shape
from dmax.kernels.lm_head import lm_head_top_k

T = TypeVar("T")
Spread = dict[str, float]
"""`median`, `low` and `high` of a measurement's repeats."""


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def in_turns(
    contenders: Mapping[str, Callable[[], T]], repeats: int, *, warm_up: int = 1
) -> dict[str, list[T]]:
    """Run everything once, then everything again, …: A B A B, so that a change of the machine's mood hits all alike.

    Returns:
        Results of the `repeats` rounds after the `warm_up` ones, by name.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, contender in contenders.items():
            result = contender()
            if turn >= warm_up:
                results[name].append(result)
    return results


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, on a GPU by events on its stream."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def copy_bandwidth(device: torch.device, num_bytes: int, repeats: int = 20) -> Spread:
    """Bytes per second of a copy within the device's memory, every byte counted as read and as written."""
    source = torch.randint(
        256, (num_bytes,), dtype=torch.uint8, device=device
    )  # zeros may copy faster
    target = torch.empty_like(source)
    times = in_turns(
        {"copy": lambda: milliseconds(lambda: target.copy_(source), device)}, repeats, warm_up=3
    )
    return spread([2 * num_bytes / (each / 1e3) for each in times["copy"]])


def open_block(
    checkpoint: Checkpoint, context: int, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """What runs one denoising forward as the engine does: an open block at the end of a context, head included.

    Keys and values of the `context` positions, the block's own among them, are random. Gives the
    best tokens [1, L, 1].
    """
    model: Any = checkpoint.model
    length = checkpoint.special_ids.block_length
    model_runner = runner.ModelRunner(
        model, length, 1, context, checkpoint.special_ids.mask_token_id, compiled=compiled
    )
    for layer in (*model_runner.cache.keys, *model_runner.cache.values):
        layer.normal_()
    opened = [Row(0, context - length, context - length, 0)]
    shape = Shape.of(opened, 1, length)
    rows = Rows.of(opened, [], length).to(model.device)
    inputs = model_runner.embed(
        torch.randint(model.config.vocab_size, (1, length), device=model.device)
    ).detach()

    def forward() -> Tensor:
        return model_runner.denoise(shape, rows, inputs).top(1).ids

    return forward


@dataclass(slots=True)
class Watch:
    """Seconds within a model, and calls of it.

    Attributes:
        forward: inside `base_model.forward`.
        head: of the head's product, hidden states times output embeddings.
        picking: of the rest of the head: the best tokens of the logits and their probabilities.
        calls: forwards, prefill included.
    """

    forward: float = 0.0
    head: float = 0.0
    picking: float = 0.0
    calls: int = 0

    def outside(self, seconds: float) -> float:
        """Share of the `seconds` that a loop took which went to anything but the model.

        The head's product was run once more for each step to be timed, so its time counts once in
        the loop's favour.
        """
        loop = seconds - self.head
        return (loop - self.head - self.forward) / loop

    def picked(self, seconds: float) -> float:
        """The part of that share that picks the best tokens out of the logits."""
        return self.picking / (seconds - self.head)


@contextmanager
def watched(model: Any) -> Iterator[Watch]:
    """Watch what a model on a CPU costs an engine over it."""
    watch = Watch()
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*_: object) -> None:
        watch.forward += time.perf_counter() - began
        watch.calls += 1

    def head(hidden: Tensor, weight: Tensor, k: int, mask_token_id: int) -> Candidates:
        start = time.perf_counter()
        found = lm_head_top_k(hidden, weight, k, mask_token_id)
        middle = time.perf_counter()
        F.linear(hidden, weight)
        product = time.perf_counter() - middle
        watch.head += product
        watch.picking += middle - start - product
        return found

    hooks = (
        model.base_model.register_forward_pre_hook(before),
        model.base_model.register_forward_hook(after),
    )
    try:
        with patch.object(runner, "lm_head_top_k", head):
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def resident_mib(field: str) -> float | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in MiB, as Linux counts them; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None
    )
