"""Measuring: counts, ratios of sums, and strict scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_llm import folder_fixture, llm_fixture  # noqa: F401  (fixtures)

from dmax import LLM, DecodingParams, GenerationOutput, InputError
from dmax.completers import LocalCompleter
from dmax.evaluation.run import Sample, Summary, evaluate
from dmax.evaluation.statistics import wilson_interval
from dmax.outputs import Cost, as_record
from dmax.params import EngineOptions
from dmax.tasks import Example, get_task

PARAMS = DecodingParams(strategy="spd", max_new_tokens=16)
# text, tokens, denoising forwards, prefill forwards, commit forwards of each example
OUTPUTS = (
    ("4", 12, 4, 1, 1),
    ("so 4", 2, 8, 2, 0),
    ("none", 0, 1, 0, 0),
    ("4", 30, 5, 1, 2),
    ("5", 6, 2, 0, 0),
)


class Sums:
    """What is 2 + 2?"""

    name = "sums"
    max_new_tokens = 16

    def examples(self, limit: int, seed: int) -> list[Example]:
        return [Example(f"2 + 2 = ? ({seed}.{index})", "4") for index in range(limit)]

    def extract(self, text: str) -> str | None:
        return text if text.isdigit() else None

    def score(self, text: str, example: Example) -> bool:
        return self.extract(text) == example.answer


class Canned:
    """Gives the outputs of `OUTPUTS`, by the number at the end of the prompt."""

    checkpoint = SimpleNamespace(path="canned", special_ids=SimpleNamespace(block_length=32))
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, state_dict=dict)
    options = EngineOptions(max_batch_size=1)

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def resolve(self, params: DecodingParams) -> DecodingParams:
        return params

    def generate(
        self, prompts: Sequence[Any], params: DecodingParams, progress: Callable[[int, int], None]
    ) -> list[GenerationOutput]:
        assert params is PARAMS
        self.sizes.append(len(prompts))
        found = []
        for (message,) in prompts:
            assert message["role"] == "user"
            text, tokens, *counts = OUTPUTS[int(message["content"][:-1].rpartition(".")[2])]
            cost = Cost(*counts)
            found.append(GenerationOutput(text, tuple(range(tokens)), (1,), "stop", cost))
            progress(len(found), len(prompts))
        return found


@pytest.mark.parametrize("wrong", [{"limit": -1}, {"limit": "3"}, {"limit": 10**9}, {"seed": -1}])
def test_wrong_examples_are_refused(llm: LLM, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` must be a whole number"):
        evaluate(llm, Sums(), PARAMS, **({"limit": 3, "seed": 1} | wrong))


def measure(limit: int = 5, **options: Any) -> tuple[Summary, list[Sample]]:
    llm: Any = Canned()
    return evaluate(LocalCompleter(llm), Sums(), PARAMS, limit=limit, seed=7, **options)


def test_counts_and_ratios_of_sums() -> None:
    summary, samples = measure()
    assert (summary.correct, summary.total, summary.accuracy) == (2, 5, 0.4)
    assert summary.interval == wilson_interval(2, 5)
    assert summary.generated_tokens == 50
    assert summary.cost == Cost(num_forwards=20, num_prefill_forwards=4, num_commit_forwards=3)
    assert summary.tpf == 50 / 20  # not the mean of the ratios
    assert summary.tpf_paper == pytest.approx((12 / 5 + 2 / 9 + 0 / 1 + 30 / 6 + 6 / 2) / 5)
    assert summary.tokens_per_second == pytest.approx(50 / summary.seconds)
    assert (summary.model, summary.task, summary.limit, summary.seed) == ("canned", "sums", 5, 7)
    assert (summary.batch_size, summary.params) == (1, asdict(PARAMS))
    assert summary.environment["device"] == "cpu"
    assert [sample.is_correct for sample in samples] == [True, False, False, True, False]


def test_a_sample_tells_all_about_its_completion() -> None:
    _, samples = measure()
    assert as_record(samples[1]) == {
        "prompt": "2 + 2 = ? (7.1)",
        "output": "so 4",
        "expected": "4",
        "extracted": None,
        "is_correct": False,
        "finish_reason": "stop",
        "generated_tokens": 2,
        "num_forwards": 8,
        "num_prefill_forwards": 2,
        "num_commit_forwards": 0,
        "num_positions": 0,
        "num_forced": 0,
        "num_capped": 0,
    }


def test_progress_is_told_answer_by_answer_and_the_name_is_the_callers() -> None:
    told: list[tuple[int, int]] = []
    summary, _ = measure(progress=lambda done, total: told.append((done, total)), model_name="tiny")
    assert told == [(done, 5) for done in range(6)]  # the total first
    assert summary.model == "tiny"


def test_nothing_measured_divides_by_nothing() -> None:
    summary, samples = measure(limit=0)
    assert samples == []
    assert (summary.accuracy, summary.tpf, summary.tpf_paper, summary.interval) == (
        0.0,
        0.0,
        0.0,
        (0.0, 1.0),
    )


def test_a_model_is_measured_on_what_it_generates(llm: LLM) -> None:
    task = get_task("word_problems")
    summary, samples = evaluate(llm, task, PARAMS, limit=3, seed=1)
    prompts = [example.prompt for example in task.examples(3, 1)]
    outputs = llm.generate(prompts, PARAMS)
    assert [sample.output for sample in samples] == [output.text for output in outputs]
    assert summary.generated_tokens == sum(len(output.token_ids) for output in outputs)
    assert summary.cost == sum((output.cost for output in outputs), Cost())
    assert summary.cost.num_prefill_forwards == 3
    assert evaluate(llm, task, PARAMS, limit=3, seed=1)[1] == samples


def test_the_settings_of_a_run_name_the_strategy_that_was_used(llm: LLM) -> None:
    trained = LLM.from_checkpoint(replace(llm.checkpoint, decoding="spd"))
    task = get_task("word_problems")
    auto = DecodingParams(max_new_tokens=16)
    summary, samples = evaluate(trained, task, auto, limit=2, seed=1)
    assert summary.params == asdict(PARAMS)
    assert summary.decoding.startswith("SoftParallelDecoding(top_k=1, threshold=0.5, ")
    assert samples == evaluate(llm, task, PARAMS, limit=2, seed=1)[1]
