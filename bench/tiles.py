"""Searches tiles on a GPU: experts, head and attention, with the default and with its neighbours.

    python bench/tiles.py                               # about three minutes, most of it compiling
    python bench/tiles.py --only attention "experts, int4"

A candidate runs in a CUDA graph of several launches, none of which finds its weights in the cache.
One that does not compile, does not fit, keeps numbers outside of its registers or gives another
result is listed with its problem. The record, bench/results/tiles_GPU_DATE.json, is written after
every case; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from alone import in_graph
from command_line import result_path
from tile_cases import Call, Case, Sizes, cases
from torch import Tensor

from dmax.benchmark.measure import Spread
from dmax.benchmark.report import MISSING, Row, Table, console, figure, show
from dmax.environment import environment
from dmax.errors import first_line
from dmax.files import check_ours, check_writable, read_record, write_atomically
from dmax.kernels import using
from dmax.models import LLaDA2MoeConfig

FULL = Sizes(LLaDA2MoeConfig())
GROUPS = ("experts, bf16", "experts, int8", "experts, fp8", "experts, int4", "head", "attention")
LARGEST_DIFFERENCE = 1e-2  # of a result in bfloat16, which has eight bits
DEFAULT = "default"

Timer = Callable[[Sequence[Call]], Spread]
"""Milliseconds of all calls."""
Run = Callable[[Call], tuple[Tensor, int]]
"""The result of a call, and the words of each thread that its kernels spill."""


def run_once(call: Call) -> tuple[Tensor, int]:
    """On a GPU: compiles what has not run yet.

    Raises:
        Exception: of Triton, if a kernel does not compile or does not fit.
    """
    from triton.runtime.jit import JITFunction

    spilled = [0]
    original = JITFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        spilled.append(kernel.n_spills)
        return kernel

    with patch.object(JITFunction, "run", noting):
        result = call()
    return result, max(spilled)


def measure(case: Case, timer: Timer, run: Run) -> Row:
    """The default and its neighbours, each with its microseconds or with what is wrong with it."""
    rows: list[Row] = []
    expected: Tensor | None = None
    for label, tile in {DEFAULT: case.default, **case.tiles}.items():
        row: Row = {"tile": label, "sizes": tile}
        rows.append(row)
        try:
            calls = case.calls(tile)
            result, spilled = run(calls[0])
            expected = result if expected is None else expected
            if label != DEFAULT and (problem := problem_of(result, expected, spilled)):
                row["problem"] = problem
            else:
                row["us"] = {key: ms * 1e3 / len(calls) for key, ms in timer(calls).items()}
        except Exception as error:  # Triton's are of many classes; the others should be measured
            row["problem"] = f"{type(error).__name__}: {first_line(error)}"
            if label == DEFAULT:
                break
    return {"case": case.name, "tiles": rows}


def problem_of(result: Tensor, expected: Tensor, spilled: int) -> str | None:
    """Why a candidate is none, if it is not."""
    difference = float((result.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= LARGEST_DIFFERENCE:
        return f"another result, by {difference:.1e}"
    return f"spills {spilled} words of each thread" if spilled else None


def search(
    sizes: Sizes, device: torch.device, output: Path, only: Sequence[str], timer: Timer, run: Run
) -> dict[str, Any]:
    """Measure the cases that the record has not; it is written and shown after each."""
    record = begun(output, device)
    done = {row["case"] for row in record["cases"]}
    with torch.inference_mode(), using("triton"):
        for name, group in cases(sizes, device):
            if only and name not in only:
                continue
            for case in group():
                if case.name in done:
                    continue
                row = measure(case, timer, run)
                record["cases"].append(row)
                write_atomically(output, json.dumps(record, indent=1) + "\n")
                show(table(row), console())
    return record


def begun(output: Path, device: torch.device) -> dict[str, Any]:
    """The record to go on with, or a new one."""
    check_writable(output)
    check_ours(output, "benchmark", "cases", "environment")
    if output.exists():
        record: dict[str, Any] = read_record(output)
        return record
    return {"benchmark": "tiles", "environment": environment(device), "cases": []}


def table(row: Row) -> Table:
    """A case: the best tile first, beside the default."""
    timed = [each for each in row["tiles"] if "us" in each]
    others = [each for each in row["tiles"] if "us" not in each]
    timed.sort(key=lambda each: each["us"]["median"])
    default = next((each for each in timed if each["tile"] == DEFAULT), None)
    cells = [
        {
            "tile": each["tile"],
            "us": figure(each.get("us"), ".1f"),
            "of the default": figure(
                each["us"]["median"] / default["us"]["median"]
                if default and "us" in each
                else None,
                ".2f",
            ),
            "problem": each.get("problem", MISSING),
        }
        for each in timed + others
    ]
    return Table("tiles", row["case"], row["tiles"], cells)


def main() -> None:
    """Search, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=GROUPS, nargs="+", default=(), metavar="KERNELS", help=f"of {GROUPS}"
    )
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tiles differ in time on a GPU only; run this on a machine with an NVIDIA GPU")
    device = torch.device("cuda")
    output = given.output or result_path("tiles", device)
    search(FULL, device, output, given.only, partial(in_graph, device=device), run_once)


if __name__ == "__main__":
    main()
