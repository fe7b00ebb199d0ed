"""Our engine, vLLM and SGLang on the same prompts and thresholds: tokens, forwards and tokens/s.

    python bench/engines.py                                         # on a CPU: forwards only
    python bench/engines.py --model Zigeng/DMax-Math-16B --device cuda --batch-sizes 1 16 \\
        --vllm-python ~/vllm/bin/python --sglang-python ~/sglang/bin/python

Every engine runs in a process and an environment of its own, one after the other. On a CPU the
environments are those of `make test-engines`, and no speed is reported: vLLM's kernels are
interpreted there. The last line on stdout is the JSON record, which also goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from command_line import count, result_path, seed, threshold
from engine_worker import Job

from dmax.benchmark.measure import spread
from dmax.benchmark.report import Row, Table, console, figure
from dmax.benchmark.run import record_tables
from dmax.environment import select_device
from dmax.outputs import ratio
from dmax.tasks import get_task

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from engine_environments import python_of  # noqa: E402
from run_engine_tests import environment  # noqa: E402

ENGINES = ("dmax", "vllm", "sglang")
NOTE = (
    "Forwards: denoising, those that only wrote keys and values of finished blocks, and those that "
    "read prompts. Same: completions with the token ids of the first engine, and those that took "
    "as many denoising forwards."
)
NO_SPEED = " Speed is not compared: vLLM's kernels are interpreted on a CPU."


def run(job: Job, python: Path) -> dict[str, Any]:
    """Have an engine do a job in its environment."""
    variables = dict(os.environ)
    if job.device == "cpu" and job.engine != "dmax":
        variables = environment(job.engine, Path(), os.environ)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "job.json")
        results = Path(folder, "results.json")
        given.write_text(json.dumps(asdict(job)), "utf-8")
        script = str(ROOT / "bench" / "engine_worker.py")
        command = [str(python), script, str(given), str(results)]
        done = subprocess.run(command, env=variables, stdout=sys.stderr, check=False)
        if not results.is_file():
            raise SystemExit(f"error: {job.engine} ended with {done.returncode} and no results")
        found: dict[str, Any] = json.loads(results.read_text("utf-8"))
    return found


def tables(job: Job, pythons: dict[str, Path], batch_sizes: list[int]) -> Iterator[Table]:
    """A table for each batch size, and one of the engines' versions and settings."""
    settings: list[Row] = []
    for batch_size in batch_sizes:
        measured: dict[str, list[Row]] = {}
        for engine, python in pythons.items():
            results = run(replace(job, engine=engine, batch_size=batch_size), python)
            measured[engine] = results["rows"]
            settings.append({"engine": engine, "batch": batch_size, **results["settings"]})
            # The same token ids for all, whoever made them of the texts.
            job = replace(job, prompts=results["rows"][0]["prompts"])
        yield comparison(job, batch_size, measured)
    cells = [
        {
            "engine": row["engine"],
            "batch": str(row["batch"]),
            "dtype": str(row["dtype"]),
            "version": row["environment"].get("engine") or f"dmax {row['environment']['dmax']}",
            "torch": row["environment"]["torch"],
        }
        for row in settings
    ]
    yield Table("engines", "what ran", settings, cells)


def comparison(job: Job, batch_size: int, measured: dict[str, list[Row]]) -> Table:
    """The engines at one batch size, threshold by threshold."""
    first = next(iter(measured.values()))
    rows = [
        row_of(job, engine, ours, theirs)
        for index, ours in enumerate(first)
        for engine, of_engine in measured.items()
        for theirs in [of_engine[index]]
    ]
    has_speed = job.device != "cpu"
    cells = [
        {
            "engine": row["engine"],
            "threshold": figure(row["threshold"], "g"),
            "same tokens": f"{row['same_tokens']}/{row['prompts']}",
            "same forwards": f"{row['same_forwards']}/{row['prompts']}",
            "forwards": str(row["num_forwards"]),
            "commits": str(row["num_commit_forwards"]),
            "prefills": str(row["num_prefill_forwards"]),
            "TPF": figure(row["tpf"], ".2f"),
            **({"tokens/s": figure(row["tokens_per_second"], ".0f")} if has_speed else {}),
        }
        for row in rows
    ]
    title = f"{len(job.prompts)} prompts, {job.strategy}, batch size {batch_size}"
    return Table(f"batch_{batch_size}", title, rows, cells, NOTE + NO_SPEED * (not has_speed))


def row_of(job: Job, engine: str, ours: Row, theirs: Row) -> Row:
    """What an engine did at a threshold, beside the first engine."""
    tokens = sum(map(len, theirs["token_ids"]))
    forwards = sum(theirs["forwards"])
    row: Row = {
        "engine": engine,
        "threshold": theirs["threshold"],
        "prompts": len(theirs["token_ids"]),
        "same_tokens": num_equal(ours["token_ids"], theirs["token_ids"]),
        "same_forwards": num_equal(ours["forwards"], theirs["forwards"]),
        "tokens": tokens,
        "num_forwards": forwards,
        "num_commit_forwards": sum(theirs["commit_forwards"]),
        "num_prefill_forwards": sum(theirs["prefill_forwards"]),
        "tpf": ratio(tokens, forwards),
    }
    if job.device != "cpu":
        row["tokens_per_second"] = spread([tokens / seconds for seconds in theirs["seconds"]])
    return row


def num_equal(ours: list[Any], theirs: list[Any]) -> int:
    """Of two lists, how many places hold the same."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Run the engines, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-dmax", help="bundled name, folder or hub id")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--vllm-python", type=Path, default=python_of("vllm"))
    parser.add_argument("--sglang-python", type=Path, default=python_of("sglang"))
    parser.add_argument("--task", default="word_problems")
    parser.add_argument("--data", type=Path, help="file of the task's problems")
    parser.add_argument("--limit", type=count, default=64, help="problems")
    parser.add_argument("--seed", type=seed, default=7, help="of the problems")
    parser.add_argument("--strategy", default="spd")
    parser.add_argument("--thresholds", type=threshold, nargs="+", default=[0.3, 0.5, 0.9])
    parser.add_argument("--batch-sizes", type=count, nargs="+", default=[1, 4])
    parser.add_argument("--max-new-tokens", type=count, default=96)
    parser.add_argument("--context", type=count, default=512, help="positions of a request")
    parser.add_argument("--tensor-parallel", type=count, default=1, help="of vLLM and SGLang")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="float32 on a CPU, else bfloat16")
    parser.add_argument("--repeats", type=count, default=3, help="timed, after a first time")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()

    device = select_device(given.device)
    is_cpu = device.type == "cpu"
    examples = get_task(given.task, given.data).examples(given.limit, given.seed)
    job = Job(
        engine="",
        model=given.model,
        device=device.type,
        dtype=given.dtype or ("float32" if is_cpu else "bfloat16"),
        tensor_parallel=given.tensor_parallel,
        batch_size=0,
        context=given.context,
        prompts=[example.prompt for example in examples],
        thresholds=given.thresholds,
        strategy=given.strategy,
        max_new_tokens=given.max_new_tokens,
        repeats=0 if is_cpu else given.repeats,
    )
    pythons = {
        "dmax": Path(sys.executable),
        "vllm": given.vllm_python,
        "sglang": given.sglang_python,
    }
    settings = asdict(job) | {"prompts": f"{given.task}, seed {given.seed}"}
    record = record_tables(
        "engines",
        device,
        settings,
        tables(job, {name: pythons[name] for name in given.engines}, given.batch_sizes),
        console=console(stderr=True),
        output=given.output or result_path("engines", device),
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
