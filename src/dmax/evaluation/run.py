"""Measure a model on a task: accuracy with its interval, tokens per forward, speed."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmax.checkpoint import weights_digest
from dmax.environment import environment
from dmax.errors import InputError
from dmax.evaluation.statistics import wilson_interval
from dmax.llm import LLM, GenerationOutput
from dmax.params import DecodingParams
from dmax.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored completion."""

    prompt: str
    output: str
    expected: str
    extracted: str | None
    is_correct: bool
    finish_reason: str
    generated_tokens: int
    num_forwards: int
    num_prefill_forwards: int
    num_commit_forwards: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run measured; ratios are ratios of sums over the run.

    Attributes:
        weights: digest of the model's weights (`checkpoint.weights_digest`), so that figures name what they measured.
        accuracy: correct / total, strict scoring; `interval` is its 95 % Wilson interval.
        tpf: generated tokens (cut at EOS) per denoising forward.
        tpf_paper: as the published evaluation counts: mean over samples, the prefill being one more forward.
        tokens_per_second: generated tokens per second of wall time, prefill included, at this batch size.
    """

    model: str
    weights: str
    task: str
    params: dict[str, Any]
    accuracy: float
    correct: int
    total: int
    interval: tuple[float, float]
    tpf: float
    tpf_paper: float
    generated_tokens: int
    num_forwards: int
    num_prefill_forwards: int
    num_commit_forwards: int
    tokens_per_second: float
    seconds: float
    batch_size: int
    limit: int
    seed: int
    environment: dict[str, Any]


def evaluate(
    llm: LLM,
    task: Task,
    params: DecodingParams,
    *,
    limit: int,
    seed: int,
    model_name: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Summary, list[Sample]]:
    """Decode `limit` examples of a task and score them strictly.

    `params.max_new_tokens` is the caller's business: `task.max_new_tokens` says what the task needs.
    """
    examples = task.examples(limit, seed)
    prompts = [[{"role": "user", "content": example.prompt}] for example in examples]
    samples: list[Sample] = []
    began = time.perf_counter()
    for start in range(0, len(prompts), 4 * llm.max_batch_size):
        chunk = slice(start, start + 4 * llm.max_batch_size)
        outputs = llm.generate(prompts[chunk], params)
        samples += [_score(task, example, output) for example, output in zip(examples[chunk], outputs, strict=True)]
        progress(len(samples), len(prompts))
    seconds = time.perf_counter() - began
    return _summarize(llm, task, params, samples, seconds, limit, seed, model_name), samples


def _score(task: Task, example: Example, output: GenerationOutput) -> Sample:
    return Sample(
        prompt=example.prompt,
        output=output.text,
        expected=example.answer,
        extracted=task.extract(output.text),
        is_correct=task.score(output.text, example),
        finish_reason=output.finish_reason,
        generated_tokens=len(output.token_ids),
        num_forwards=output.num_forwards,
        num_prefill_forwards=output.num_prefill_forwards,
        num_commit_forwards=output.num_commit_forwards,
    )


def _summarize(
    llm: LLM,
    task: Task,
    params: DecodingParams,
    samples: Sequence[Sample],
    seconds: float,
    limit: int,
    seed: int,
    model_name: str,
) -> Summary:
    correct, total = sum(sample.is_correct for sample in samples), len(samples)
    tokens = sum(sample.generated_tokens for sample in samples)
    forwards = sum(sample.num_forwards for sample in samples)
    ratios = [s.generated_tokens / (s.num_forwards + s.num_prefill_forwards) for s in samples]
    return Summary(
        model=model_name or llm.checkpoint.path,
        weights=weights_digest(llm.model),
        task=task.name,
        params=asdict(params),
        accuracy=correct / total if total else 0.0,
        correct=correct,
        total=total,
        interval=wilson_interval(correct, total),
        tpf=tokens / forwards if forwards else 0.0,
        tpf_paper=sum(ratios) / total if total else 0.0,
        generated_tokens=tokens,
        num_forwards=forwards,
        num_prefill_forwards=sum(sample.num_prefill_forwards for sample in samples),
        num_commit_forwards=sum(sample.num_commit_forwards for sample in samples),
        tokens_per_second=tokens / seconds if seconds else 0.0,
        seconds=seconds,
        batch_size=llm.max_batch_size,
        limit=limit,
        seed=seed,
        environment=environment(llm.model.device),
    )


def write_results(path: Path, summary: Summary, samples: Sequence[Sample]) -> None:
    """Write `summary` to `path` and the samples beside it as JSONL, each file whole or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    stem = path.stem if path.suffix == ".json" else path.name
    write_atomically(path.with_name(f"{stem}.samples.jsonl"), lines)
    write_atomically(path, json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n")


def check_writable(path: Path) -> None:
    """Raise `InputError` unless a file can be made at `path`; asked before hours of computing, not after."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder", hint="name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", hint="choose another output") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises `InputError` if the place cannot be written."""
    check_writable(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", hint="choose another output") from None
    finally:
        partial.unlink(missing_ok=True)
