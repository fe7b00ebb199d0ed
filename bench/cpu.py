"""Speed on a CPU: the tables of `dmax bench`, and what else the documentation quotes.

    python bench/cpu.py
    python bench/cpu.py --quick --dtypes float32
    python bench/cpu.py --only loops batches

Beside methods and batch sizes it measures memory, the loop's own share of the time and that of
matrix products, the engine against the published loops without and with a cache, compiled models,
and a dense backbone against its matrix products. The last line on stdout is the JSON record, which
also goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from command_line import changed, given_options, result_path
from compiled import compiled_table
from dense import dense_table
from hub_contest import TOGETHER, contests, hub_table
from memory import measure_apart
from overhead import loop_times, product_seconds
from ratios import ratio, ratio_table
from transformers.utils import logging

from dmax.benchmark.cpu import (
    SPD,
    TASK,
    CpuOptions,
    batching,
    bundled_models,
    decoding,
    encode,
)
from dmax.benchmark.measure import spread
from dmax.benchmark.report import Row, Table, console, figure
from dmax.benchmark.run import record_tables
from dmax.environment import DTYPES, lacks_compiler
from dmax.errors import InputError
from dmax.llm import LLM

CPU = torch.device("cpu")
PARTS = ("methods", "loops", "batches", "compiled", "dense")


@dataclass(frozen=True, slots=True)
class Options(CpuOptions):
    """What to measure beside the tables of `dmax bench`.

    Attributes:
        dense_layers: of the dense backbone.
        compiles: whether compiled models are measured, where there is a C++ compiler.
        memory: whether the memory of every batch size is measured, in processes of their own.
        only: tables to measure, of `PARTS`.
        clock: "wall", or "processor": the time that this process computes, for a machine that is
            shared; then with one thread (OMP_NUM_THREADS=1).

    Raises:
        InputError: an unknown dtype, or no batch size 1 to compare the others with.
    """

    dense_layers: int = 30
    compiles: bool = True
    memory: bool = True
    only: tuple[str, ...] = PARTS
    clock: str = "wall"

    def __post_init__(self) -> None:
        if 1 not in self.batch_sizes:
            given = ", ".join(map(str, self.batch_sizes))
            raise InputError(f"the batch sizes must hold 1, got {given}")
        unknown = [name for name in self.dtypes if name not in DTYPES]
        if unknown:
            raise InputError(f"unknown dtype {unknown[0]!r}; choose from {', '.join(DTYPES)}")


FULL = Options()
QUICK = Options(
    limit=3, batch_limit=16, repeats=1, batch_sizes=(1, 16), dtypes=("float32",), compiles=False
)


def tables(options: Options) -> Iterator[Table]:
    """The tables, each measured when it is asked for."""
    options = replace(options, compiles=options.compiles and not lacks_compiler(CPU))
    first = options.dtypes[0]
    judged: list[Row] = []
    if "methods" in options.only:
        methods = decoding(bundled_models(first), options)
        judged += method_ratios(methods.rows)
        yield methods
    if "loops" in options.only:
        limit = max(1, options.limit // 2)
        rounds = contests(bundled_models(first), limit, options.base_threshold, options.seed)
        loops = hub_table(rounds, first, max(1, options.repeats - 1), options.compiles)
        judged += loop_ratios(loops.rows)
        yield loops
    if "batches" in options.only:
        batches = with_anatomy(batching(options), options)
        judged += batch_ratios(batches.rows)
        yield batches
    if "compiled" in options.only and options.compiles:
        sizes = [size for size in options.batch_sizes if size in (1, 16)]
        yield compiled_table(
            options.dtypes, sizes, options.batch_limit, options.seed, options.repeats
        )
    if "dense" in options.only:
        repeats = 5 * options.repeats
        dense = dense_table(options.dtypes, options.dense_layers, repeats, options.compiles)
        judged += dense_ratios(dense.rows)
        yield dense
    yield ratio_table(judged)


# --- what batch sizes cost ------------------------------------------------------------------------


def with_anatomy(table: Table, options: Options) -> Table:
    """The table of batch sizes with memory and the loop's own share of the time."""
    examples = TASK.examples(options.batch_limit, options.seed)
    params = replace(SPD, max_new_tokens=TASK.max_new_tokens)
    rows = []
    for row in table.rows:
        llm = LLM("tiny-dmax", dtype=row["dtype"], device="cpu", max_batch_size=row["batch"])
        prompts = encode(llm, examples)
        times = [loop_times(llm, params, prompts) for _ in range(options.repeats)]
        floors = [product_seconds(llm, params, prompts)[0] for _ in range(options.repeats)]
        calls = times[0].calls
        milliseconds = {name: each / calls * 1e3 for name, each in row["seconds"].items()}
        rows.append(
            {
                **row,
                "ms_per_forward": milliseconds,
                "model_calls": calls,
                "loop_overhead": spread([each.overhead for each in times]),
                "picking": spread([each.picking_share for each in times]),
                "products_ms": spread([each / calls * 1e3 for each in floors]),
                "products_share": min(floors) / min(each.steps for each in times),
                **memory_of(row, options),
            }
        )
    cells = [
        {
            "dtype": row["dtype"],
            "batch": str(row["batch"]),
            "tokens/s": figure(row["tokens_per_second"], ".0f"),
            "ms/forward": figure(row["ms_per_forward"], ".2f"),
            "loop overhead": figure(row["loop_overhead"], ".1%"),
            "of it best tokens": figure(row["picking"], ".1%"),
            "products": figure(row["products_share"], ".0%"),
            "peak MiB": figure(row.get("peak_mib"), ".0f"),
            "loaded MiB": figure(row.get("loaded_mib"), ".0f"),
        }
        for row in rows
    ]
    note = (
        "Loop overhead: share of the steps' time outside `base_model.forward` and the head's "
        "product (hidden states times output embeddings, timed by running it once more). Products: "
        "share that the same steps' matrix products take when they run alone, attention's own two "
        "left out; both the fastest of the rounds. Forwards: "
        "calls of the model, prefill included. Memory: resident, in a process of its own for each "
        "row (VmHWM; loaded: VmRSS before decoding)."
    )
    return Table(table.name, table.title, rows, cells, note)


def memory_of(row: Row, options: Options) -> Row:
    """What a batch size takes of the memory, measured in a process of its own."""
    if not options.memory:
        return {}
    return measure_apart("tiny-dmax", row["dtype"], row["batch"], options.batch_limit, options.seed)


# --- ratios ---------------------------------------------------------------------------------------


def method_ratios(rows: Sequence[Row]) -> list[Row]:
    """How many times as fast SPD is as the base model's ways to decode."""
    speed = {row["method"]: row["tokens_per_second"]["median"] for row in rows}
    targets = {"threshold": ">= 2.5", "one token": ">= 5", "one token, block 1": ""}
    return [
        ratio(f"{spd} / {other}", speed[spd] / speed[other], target)
        for spd in ("SPD", "SPD, best")
        for other, target in targets.items()
    ]


def loop_ratios(rows: Sequence[Row]) -> list[Row]:
    """How many times as fast the engine is as the hub loop."""
    names = {
        "engine": "engine",
        "compiled": "compiled engine",
        "together": f"engine, {TOGETHER} at once,",
    }
    judged = []
    for row in rows:
        shots = f", {row['shots']} examples before" if row["shots"] else ""
        for key, name in names.items():
            if f"{key}_ratio" in row:
                for loop, end, target in (("hub", "", ">= 3"), ("cached", "_cached", "")):
                    gain = row[f"{key}{end}_ratio"]["median"]
                    title = f"{name} / {loop} loop, {row['method']}{shots}"
                    judged.append(ratio(title, gain, target))
    return judged


def batch_ratios(rows: Sequence[Row]) -> list[Row]:
    """The loop's share of the time, and how many times as fast sixteen sequences are as one."""
    targets = {1: "<= 0.08", 16: "<= 0.05"}
    alone = {row["dtype"]: row["tokens_per_second"]["median"] for row in rows if row["batch"] == 1}
    judged = []
    for row in rows:
        dtype = row["dtype"]
        size = row["batch"]
        if size in targets:
            share = row["loop_overhead"]["median"]
            judged.append(ratio(f"loop overhead, batch {size}, {dtype}", share, targets[size]))
            floor = row["products_share"]
            judged.append(ratio(f"products' share of a step, batch {size}, {dtype}", floor))
        if size == 16:
            gain = row["tokens_per_second"]["median"] / alone[dtype]
            judged.append(ratio(f"batch 16 / batch 1, {dtype}", gain, ">= 4.5"))
    return judged


def dense_ratios(rows: Sequence[Row]) -> list[Row]:
    """How many times as long a forward of the dense backbone takes as its products."""
    names = {"ratio": "135M forward", "compiled_ratio": "135M forward, compiled,"}
    return [
        ratio(f"{name} / its products, {row['dtype']}", row[key], "<= 1.5")
        for row in rows
        for key, name in names.items()
        if key in row
    ]


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="under a minute, for a first impression"
    )
    parser.add_argument("--limit", type=int, help="problems at batch 1")
    parser.add_argument("--batch-limit", type=int, help="problems at every batch size")
    parser.add_argument("--repeats", type=int, help="rounds after the one that warms up")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="1 among them")
    parser.add_argument(
        "--dtypes", nargs="+", help="float32, bfloat16; methods are compared in the first"
    )
    parser.add_argument(
        "--base-threshold", type=float, help="of tiny-base: the lowest that keeps its accuracy"
    )
    parser.add_argument("--best-threshold", type=float, help="of tiny-dmax, besides 0.5")
    parser.add_argument("--seed", type=int, help="of the problems")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="tables to measure")
    parser.add_argument(
        "--no-compiles",
        dest="compiles",
        action="store_const",
        const=False,
        help="no compiled model",
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_const", const=False, help="no peak of memory"
    )
    parser.add_argument(
        "--clock", choices=("wall", "processor"), help="whose time, on a shared machine"
    )
    parser.add_argument("--output", type=Path)
    given = given_options(parser)
    preset = QUICK if given.pop("quick") else FULL
    output = given.pop("output", None) or result_path("cpu", CPU, given.get("only", ()))
    options = changed(parser, preset, given)
    if options.clock == "processor":
        time.perf_counter = time.process_time  # which all tables read
    logging.disable_progress_bar()
    record = record_tables(
        "cpu", CPU, asdict(options), tables(options), console=console(), output=output
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
