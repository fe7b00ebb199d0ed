"""What compiling the model gains and costs, each dtype and batch size in processes of their own.

    python bench/compiled.py float32 16 128 7 3

Arguments: dtype, batch size, problems, their seed, repeats. Prints one JSON object. A first process
finds no compiled code, a second one what the first has left in `TORCHINDUCTOR_CACHE_DIR`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers.utils import logging

from dmax.benchmark.cpu import SPD, TASK, encode, solve
from dmax.benchmark.measure import in_turns, spread
from dmax.benchmark.report import Row, Table, figure
from dmax.llm import LLM


def compiled_table(
    dtypes: Sequence[str], batch_sizes: Sequence[int], limit: int, seed: int, repeats: int
) -> Table:
    """The table of these dtypes and batch sizes over `limit` problems."""
    rows = [
        measure_apart(dtype, size, limit, seed, repeats) for dtype in dtypes for size in batch_sizes
    ]
    cells = [
        {
            "dtype": row["dtype"],
            "batch": str(row["batch"]),
            "tokens/s": figure(row["plain"], ".0f"),
            "compiled, tokens/s": figure(row["compiled"], ".0f"),
            "gain": figure(row["gain"], ".2f"),
            "start-up, s": figure(row["start_up"], ".1f"),
            "again, s": figure(row["start_up_cached"], ".1f"),
            "pays after tokens": figure(row["pays_after"], ".0f"),
        }
        for row in rows
    ]
    note = (
        "SPD on tiny-dmax, each row in a process of its own. Start-up: what the first pass takes "
        "longer than the fastest; again: the same in a second process, which finds the compiled "
        "code on disk."
    )
    return Table("compiled", f"torch.compile, {limit} problems", rows, cells, note)


def measure_apart(dtype: str, batch_size: int, limit: int, seed: int, repeats: int) -> Row:
    """`measure` in a new process without compiled code, and the start-up of one that finds it."""
    arguments = [dtype, str(batch_size), str(limit), str(seed), str(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        cold = in_a_process(arguments, folder)
        warm = in_a_process(arguments, folder)
    plain = cold["plain"]["median"]
    compiled = cold["compiled"]["median"]
    saved = 1 / plain - 1 / compiled  # seconds a token
    return {
        "dtype": dtype,
        "batch": batch_size,
        "plain": cold["plain"],
        "compiled": cold["compiled"],
        "gain": compiled / plain,
        "start_up": cold["start_up"],
        "start_up_cached": warm["start_up"],
        "pays_after": cold["start_up"] / saved if saved > 0 else None,
    }


def in_a_process(arguments: Sequence[str], folder: str) -> dict[str, Any]:
    """`measure` in a process that keeps its compiled code in a folder."""
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(dtype: str, batch_size: int, limit: int, seed: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of `tiny-dmax`, plain and compiled in turns, and seconds of start-up."""
    plain = LLM("tiny-dmax", dtype=dtype, device="cpu", max_batch_size=batch_size)
    compiled = LLM.from_checkpoint(plain.checkpoint, max_batch_size=batch_size, compile_model=True)
    prompts = encode(plain, TASK.examples(limit, seed))
    first = solve(compiled, SPD, prompts)
    runs = {
        "plain": partial(solve, plain, SPD, prompts),
        "compiled": partial(solve, compiled, SPD, prompts),
    }
    passes = in_turns(runs, repeats)
    speeds = {
        name: spread([each.tokens_per_second for each in done]) for name, done in passes.items()
    }
    fastest = min(each.seconds for each in passes["compiled"])
    return {**speeds, "start_up": first.seconds - fastest}


if __name__ == "__main__":
    logging.disable_progress_bar()
    kind, *numbers = sys.argv[1:]
    print(json.dumps(measure(kind, *map(int, numbers))))
