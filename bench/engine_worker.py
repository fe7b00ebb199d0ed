"""One engine of `engines.py`, in a process and an environment of its own: a job in, results out.

python bench/engine_worker.py job.json results.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmax.completers import Completer
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams
from dmax.reproduce.engines import EngineChoice, opened

ON_CPU: dict[str, dict[str, Any]] = {
    "vllm": {"enforce_eager": True, "kv_cache_memory_bytes": 2**26},
    "sglang": {
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "max_total_tokens": 2**14,
        "mem_fraction_static": 0.05,
        "sampling_backend": "pytorch",
        "skip_server_warmup": True,
    },
}
"""What these engines need on a CPU; on a GPU they run as they are."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine has to do.

    Attributes:
        engine: "dmax", "vllm" or "sglang".
        model: bundled name, folder or hub id.
        device: "cpu" or "cuda".
        dtype: of the weights.
        tensor_parallel: GPUs, or on a CPU processes, that share the model.
        batch_size: requests in flight at most.
        context: positions that a request may take.
        prompts: texts, or token ids of each.
        thresholds: confidences; all prompts are decoded with each of them.
        strategy: which of dmax's strategies decodes.
        max_new_tokens: longest completion.
        repeats: times that all prompts are decoded and timed after a first, untimed time.
    """

    engine: str
    model: str
    device: str
    dtype: str
    tensor_parallel: int
    batch_size: int
    context: int
    prompts: list[str] | list[list[int]]
    thresholds: list[float]
    strategy: str
    max_new_tokens: int
    repeats: int


def choice(job: Job) -> EngineChoice:
    """The engine of a job with its options."""
    options: dict[str, Any] = {}
    if job.device == "cpu":
        options |= ON_CPU.get(job.engine, {})
    if job.engine == "vllm":
        options["max_model_len"] = job.context
    if job.engine == "sglang":
        options["device"] = job.device
    return EngineChoice(
        name=job.engine,
        batch_size=job.batch_size,
        dtype=job.dtype,
        device=job.device,
        tensor_parallel=job.tensor_parallel,
        options=tuple(options.items()),
    )


def complete(
    engine: Completer, prompts: Sequence[str | list[int]], params: DecodingParams
) -> list[GenerationOutput]:
    """All completions, in the order of the prompts."""
    found: dict[int, GenerationOutput] = {}
    for group in engine.completions(prompts, params, lambda done, total: None):
        found |= dict(group)
    return [found[index] for index in range(len(prompts))]


def measure(engine: Completer, job: Job) -> list[dict[str, Any]]:
    """A row for each threshold: what came out, what it cost, and how long it took."""
    rows = []
    for threshold in job.thresholds:
        params = DecodingParams(
            strategy=job.strategy, threshold=threshold, max_new_tokens=job.max_new_tokens
        )
        outputs = complete(engine, job.prompts, params)  # compiles, captures graphs, fills caches
        seconds = []
        for _ in range(job.repeats):
            began = time.perf_counter()
            complete(engine, job.prompts, params)
            seconds.append(time.perf_counter() - began)
        rows.append(
            {
                "threshold": threshold,
                "prompts": [output.prompt_token_ids for output in outputs],
                "token_ids": [output.token_ids for output in outputs],
                "forwards": [output.num_forwards for output in outputs],
                "commit_forwards": [output.num_commit_forwards for output in outputs],
                "prefill_forwards": [output.num_prefill_forwards for output in outputs],
                "seconds": seconds,
            }
        )
    return rows


def main() -> None:
    """Read the job, do it, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()

    job = Job(**json.loads(arguments.job.read_text("utf-8")))
    params = DecodingParams(strategy=job.strategy, max_new_tokens=job.max_new_tokens)
    with opened(choice(job), job.model) as engine:
        results = {"settings": engine.settings(params), "rows": measure(engine, job)}
        arguments.results.write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main()
