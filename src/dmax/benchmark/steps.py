"""Denoising steps as the engine runs them, every block in the same number of steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dmax.benchmark.measure import spread
from dmax.benchmark.report import Row
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.params import DecodingParams

WARM_UP = 2  # completions: a step of a new shape is captured the second time it comes


def measure_steps(
    engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, *, steps: int, repeats: int
) -> Row:
    """Milliseconds of SPD's steps, and tokens per second after the first block.

    Args:
        engine: with room for all prompts at once, idle.
        prompts: token ids, one prompt for each sequence of the batch, all of one length.
        new_tokens: of a completion, two blocks or more, a multiple of the block length.
        steps: of each block, at least two.
        repeats: completions timed.

    Returns:
        `step_ms` of the steps that only denoise; `first_step_ms` of each block's first step, which
        also commits the block before; `tpf` and `tokens_per_second` without prefill and without
        the first block; `peak_gib` of the GPU's memory, None on a CPU.
    """
    length = engine.block_length
    params = never_sure(new_tokens, steps)
    requests = [Request(index, tuple(prompt), params) for index, prompt in enumerate(prompts)]
    on_gpu = engine.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    num_timed = steps * (new_tokens // length - 1)
    runs = [step_times(engine, requests)[-num_timed:] for _ in range(WARM_UP + repeats)][WARM_UP:]
    tokens = len(prompts) * (new_tokens - length)
    seconds = [sum(ms for ms, _ in run) / 1e3 for run in runs]
    return {
        "step_ms": spread([ms for run in runs for ms, is_first in run if not is_first]),
        "first_step_ms": spread([ms for run in runs for ms, is_first in run if is_first]),
        "tpf": length / steps,
        "tokens_per_second": spread([tokens / each for each in seconds]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def never_sure(new_tokens: int, steps: int) -> DecodingParams:
    """SPD that finishes a block at its cap of steps and never before."""
    return DecodingParams(
        strategy="spd",
        threshold=1.0,
        options={"stop_on_confidence": False, "stop_on_consistency": False},
        max_steps_per_block=steps,
        max_new_tokens=new_tokens,
        ignore_eos=True,
    )


def step_times(engine: Engine, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """Milliseconds of each of the engine's steps, until the host knows its result.

    With each goes whether the step was the first of a block.
    """
    for request in requests:
        engine.add(request)
    times = []
    is_first = True
    while engine.is_busy():
        began = time.perf_counter()
        events = engine.step()
        times.append(((time.perf_counter() - began) * 1e3, is_first))
        is_first = any(event.kind == "committed" for event in events)
    return times
