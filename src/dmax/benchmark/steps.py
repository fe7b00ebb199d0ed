"""Denoising steps as the engine runs them, every block in the same number of steps whatever the model says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from dmax.benchmark.measure import spread
from dmax.benchmark.report import Row, Section
from dmax.benchmark.rig import Rig, failure
from dmax.benchmark.routing import counted, prescribe
from dmax.checkpoint import Checkpoint
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.kernels import using
from dmax.kernels.quant import Format
from dmax.models.quantization import quantize_experts
from dmax.params import DecodingParams

WARM_UP = 2  # completions: a shape of step is captured the second time it comes


def measure_steps(
    checkpoint: Checkpoint,
    *,
    batch: int,
    context: int,
    new_tokens: int,
    steps: int,
    repeats: int,
    cuda_graphs: bool,
    compiled: bool = False,
    prefill_tokens: int | None = None,
) -> Row:
    """Milliseconds of SPD's steps on random prompts, and tokens per second behind the first block.

    Args:
        checkpoint: the model.
        batch: sequences, in step with each other.
        context: positions of a sequence at its end, a multiple of the block length as `new_tokens`
            is.
        new_tokens: of a completion, at least two blocks.
        steps: of each block, at least two.
        repeats: completions timed.
        cuda_graphs: whether steps are captured.
        compiled: whether forwards are compiled.
        prefill_tokens: prompt tokens of one forward; None: the whole prompt.

    Returns:
        `step_ms`: of a step over the open blocks alone; `first_step_ms`: of a block's first, which
        also commits the block before; `tpf` and `tokens_per_second`: measured, prefill and first
        block left out; `peak_gib`: of the GPU's memory, None on a CPU.
    """
    model: Any = checkpoint.model
    length = checkpoint.special_ids.block_length
    on_gpu = model.device.type == "cuda"
    engine = Engine(
        model,
        mask_token_id=checkpoint.special_ids.mask_token_id,
        eos_token_ids=checkpoint.special_ids.eos_token_ids,
        block_length=length,
        max_batch_size=batch,
        max_length=context,
        prefill_tokens=prefill_tokens or context,
        cuda_graphs=cuda_graphs,
        compile_model=compiled,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        model.config.vocab_size, (batch, context - new_tokens), generator=generator
    ).tolist()
    requests = [
        Request(index, tuple(prompt), never_sure(new_tokens, steps))
        for index, prompt in enumerate(prompts)
    ]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    runs = [
        step_times(engine, requests)[-steps * (new_tokens // length - 1) :]
        for _ in range(WARM_UP + repeats)
    ]
    timed = runs[WARM_UP:]
    tokens = batch * (new_tokens - length)
    return {
        "step_ms": spread([ms for run in timed for ms, is_first in run if not is_first]),
        "first_step_ms": spread([ms for run in timed for ms, is_first in run if is_first]),
        "tpf": length / steps,
        "tokens_per_second": spread([tokens / (sum(ms for ms, _ in run) / 1e3) for run in timed]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def never_sure(new_tokens: int, steps: int) -> DecodingParams:
    """SPD that finishes a block at its cap of steps and never before."""
    return DecodingParams(
        strategy="spd",
        threshold=1.0,
        stop_on_confidence=False,
        stop_on_consistency=False,
        max_steps_per_block=steps,
        max_new_tokens=new_tokens,
        ignore_eos=True,
    )


def step_times(engine: Engine, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """Milliseconds of each of the engine's steps, up to the host's knowing the result, and if it is a block's first."""
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


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the engine; what is on by default is what `LLM` does on a GPU."""

    label: str
    experts: str = "fused_moe"
    kernels: bool = True  # ours, of any kind
    fused_head: bool = True
    graphs: bool = True
    compiled: bool = False
    routing: Literal["replayed", "uniform"] = "replayed"


VARIANTS = (
    Variant("engine"),
    Variant("engine, uniform routing", routing="uniform"),
    Variant("compiled", compiled=True),
    Variant("without CUDA graphs", graphs=False),
    Variant("without the fused head", fused_head=False),
    Variant("grouped_mm, CUDA graphs", experts="grouped_mm", kernels=False),
    Variant("grouped_mm", experts="grouped_mm", kernels=False, graphs=False),
    Variant("batched_mm", experts="batched_mm", kernels=False, graphs=False),
    Variant("eager", experts="eager", kernels=False, graphs=False),
)
STEP_COLUMNS = {
    "distinct": "distinct:.1f",
    "GB": "gb:.2f",
    "floor ms": "floor_ms:.2f",
    "ms/step": "step_ms:.2f",
    "of floor": "of_floor:.0%",
    "first step ms": "first_step_ms:.2f",
    "tokens/s": "tokens_per_second:.0f",
    "at TPF": "tpf:.1f",
    "peak GiB": "peak_gib:.1f",
    "problem": "error",
}
STEP_NOTE = (
    "Steps of the engine, from the host's call to its knowing the result. First step: also commits the block before. "
    "Tokens/s: measured, with a set number of steps a block; first steps are in it, prefill and the first block not."
)


def engine_steps(rig: Rig) -> Section:
    """Denoising steps with kernels and graphs on and off, and with transformers' own experts."""
    rows = [{"case": variant.label, **variant_row(rig, variant)} for variant in VARIANTS]
    title = f"denoising steps, batch 1, {rig.options.context} positions"
    return Section("steps", title, {"case": "case", **STEP_COLUMNS}, rows, STEP_NOTE)


def variant_row(rig: Rig, variant: Variant) -> Row:
    """Steps at batch 1."""
    model: Any = rig.checkpoint.model
    prescribe(
        model,
        rig.options.distinct if variant.routing == "replayed" else None,
        2,
        rig.checkpoint.special_ids.block_length,
    )
    model.set_experts_implementation(variant.experts)
    model.has_linear_head = variant.fused_head
    try:
        with nullcontext() if variant.kernels else using("torch"):
            # batched_mm copies weights for each token
            return steps_row(
                rig, graphs=variant.graphs, compiled=variant.compiled, prefill_tokens=256
            )
    finally:
        model.set_experts_implementation("fused_moe")
        model.has_linear_head = True


def steps_row(
    rig: Rig,
    *,
    batch: int = 1,
    context: int | None = None,
    graphs: bool = True,
    compiled: bool = False,
    prefill_tokens: int | None = None,
    quantization: Format | None = None,
) -> Row:
    """`measure_steps` and its floor; a row that says what went wrong if memory ran out or no graph could be made."""
    options = rig.options
    context = context or rig.options.context
    row: Row = {"batch": batch, "context": context, "distinct": distinct_of(rig, batch)}
    try:
        row |= measure_steps(
            rig.checkpoint,
            batch=batch,
            context=context,
            new_tokens=options.new_tokens,
            steps=options.steps,
            repeats=options.repeats,
            cuda_graphs=graphs and rig.on_gpu,
            compiled=compiled and rig.on_gpu,
            prefill_tokens=prefill_tokens,
        )
    except RuntimeError as error:
        return row | failure(error)
    finally:
        rig.free()
    mean = context - options.new_tokens / 2
    return rig.against_floor(row, "step_ms", context=mean, batch=batch, quantization=quantization)


@torch.no_grad()
def distinct_of(rig: Rig, batch: int) -> float:
    """Experts that the open blocks of a step hit, as a mean over layers."""
    model: Any = rig.checkpoint.model
    tokens = torch.randint(
        model.config.vocab_size, (batch, rig.checkpoint.special_ids.block_length), device=rig.device
    )
    with counted(model) as found:
        model.base_model(input_ids=tokens)
    return sum(found) / len(found)


def by_batch(rig: Rig) -> Section:
    """Steps of several sequences; each block hits a set of experts of its own."""
    sizes = rig.options.batch_sizes
    length = rig.checkpoint.special_ids.block_length
    prescribe(rig.checkpoint.model, rig.options.distinct, 2 * max(sizes), length)
    rows = [steps_row(rig, batch=size) for size in sizes]
    title = f"batch sizes, {rig.options.context} positions"
    return Section("batches", title, {"batch": "batch:d", **STEP_COLUMNS}, rows, STEP_NOTE)


def by_context(rig: Rig) -> Section:
    """Steps behind longer prefixes."""
    prescribe(
        rig.checkpoint.model, rig.options.distinct, 2, rig.checkpoint.special_ids.block_length
    )
    rows = [
        steps_row(rig, context=context, prefill_tokens=2048) for context in rig.options.contexts
    ]
    return Section(
        "contexts", "contexts, batch 1", {"positions": "context:d", **STEP_COLUMNS}, rows, STEP_NOTE
    )


def by_format(rig: Rig) -> Section:
    """Steps with quantised experts; the model is built anew for each format."""
    rows = []
    for form in get_args(Format):
        rig.rebuild()
        quantize_experts(rig.checkpoint.model, form)
        prescribe(
            rig.checkpoint.model, rig.options.distinct, 2, rig.checkpoint.special_ids.block_length
        )
        rows.append(
            {"case": f"{form} experts", "format": form, **steps_row(rig, quantization=form)}
        )
    title = f"quantised experts, batch 1, {rig.options.context} positions"
    return Section("quantised", title, {"case": "case", **STEP_COLUMNS}, rows, STEP_NOTE)
