"""`dmax bench` on a GPU: LLaDA-2.0-mini at full size against the time it takes to read its weights.

Weights are random and experts prescribed (`routing.py`), so that a forward reads as many as with a
trained model. Steps are those of the engine. Random weights cannot tell how many tokens a step
decodes (TPF), so tokens per second are given for the TPF of a trained model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch

from dmax.benchmark.measure import Spread, copy_bandwidth
from dmax.benchmark.report import MISSING, Row, Table, figure
from dmax.benchmark.roofline import against_floor, forward_bytes, num_bytes
from dmax.benchmark.routing import distinct_experts, prescribe, replayed
from dmax.benchmark.shapes import llada2_mini
from dmax.benchmark.steps import measure_steps
from dmax.checkpoint import Checkpoint
from dmax.errors import InputError, first_line
from dmax.kernels.quant import Format
from dmax.llm import LLM
from dmax.models.quantization import quantize_experts

ROOM_GIB = 36  # of the model, its cache and what a forward needs
PREFILL_TOKENS = 256  # of one forward; transformers' batched_mm copies the experts of each token
TRAINED_TPF = 6  # of a DMax model
STEP_NOTE = (
    "Steps of the engine, from the host's call to its knowing the result. Of floor: the time that "
    "reading the bytes takes at the bandwidth of a copy, over the time measured. First step: also "
    "commits the block before. Tokens/s: measured, with a set number of steps a block; first steps "
    f"are in it, prefill and the first block not. At TPF {TRAINED_TPF}: that many tokens in the "
    "time of a step."
)


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What to measure.

    Attributes:
        distinct: experts that a block hits in a layer, on average; 69.5 is what others measured on
            LLaDA-2.0-mini (arXiv 2605.30876).
        context: positions at the end of a completion.
        new_tokens: of each completion, two blocks or more.
        steps: denoising steps that every block takes, at least two.
        repeats: completions that are timed, after two that warm up.
        copy_bytes: size of the copy that measures bandwidth.
        changes: to the shape of LLaDA-2.0-mini.
    """

    distinct: float = 69.5
    context: int = 1024
    new_tokens: int = 256
    steps: int = 5
    repeats: int = 3
    copy_bytes: int = 4 * 2**30
    changes: Mapping[str, Any] = field(default_factory=dict)


FULL = GpuOptions()
QUICK = replace(FULL, repeats=1)


def tables(options: GpuOptions, device: torch.device) -> Iterator[Table]:
    """The tables, each measured when it is asked for.

    Raises:
        InputError: the GPU has no room for the model.
    """
    checkpoint = build(options, device)
    bandwidth = copy_bandwidth(device, options.copy_bytes)
    yield machine(checkpoint, bandwidth)
    rows = [step_row(checkpoint, "bfloat16", options, bandwidth)]
    del checkpoint  # makes room for the quantised ones
    rows += quantised_rows(options, device, bandwidth)
    title = f"denoising steps, batch 1, {options.context} positions"
    yield step_table("steps", title, rows)


def build(options: GpuOptions, device: torch.device) -> Checkpoint:
    """The model with random weights and prescribed experts, drawn on the device.

    Raises:
        InputError: the GPU has no room for it.
    """
    free_memory()
    if device.type == "cuda" and not options.changes:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < ROOM_GIB:
            raise InputError(
                f"LLaDA-2.0-mini needs {ROOM_GIB} GiB of free GPU memory, this GPU has {free:.0f}",
                hint="run on the CPU with --device cpu",
            )
    checkpoint = llada2_mini(torch.bfloat16, device, **options.changes)
    model: Any = checkpoint.model
    num_blocks = 2  # of a forward at batch 1: the open one, and the one before that it commits
    prescribe(
        model,
        replayed(model.config, options.distinct, num_blocks, checkpoint.special_ids.block_length),
    )
    return checkpoint


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def machine(checkpoint: Checkpoint, bandwidth: Spread) -> Table:
    """What the device can do, and the size of the model."""
    model: Any = checkpoint.model
    on_gpu = model.device.type == "cuda"
    row = {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "CPU",
        "gb_per_second": {name: value / 1e9 for name, value in bandwidth.items()},
        "parameters": model.num_parameters(),
        "model_gib": num_bytes(model.parameters()) / 2**30,
    }
    cells = {
        "device": row["device"],
        "copy, GB/s": figure(row["gb_per_second"], ".1f"),
        "parameters": figure(row["parameters"], ",d"),
        "model, GiB": figure(row["model_gib"], ".2f"),
    }
    note = "Copy: bytes read and written by a copy within the device's memory."
    return Table("machine", "device and model", [row], [cells], note)


def step_row(
    checkpoint: Checkpoint,
    case: str,
    options: GpuOptions,
    bandwidth: Spread,
    *,
    batch: int = 1,
    cuda_graphs: bool = True,
    compiled: bool = False,
) -> Row:
    """Steps of the engine on random prompts, against the time of reading their bytes.

    Args:
        checkpoint: the model.
        case: names the row.
        options: what to measure.
        bandwidth: of a copy, bytes per second.
        batch: sequences, in step with each other.
        cuda_graphs: whether steps are captured; on a CPU they never are.
        compiled: whether forwards are compiled; on a CPU they never are.

    Returns:
        See `measure_steps` and `against_floor`; without these an `error`, if memory ran out or no
        graph could be made.
    """
    model: Any = checkpoint.model
    on_gpu = model.device.type == "cuda"
    distinct = distinct_experts(model, batch * checkpoint.special_ids.block_length)
    row: Row = {"case": case, "batch": batch, "context": options.context, "distinct": distinct}
    llm = LLM.from_checkpoint(checkpoint, max_batch_size=batch, compile_model=compiled and on_gpu)
    try:
        row |= run_steps(llm, options, cuda_graphs and on_gpu)
    except RuntimeError as error:
        return row | failure(error)
    finally:
        free_memory()

    context = options.context - options.new_tokens / 2  # halfway through the completion
    parts = forward_bytes(model, distinct, context, batch)
    return row | against_floor(row["step_ms"], parts, bandwidth)


def run_steps(llm: LLM, options: GpuOptions, cuda_graphs: bool) -> Row:
    """`measure_steps` with an engine of its own, on as many random prompts as it takes at once."""
    config: Any = llm.model.config
    shape = (llm.options.max_batch_size, options.context - options.new_tokens)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()
    batch, length = shape
    # Several prompts are encoded at once, so that their sequences stay in step.
    prefill_tokens = PREFILL_TOKENS if batch == 1 else batch * length
    engine = llm.engine(
        max_length=options.context, prefill_tokens=prefill_tokens, cuda_graphs=cuda_graphs
    )
    return measure_steps(
        engine, prompts, options.new_tokens, steps=options.steps, repeats=options.repeats
    )


def failure(error: RuntimeError) -> Row:
    """What a row holds that could not be measured: the first line of the error."""
    return {"error": first_line(error)}


def quantised_rows(options: GpuOptions, device: torch.device, bandwidth: Spread) -> list[Row]:
    """Steps with quantised experts; the model is built anew for each format."""
    rows = []
    for form in get_args(Format):
        checkpoint = build(options, device)
        quantize_experts(checkpoint.model, form)
        rows.append({"format": form, **step_row(checkpoint, f"{form} experts", options, bandwidth)})
        del checkpoint  # makes room for the next
    return rows


def step_table(name: str, title: str, rows: Sequence[Row], first: str = "case") -> Table:
    """A table of steps; `first` is the heading above the cases."""
    cells = [
        {
            first: row["case"],
            "distinct": figure(row["distinct"], ".1f"),
            "GB": figure(row.get("gb"), ".2f"),
            "floor ms": figure(row.get("floor_ms"), ".2f"),
            "ms/step": figure(row.get("step_ms"), ".2f"),
            "of floor": figure(row.get("of_floor"), ".0%"),
            "first step ms": figure(row.get("first_step_ms"), ".2f"),
            "tokens/s": figure(row.get("tokens_per_second"), ".0f"),
            "its TPF": figure(row.get("tpf"), ".1f"),
            f"at TPF {TRAINED_TPF}": figure(speed(row, TRAINED_TPF), ".0f"),
            "peak GiB": figure(row.get("peak_gib"), ".1f"),
            "problem": row.get("error", MISSING),
        }
        for row in rows
    ]
    return Table(name, title, rows, cells, STEP_NOTE)


def speed(row: Row, tpf: float) -> float | None:
    """Tokens per second if a step decodes `tpf` tokens of a sequence; None of a row that failed."""
    if "error" in row:
        return None
    return float(tpf * row["batch"] * 1e3 / row["step_ms"]["median"])
