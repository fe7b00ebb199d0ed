"""Speed on a GPU: LLaDA-2.0-mini at full size, against the time of reading its weights.

    python bench/gpu.py
    python bench/gpu.py --only steps                 # a part: a GPU may be lent for minutes only
    python bench/gpu.py --only bandwidth nodes kernels engine    # the first of these minutes
    python bench/gpu.py --device cpu --scale tiny    # only shows that everything runs

Beside the steps that `dmax bench` measures there are single forwards, steps without our kernels and
graphs, batch sizes, contexts, and every kernel alone. Weights are random and drawn on the device.
The last line on stdout is the JSON record, which also goes to bench/results/ unless the scale is
tiny.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from alone import kernel_table, node_table
from command_line import changed, given_options, refusing, result_path
from forwards import forward_table, uniform, without_kernels
from predicted import beside, predictions
from ratios import ratio, ratio_table

from dmax.benchmark.gpu import (
    PREFILL_TOKENS,
    GpuOptions,
    build,
    machine,
    quantised_rows,
    speed,
    step_row,
    step_table,
)
from dmax.benchmark.measure import Spread, copy_bandwidth
from dmax.benchmark.report import Row, Table, console, figure
from dmax.benchmark.routing import prescribe, replayed
from dmax.benchmark.run import record_tables
from dmax.benchmark.shapes import BLOCK_LENGTH
from dmax.checkpoint import Checkpoint
from dmax.environment import select_device
from dmax.kernels import has_triton
from dmax.params import check_number

PUBLISHED = 1338.0
"""Tokens per second at batch 1 that the paper reports, on two H200 (arXiv 2604.08302)."""
TPF = range(1, 9)
PARTS = (
    "bandwidth", "nodes", "kernels", "engine",
    "forwards", "steps", "batches", "contexts", "quantised",
)  # fmt: skip
"""Tables that can be left out; the others say what the machine is, and what the steps amount to.
`engine` is the first row of `steps`."""
WITHOUT_MODEL = {"bandwidth", "nodes"}
STEPS = ("engine", "steps", "batches", "contexts", "quantised")
TARGETS = {"H100": (1395, 2200), "H200": (1800, 2900)}
"""Tokens per second at TPF 6 that were aimed at, in bfloat16 and with 8-bit experts."""
SMALL_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "mask_token_id": 510,
    "eos_token_id": 511,
    "pad_token_id": 511,
}


@dataclass(frozen=True, slots=True)
class Options(GpuOptions):
    """What to measure beside the tables of `dmax bench`.

    Attributes:
        contexts: of the table of contexts.
        batch_sizes: of the table of batch sizes.
        forwards: timed for each row of the table of forwards.
        only: tables to measure, of `PARTS`.

    Raises:
        InputError: too few steps or tokens to tell a block's first step from the others.
    """

    contexts: tuple[int, ...] = (1024, 4096, 8192, 16_384)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    forwards: int = 30
    only: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        check_number("steps", self.steps, low=2, whole=True)
        check_number("new_tokens", self.new_tokens, low=2 * BLOCK_LENGTH, whole=True)


FULL = Options()
QUICK = replace(FULL, contexts=(1024, 8192), batch_sizes=(1, 8), repeats=1, forwards=10)
SMALL = Options(
    distinct=8.7,
    context=128,
    contexts=(128, 256),
    batch_sizes=(1, 2),
    new_tokens=64,
    steps=3,
    repeats=1,
    forwards=2,
    copy_bytes=2**20,
    changes=SMALL_SHAPE,
)
SCALES = {"full": FULL, "quick": QUICK, "tiny": SMALL}


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the engine's steps; what is on by default is what `LLM` does on a GPU.

    Attributes:
        label: names its row.
        experts: implementation of the experts; others than `fused_moe` are transformers' own, and
            run without any kernel of ours.
        fused_head: whether the head gives the best tokens without making logits.
        cuda_graphs: whether steps are captured.
        compiled: whether forwards are compiled.
        routing: of the blocks of a forward.
        early: whether our kernels start before the ones they follow have ended.
    """

    label: str
    experts: str = "fused_moe"
    fused_head: bool = True
    cuda_graphs: bool = True
    compiled: bool = False
    routing: Literal["replayed", "uniform"] = "replayed"
    early: bool = False


VARIANTS = (
    Variant("engine"),
    Variant("kernels that start early", early=True),
    Variant("engine, uniform routing", routing="uniform"),
    Variant("compiled", compiled=True),
    Variant("without CUDA graphs", cuda_graphs=False),
    Variant("without the fused head", fused_head=False),
    Variant("grouped_mm, CUDA graphs", "grouped_mm"),
    Variant("grouped_mm", "grouped_mm", cuda_graphs=False),
    Variant("batched_mm", "batched_mm", cuda_graphs=False),
    Variant("eager", "eager", cuda_graphs=False),
)


def tables(options: Options, device: torch.device) -> Iterator[Table]:
    """The tables, each measured when it is asked for. One that fails becomes a row with its error.

    Raises:
        InputError: the GPU has no room for the model.
    """
    bandwidth = copy_bandwidth(device, options.copy_bytes)
    if "bandwidth" in options.only:
        yield bandwidth_table(bandwidth)
    if "nodes" in options.only:
        yield attempt("nodes", lambda: node_table(device))
    if set(options.only) <= WITHOUT_MODEL:
        return

    checkpoint = build(options, device)
    yield machine(checkpoint, bandwidth)
    parts = parts_of_model(checkpoint, options, bandwidth)
    rows: dict[str, Sequence[Row]] = {}
    for name, part in parts.items():
        if name in options.only and not (name == "engine" and "steps" in options.only):
            table = attempt(name, part)
            rows[name] = table.rows
            yield table

    del checkpoint, parts  # makes room for the quantised ones
    if "quantised" in options.only:
        table = attempt("quantised", lambda: by_format(options, device, bandwidth))
        rows["quantised"] = table.rows
        yield table
    if compared := beside(of_default(rows), predicted_rows(device, options)):
        yield compared
    at_batch_1 = [row for name in ("steps", "quantised") for row in rows.get(name, ())]
    if any("step_ms" in row for row in at_batch_1):
        yield speeds(at_batch_1)
        yield ratios(at_batch_1, targets(device, options))


def parts_of_model(
    checkpoint: Checkpoint, options: Options, bandwidth: Spread
) -> dict[str, Callable[[], Table]]:
    """What measures the tables of the model as it is, by name and in their order."""
    return {
        "kernels": lambda: kernel_table(checkpoint, options.context, PREFILL_TOKENS),
        "engine": lambda: by_variant("engine", VARIANTS[:1], checkpoint, options, bandwidth),
        "forwards": lambda: forward_table(
            checkpoint, options.distinct, options.context, options.forwards, bandwidth
        ),
        "steps": lambda: by_variant("steps", VARIANTS, checkpoint, options, bandwidth),
        "batches": lambda: by_batch(checkpoint, options, bandwidth),
        "contexts": lambda: by_context(checkpoint, options, bandwidth),
    }


def attempt(name: str, part: Callable[[], Table]) -> Table:
    """The table of a part, or one with the error that ended it."""
    try:
        return part()
    except Exception as error:  # whatever it is: a rented GPU should not be left with one part less
        row = {"case": name, "error": f"{type(error).__name__}: {error}"}
        return Table(name, name, [row], [{"part": name, "problem": row["error"]}])


def of_default(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The steps of the engine as `LLM` makes it on a GPU, of all tables by name."""
    others = {variant.label for variant in VARIANTS[1:]}
    steps = [row for name in STEPS for row in rows.get(name, ())]
    return [row for row in steps if "step_ms" in row and row["case"] not in others]


def bandwidth_table(bandwidth: Spread) -> Table:
    """A copy within the memory of the device, bytes read and bytes written."""
    row = {"gb_per_second": {name: value / 1e9 for name, value in bandwidth.items()}}
    cells = {"copy, GB/s": figure(row["gb_per_second"], ".1f")}
    return Table("bandwidth", "copy", [row], [cells], "Bytes read and bytes written.")


def by_variant(
    name: str,
    variants: Sequence[Variant],
    checkpoint: Checkpoint,
    options: Options,
    bandwidth: Spread,
) -> Table:
    """Steps at batch 1, in one way or several."""
    rows = [variant_row(checkpoint, variant, options, bandwidth) for variant in variants]
    return step_table(name, f"denoising steps, batch 1, {options.context} positions", rows)


def by_format(options: Options, device: torch.device, bandwidth: Spread) -> Table:
    """Steps with quantised experts."""
    rows = quantised_rows(options, device, bandwidth)
    title = f"quantised experts, batch 1, {options.context} positions"
    return step_table("quantised", title, rows)


def predicted_rows(device: torch.device, options: Options) -> list[Row]:
    """What was predicted of this GPU; nothing but for the full size."""
    if device.type != "cuda" or options.changes:
        return []
    return predictions(torch.cuda.get_device_name(device))


def variant_row(
    checkpoint: Checkpoint, variant: Variant, options: Options, bandwidth: Spread
) -> Row:
    """Steps at batch 1 with kernels and graphs on or off, or with transformers' own experts."""
    model: Any = checkpoint.model
    num_blocks = 2
    route(checkpoint, variant.routing, num_blocks, options.distinct)
    model.set_experts_implementation(variant.experts)
    model.has_linear_head = variant.fused_head
    with kernels_of(variant):
        row = step_row(
            checkpoint,
            variant.label,
            options,
            bandwidth,
            cuda_graphs=variant.cuda_graphs,
            compiled=variant.compiled,
        )
    model.has_linear_head = True
    model.set_experts_implementation("fused_moe")
    return row


def kernels_of(variant: Variant) -> AbstractContextManager[None]:
    """Within it the kernels are those of the variant."""
    if variant.experts != "fused_moe":
        return without_kernels()
    if variant.early and has_triton():
        from dmax.kernels import pdl_triton

        return pdl_triton.overlapping(True)
    return nullcontext()


def route(checkpoint: Checkpoint, routing: str, num_blocks: int, distinct: float) -> None:
    """Prescribe the experts of so many blocks."""
    model: Any = checkpoint.model
    length = checkpoint.special_ids.block_length
    if routing == "uniform":
        prescribe(model, uniform(model.config, num_blocks * length))
    else:
        prescribe(model, replayed(model.config, distinct, num_blocks, length))


def by_batch(checkpoint: Checkpoint, options: Options, bandwidth: Spread) -> Table:
    """Steps of several sequences; each block hits a set of experts of its own."""
    num_blocks = 2 * max(options.batch_sizes)
    route(checkpoint, "replayed", num_blocks, options.distinct)
    rows = [
        step_row(checkpoint, str(size), options, bandwidth, batch=size)
        for size in options.batch_sizes
    ]
    title = f"batch sizes, {options.context} positions"
    return step_table("batches", title, rows, first="batch")


def by_context(checkpoint: Checkpoint, options: Options, bandwidth: Spread) -> Table:
    """Steps after longer prefixes."""
    route(checkpoint, "replayed", 2, options.distinct)
    rows = [
        step_row(checkpoint, str(context), replace(options, context=context), bandwidth)
        for context in options.contexts
    ]
    return step_table("contexts", "contexts, batch 1", rows, first="positions")


def speeds(rows: Sequence[Row]) -> Table:
    """What the steps amount to in tokens per second, by the tokens that a step decodes."""
    shown: list[Row] = []
    for row in rows:
        if "error" not in row:
            by_tpf = {f"tpf_{tpf}": speed(row, tpf) for tpf in TPF}
            shown.append({"case": row["case"], "step_ms": row["step_ms"], **by_tpf})
    shown.append({"case": "published: two H200, not measured here", "reported": PUBLISHED})
    cells = [
        {
            "case": row["case"],
            "ms/step": figure(row.get("step_ms"), ".2f"),
            **{f"TPF {tpf}": figure(row.get(f"tpf_{tpf}"), ".0f") for tpf in TPF},
            "reported": figure(row.get("reported"), ".0f"),
        }
        for row in shown
    ]
    note = (
        "TPF over the time of a step; a block's first step, which also commits the block before, "
        "takes longer."
    )
    return Table("speeds", "tokens/s at batch 1", shown, cells, note)


def ratios(rows: Sequence[Row], aims: tuple[int, int] | None) -> Table:
    """What the tables amount to, against tokens per second that were aimed at, if any were."""
    measured = {row["case"]: row for row in rows if "error" not in row}
    judged: list[Row] = []
    if "engine" in measured:
        engine = measured.pop("engine")
        plain = f">= {aims[0]}" if aims else ""
        eight_bit = f">= {aims[1]}" if aims else ""
        at_6 = speed(engine, 6) or 0.0
        judged.append(ratio("share of the floor", engine["of_floor"], ">= 0.75" if aims else ""))
        judged.append(ratio("tokens/s at TPF 6", at_6, plain))
        for case, row in measured.items():
            gain = row["step_ms"]["median"] / engine["step_ms"]["median"]
            target = ">= 5" if aims and case == "grouped_mm" else ""
            judged.append(ratio(f"engine / {case}", gain, target))
        for case in ("int8 experts", "fp8 experts"):
            if case in measured:
                quantised = speed(measured[case], 6) or 0.0
                judged.append(ratio(f"tokens/s at TPF 6, {case}", quantised, eight_bit))
        if aims:
            judged.append(ratio("tokens/s at TPF 6 / published on two H200", at_6 / PUBLISHED))
    return ratio_table(judged, "Engine / other: how many times faster its steps are.")


def targets(device: torch.device, options: Options) -> tuple[int, int] | None:
    """What was aimed at, in bfloat16 and with 8-bit experts; None but for the full size."""
    if device.type != "cuda" or options.changes:
        return None
    name = torch.cuda.get_device_name(device)
    return next((aims for card, aims in TARGETS.items() if card in name), None)


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--scale", choices=SCALES, default="full", help="quick: fewer rows; tiny: a small model"
    )
    parser.add_argument(
        "--distinct", type=float, help="experts that a block hits in a layer, on average"
    )
    parser.add_argument("--context", type=int, help="positions at the end of a completion")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="denoising steps of a block")
    parser.add_argument("--repeats", type=int, help="completions timed")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="tables to measure")
    parser.add_argument("--output", type=Path)
    given = given_options(parser)
    scale = given.pop("scale")
    output = given.pop("output", None)
    with refusing(parser):
        device = select_device(given.pop("device"))
    options = changed(parser, SCALES[scale], given)
    if output is None and scale != "tiny":
        output = result_path("gpu", device, given.get("only", ()))
    record = record_tables(
        "gpu", device, asdict(options), tables(options, device), console=console(), output=output
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
