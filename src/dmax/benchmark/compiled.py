"""What compiling the model gains and costs, each dtype and batch size in processes of their own.

    python -m dmax.benchmark.compiled float32 16 128 7 3

Arguments: dtype, batch size, problems, their seed, repeats. Prints one JSON object. A first process
    finds no compiled
code, a second one what the first has left in `TORCHINDUCTOR_CACHE_DIR`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from transformers.utils import logging

from dmax.benchmark.measure import in_turns, spread
from dmax.benchmark.passes import solve
from dmax.benchmark.report import Row, Section
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task


def section(
    dtypes: Sequence[str], batch_sizes: Sequence[int], limit: int, seed: int, repeats: int
) -> Section:
    """The table of these dtypes and batch sizes over `limit` problems."""
    rows = [
        measure_apart(dtype, size, limit, seed, repeats) for dtype in dtypes for size in batch_sizes
    ]
    columns = {
        "dtype": "dtype",
        "batch": "batch:d",
        "tokens/s": "plain:.0f",
        "compiled, tokens/s": "compiled:.0f",
        "gain": "gain:.2f",
        "start-up, s": "start_up:.1f",
        "again, s": "start_up_cached:.1f",
        "pays after tokens": "pays_after:.0f",
    }
    note = (
        "SPD on tiny-dmax, each row in a process of its own. Start-up: what the first pass takes longer than the "
        "fastest; again: the same in a second process, which finds the compiled code on disk."
    )
    return Section("compiled", f"torch.compile, {limit} problems", columns, rows, note)


def measure(dtype: str, batch_size: int, limit: int, seed: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of `tiny-dmax` as it is and compiled, in turns, and seconds more that the first pass takes."""
    examples = get_task("word_problems").examples(limit, seed)
    plain = LLM("tiny-dmax", dtype=dtype, device="cpu", max_batch_size=batch_size)
    compiled = LLM.from_checkpoint(plain.checkpoint, max_batch_size=batch_size, compile_model=True)
    params = DecodingParams("spd", 0.5)
    first = solve(compiled, params, examples).seconds
    runs = {
        "plain": partial(solve, plain, params, examples),
        "compiled": partial(solve, compiled, params, examples),
    }
    passes = in_turns(runs, repeats)
    speed = {name: spread([one.tokens_per_second for one in done]) for name, done in passes.items()}
    return {**speed, "start_up": first - min(one.seconds for one in passes["compiled"])}


def measure_apart(dtype: str, batch_size: int, limit: int, seed: int, repeats: int) -> Row:
    """`measure` in a new process without compiled code, and the start-up of a second one that finds it."""
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = _two_processes(
            [dtype, str(batch_size), str(limit), str(seed), str(repeats)], folder
        )
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


def _two_processes(arguments: list[str], folder: str) -> Iterator[dict[str, Any]]:
    words = [sys.executable, "-m", "dmax.benchmark.compiled", *arguments]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
    for _ in range(2):
        output = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, check=True, env=environment
        ).stdout
        yield json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    logging.disable_progress_bar()
    kind, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(kind, *map(int, numbers))) + "\n")
