"""Measure a model on a task: accuracy with its interval, tokens per forward, speed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dmax.checkpoint import weights_digest
from dmax.decoding import get_strategy
from dmax.environment import environment
from dmax.evaluation.statistics import wilson_interval
from dmax.llm import LLM
from dmax.outputs import Cost, GenerationOutput
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
    cost: Cost


@dataclass(frozen=True, slots=True)
class Finished:
    """A sample within its run.

    Attributes:
        index: of its example.
        sample: what was decoded and how it scored.
        seconds: its share of the wall time of the samples it was decoded with.
    """

    index: int
    sample: Sample
    seconds: float


class Journal(Protocol):
    """Where a run keeps what it has finished, so that an interrupted one goes on (`results.ResultFiles`)."""

    def begin(self, settings: Mapping[str, Any]) -> Sequence[Finished]:
        """What an earlier run of the same settings has finished."""

    def append(self, records: Sequence[Finished]) -> None:
        """Keep what has just been finished."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run measured; ratios are ratios of sums over the run.

    Attributes:
        weights: digest of the model's weights (`checkpoint.weights_digest`), so that figures name
            what they measured.
        examples: digest of the prompts and the expected answers.
        params: as they were given; `decoding` is the strategy with every setting resolved, defaults
            included.
        accuracy: correct / total, strict scoring; `interval` is its 95 % Wilson interval.
        tpf: generated tokens (cut at EOS) per denoising forward.
        cost: forwards and positions of all samples.
        tpf_paper: as the published evaluation counts: mean over samples, the prefill being one more
            forward.
        tokens_per_second: generated tokens per second of wall time, prefill included, at this batch
            size.
        seconds: of decoding and scoring; of a run that was interrupted, those of all its parts.
    """

    model: str
    weights: str
    dtype: str
    task: str
    examples: str
    params: dict[str, Any]
    decoding: str
    block_length: int
    accuracy: float
    correct: int
    total: int
    interval: tuple[float, float]
    tpf: float
    tpf_paper: float
    generated_tokens: int
    cost: Cost
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
    journal: Journal | None = None,
) -> tuple[Summary, list[Sample]]:
    """Decode `limit` examples of a task and score them strictly.

    What `journal` holds already is not decoded again. `params.max_new_tokens` is the caller's
    business: `task.max_new_tokens` says what the task needs.
    """
    params = llm.resolve(params)
    examples = task.examples(limit, seed)
    settings = _settings(llm, task, params, examples, limit, seed)
    done = {record.index: record for record in (journal.begin(settings) if journal else ())}
    waiting = [index for index in range(len(examples)) if index not in done]
    size = 4 * llm.options.max_batch_size
    for start in range(0, len(waiting), size):
        finished = _decode(llm, task, params, examples, waiting[start : start + size])
        if journal:
            journal.append(finished)
        done |= {record.index: record for record in finished}
        progress(len(done), len(examples))
    records = [done[index] for index in range(len(examples))]
    return _summarize(model_name or llm.checkpoint.path, settings, records), [
        record.sample for record in records
    ]


def _settings(
    llm: LLM, task: Task, params: DecodingParams, examples: Sequence[Example], limit: int, seed: int
) -> dict[str, Any]:
    """All that a run's figures depend on, by the names it has in `Summary`."""
    questions = json.dumps([[example.prompt, example.answer] for example in examples])
    return {
        "weights": weights_digest(llm.model),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "task": task.name,
        "examples": hashlib.sha256(questions.encode()).hexdigest()[:16],
        "params": asdict(params),
        "decoding": repr(get_strategy(params)),
        "block_length": params.block_length or llm.checkpoint.special_ids.block_length,
        "batch_size": llm.options.max_batch_size,
        "limit": limit,
        "seed": seed,
        "environment": environment(llm.model.device) | {"compiled": llm.options.compile_model},
    }


def _decode(
    llm: LLM,
    task: Task,
    params: DecodingParams,
    examples: Sequence[Example],
    indices: Sequence[int],
) -> list[Finished]:
    began = time.perf_counter()
    outputs = llm.generate(
        [[{"role": "user", "content": examples[index].prompt}] for index in indices], params
    )
    samples = [
        _score(task, examples[index], output)
        for index, output in zip(indices, outputs, strict=True)
    ]
    share = (time.perf_counter() - began) / len(indices)
    return [Finished(index, sample, share) for index, sample in zip(indices, samples, strict=True)]


def _score(task: Task, example: Example, output: GenerationOutput) -> Sample:
    return Sample(
        prompt=example.prompt,
        output=output.text,
        expected=example.answer,
        extracted=task.extract(output.text),
        is_correct=task.score(output.text, example),
        finish_reason=output.finish_reason,
        generated_tokens=len(output.token_ids),
        cost=output.cost,
    )


def _summarize(model: str, settings: Mapping[str, Any], records: Sequence[Finished]) -> Summary:
    samples = [record.sample for record in records]
    seconds = sum(record.seconds for record in records)
    correct = sum(sample.is_correct for sample in samples)
    total = len(samples)
    tokens = sum(sample.generated_tokens for sample in samples)
    cost = sum((sample.cost for sample in samples), Cost())
    ratios = [
        sample.generated_tokens / (sample.cost.num_forwards + sample.cost.num_prefill_forwards)
        for sample in samples
    ]
    return Summary(
        **settings,
        model=model,
        accuracy=correct / total if total else 0.0,
        correct=correct,
        total=total,
        interval=wilson_interval(correct, total),
        tpf=tokens / cost.num_forwards if cost.num_forwards else 0.0,
        tpf_paper=sum(ratios) / total if total else 0.0,
        generated_tokens=tokens,
        cost=cost,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        seconds=seconds,
    )
