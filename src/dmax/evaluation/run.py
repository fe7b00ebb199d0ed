"""Measure a model on a task: accuracy with its interval, tokens per forward, speed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any, Protocol

from dmax.completers import Completer, LocalCompleter, after
from dmax.evaluation.statistics import wilson_interval
from dmax.llm import LLM
from dmax.outputs import Cost, GenerationOutput, ratio
from dmax.params import MOST_PROBLEMS, DecodingParams, check_number
from dmax.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored completion.

    Attributes:
        prompt: what was asked.
        output: what the model answered.
        expected: the right answer.
        extracted: the answer found in the output; None if there is none.
        is_correct: whether it is right.
        finish_reason: why the completion ended, as in `GenerationOutput`.
        generated_tokens: its length, cut at EOS.
        cost: its forwards and positions.
    """

    prompt: str
    output: str
    expected: str
    extracted: str | None
    is_correct: bool
    finish_reason: str
    generated_tokens: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class FinishedSample:
    """A sample within its run.

    Attributes:
        index: of its example.
        sample: what was decoded, and how it scored.
        seconds: its share of the wall time of the samples it was decoded with.
    """

    index: int
    sample: Sample
    seconds: float


class Journal(Protocol):
    """Where a run keeps finished samples, so that an interrupted run goes on (`ResultFiles`)."""

    def begin(self, settings: Mapping[str, Any]) -> Sequence[FinishedSample]:
        """What an earlier run of the same settings has finished."""

    def append(self, finished: Sequence[FinishedSample]) -> None:
        """Keep what has just been finished."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What several completions cost together.

    Attributes:
        generated_tokens: of all completions, each cut at EOS.
        cost: forwards and positions of all completions.
        tpf: generated tokens per denoising forward, a ratio of sums.
        tpf_paper: as the published evaluation counts, but for what stands behind the first EOS (D14
            in docs/paper.md): the mean over completions, with the prefill as one more forward.
    """

    generated_tokens: int
    cost: Cost
    tpf: float
    tpf_paper: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run measured, and all that its figures depend on.

    Attributes:
        model: name of the model.
        weights: digest of its weights (`environment.weights_digest`).
        dtype: in which it computed.
        task: name of the task.
        examples: digest of the prompts and the expected answers.
        params: decoding parameters as they were given.
        decoding: the strategy with every setting, defaults included.
        block_length: tokens decoded together.
        accuracy: correct / total, scored strictly.
        correct: how many answers are right.
        total: how many there are.
        interval: 95 % Wilson interval of the accuracy.
        tpf: see `Totals`.
        tpf_paper: see `Totals`.
        generated_tokens: see `Totals`.
        cost: see `Totals`.
        tokens_per_second: generated tokens per second of wall time, prefill included, at this batch
            size.
        seconds: of decoding and scoring. They add up over the parts of a run that was interrupted.
        batch_size: sequences decoded together.
        limit: how many examples were asked for.
        seed: of the examples.
        environment: versions, commit and hardware.
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
    model: LLM | Completer,
    task: Task,
    params: DecodingParams,
    *,
    limit: int,
    seed: int,
    model_name: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Journal | None = None,
) -> tuple[Summary, list[Sample]]:
    """Decode examples of a task and score them strictly.

    Args:
        model: a model, or what else completes prompts.
        task: what to solve.
        params: how to decode. `task.max_new_tokens` says how long an answer the task needs; the
            caller decides.
        limit: how many examples.
        seed: of the examples.
        model_name: what the summary calls the model; empty: the folder of its checkpoint.
        progress: told how many samples of how many are finished.
        journal: keeps finished samples. What it holds already is not decoded again.

    Returns:
        The summary, and the samples in the order of the examples.

    Raises:
        InputError: `limit` or `seed` is out of range, or as `LLM.generate`.
    """
    check_number("limit", limit, low=0, high=MOST_PROBLEMS, whole=True)
    check_number("seed", seed, low=0, whole=True)
    completer = LocalCompleter(model) if isinstance(model, LLM) else model
    params = completer.resolve(params)
    examples = task.examples(limit, seed)
    settings = _settings_of_run(completer, task, params, examples, limit, seed)
    earlier = journal.begin(settings) if journal else []
    done = {finished.index: finished for finished in earlier}
    waiting = [index for index in range(len(examples)) if index not in done]
    progress(len(done), len(examples))
    prompts = [[{"role": "user", "content": examples[index].prompt}] for index in waiting]
    so_far = after(len(done), len(examples), progress)
    began = time.perf_counter()
    for group in completer.completions(prompts, params, so_far):
        pairs = [(waiting[number], output) for number, output in group]
        samples = [_score(task, examples[index], output) for index, output in pairs]
        scored = time.perf_counter()
        share = (scored - began) / len(group)
        began = scored
        indices = [index for index, _ in pairs]
        finished = list(map(FinishedSample, indices, samples, repeat(share)))
        if journal:
            journal.append(finished)
        done |= zip(indices, finished, strict=True)
    ordered = [done[index] for index in range(len(examples))]
    summary = _summarize(model_name or completer.name, settings, ordered)
    return summary, [finished.sample for finished in ordered]


def add_up(completions: Iterable[tuple[int, Cost]]) -> Totals:
    """The totals of completions, each given as its generated tokens and what it cost."""
    generated_tokens = 0
    total = Cost()
    ratios = []
    for tokens, cost in completions:
        generated_tokens += tokens
        total += cost
        ratios.append(ratio(tokens, cost.num_forwards_paper))
    return Totals(
        generated_tokens=generated_tokens,
        cost=total,
        tpf=ratio(generated_tokens, total.num_forwards),
        tpf_paper=ratio(sum(ratios), len(ratios)),
    )


def _settings_of_run(
    completer: Completer,
    task: Task,
    params: DecodingParams,
    examples: Sequence[Example],
    limit: int,
    seed: int,
) -> dict[str, Any]:
    """All that the figures of a run depend on, by the names of the fields of `Summary`."""
    questions = json.dumps([[example.prompt, example.answer] for example in examples])
    return {
        "task": task.name,
        "examples": hashlib.sha256(questions.encode()).hexdigest()[:16],
        "params": asdict(params),
        **completer.settings(params),
        "limit": limit,
        "seed": seed,
    }


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


def _summarize(
    model: str, settings: Mapping[str, Any], ordered: Sequence[FinishedSample]
) -> Summary:
    samples = [finished.sample for finished in ordered]
    seconds = sum(finished.seconds for finished in ordered)
    correct = sum(sample.is_correct for sample in samples)
    total = len(samples)
    totals = add_up((sample.generated_tokens, sample.cost) for sample in samples)
    return Summary(
        **settings,
        model=model,
        accuracy=ratio(correct, total),
        correct=correct,
        total=total,
        interval=wilson_interval(correct, total),
        tpf=totals.tpf,
        tpf_paper=totals.tpf_paper,
        generated_tokens=totals.generated_tokens,
        cost=totals.cost,
        tokens_per_second=ratio(totals.generated_tokens, seconds),
        seconds=seconds,
    )
