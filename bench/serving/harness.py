"""lm_eval over HTTP counts what `dmax eval` counts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dmax.tasks import get_task
from serving.row import Result, Sizes
from serving.server import MODEL, Server, serving

TASK = "local_word_problems"
DTYPE = "float32"
BATCH = "8"
COUNTED = {
    "generated_tokens": "dmax:generated_tokens_total",
    "num_forwards": "dmax:denoising_forwards_total",
    "num_prefill_forwards": "dmax:prefill_forwards_total",
}
"""What `dmax eval` counts, and the server's metrics that count the same."""


async def harness(sizes: Sizes) -> Result:
    """`local-chat-completions` solves as many problems, in as many forwards, as `dmax eval`."""
    ours = await asyncio.to_thread(_dmax_eval, sizes)
    options = ("--dtype", DTYPE, "--max-batch-size", BATCH)
    async with serving(*options) as server:
        before = await server.metrics()
        correct, asked = await asyncio.to_thread(_lm_eval, server, sizes)
        after = await server.idle()
    theirs = {name: int(after[key] - before.get(key, 0)) for name, key in COUNTED.items()}
    theirs |= {"correct": correct, "total": asked}
    result = Result()
    for name, count in theirs.items():
        result.must(count == ours[name], f"{name}: {count} instead of {ours[name]}")
    result.figures = {"dmax_eval": {name: ours[name] for name in theirs}, "lm_eval": theirs}
    return result


def _dmax_eval(sizes: Sizes) -> dict[str, Any]:
    """The record of `dmax eval`."""
    command = [
        *(sys.executable, "-m", "dmax", "eval", "--model", MODEL, "--dtype", DTYPE, "--json"),
        *("--limit", str(sizes.problems), "--seed", str(sizes.seed), "--batch-size", BATCH),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _lm_eval(server: Server, sizes: Sizes) -> tuple[int, int]:
    """How many problems lm_eval says are solved, and of how many."""
    with TemporaryDirectory() as folder:
        task = Path(folder, f"{TASK}.yaml")
        task.write_text(json.dumps(_task(Path(folder), sizes)), "utf-8")  # JSON is YAML
        address = f"http://127.0.0.1:{server.address.port}/v1/chat/completions"
        arguments = f"model={MODEL},base_url={address},num_concurrent={BATCH},max_retries=1"
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("lm_eval")), "run"),
                *("--model", "local-chat-completions", "--model_args", arguments),
                *("--tasks", str(task), "--apply_chat_template"),
                *("--output_path", str(Path(folder, "results"))),
            ],
            env=os.environ | {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        [results] = Path(folder, "results").rglob("results_*.json")
        found = json.loads(results.read_text("utf-8"))
    asked = found["n-samples"][TASK]["effective"]
    return round(found["results"][TASK]["exact_match,strict"] * asked), asked


def _task(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The word problems as a task of lm_eval over a file, scored as `dmax eval` scores them."""
    task = get_task("word_problems")
    rows = [
        json.dumps({"question": example.prompt, "answer": example.answer})
        for example in task.examples(sizes.problems, sizes.seed)
    ]
    data = folder / "problems.jsonl"
    data.write_text("\n".join(rows) + "\n", "utf-8")
    closing_line = r"(?m)^#### (-?[0-9]+)\s*\Z"
    strict = [{"function": "regex", "regex_pattern": closing_line}, {"function": "take_first"}]
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["<|endoftext|>"],
            "do_sample": False,
            "max_gen_toks": task.max_new_tokens,
        },
        "filter_list": [{"name": "strict", "filter": strict}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
