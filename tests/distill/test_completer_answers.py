"""Distillation from whatever completes prompts."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from dmax.completers import Completions, LocalCompleter, Progress
from dmax.distill.engine import CompleterAnswerer
from dmax.distill.files import ResponseFiles
from dmax.distill.responses import Refusal, Response
from dmax.distill.run import distill
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams

PARAMS = DecodingParams(max_new_tokens=32)
PROMPTS = ["Tom has 3 apples.", "too long", "A shop sells 12 pens."]


@pytest.fixture(scope="module")
def completer() -> LocalCompleter:
    return LocalCompleter(LLM("tiny-dmax", dtype="float32", device="cpu"))


def check(chat: Any) -> None:
    if chat[0]["content"] == "too long":
        raise InputError("the prompt has 9 tokens, there is room for 8")


def test_answers_are_those_of_the_model_and_bad_prompts_are_refused_alone(
    completer: LocalCompleter,
) -> None:
    answerer = CompleterAnswerer(completer, PARAMS, check)
    answers = dict(chain.from_iterable(answerer.answers(PROMPTS, [2, 1, 0])))
    wanted = completer.llm.generate([PROMPTS[0], PROMPTS[2]], PARAMS)
    assert isinstance(answers[1], Refusal)
    for index, output in zip((0, 2), wanted, strict=True):
        assert answers[index] == Response(
            text=output.text,
            tokens=len(output.token_ids),
            is_finished=output.finish_reason == "stop",
            forwards=output.num_forwards,
        )


def test_settings_are_json_and_leave_out_what_may_change(completer: LocalCompleter) -> None:
    settings = CompleterAnswerer(completer, PARAMS).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["params"]["strategy"] == "spd"  # what "auto" stands for
    assert settings["engine"] is None
    assert not {"environment", "batch_size"} & settings.keys()


def test_a_run_writes_every_answer_and_goes_on_where_it_was(
    completer: LocalCompleter, tmp_path: Path
) -> None:
    files = ResponseFiles(tmp_path / "responses.jsonl")
    answerer = CompleterAnswerer(completer, PARAMS, check)
    report = distill(answerer, PROMPTS, files)
    assert (report.kept + report.dropped.get("unfinished", 0), report.dropped["refused"]) == (2, 1)
    again = distill(answerer, PROMPTS, ResponseFiles(tmp_path / "responses.jsonl"))
    assert (again.kept, again.dropped) == (report.kept, report.dropped)


class Slow:
    """Completes one prompt at a time, and tells when it is closed."""

    name = "slow"
    is_closed = False

    def __init__(self, completer: LocalCompleter) -> None:
        self._completer = completer

    def resolve(self, params: DecodingParams) -> DecodingParams:
        return self._completer.resolve(params)

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        given = self._completer.settings(params)
        return given | {"environment": {"engine": "an engine 1.0"}}

    def completions(
        self, prompts: Sequence[Any], params: DecodingParams, progress: Progress
    ) -> Completions:
        try:
            for number, prompt in enumerate(prompts):
                (output,) = self._completer.llm.generate([prompt], params)
                yield [(number, output)]
        finally:
            self.is_closed = True


def test_closing_the_answers_ends_what_is_in_progress(completer: LocalCompleter) -> None:
    slow = Slow(completer)
    answerer = CompleterAnswerer(slow, PARAMS)
    assert answerer.settings()["engine"] == "an engine 1.0"
    answers = answerer.answers(PROMPTS, [2, 0])
    ((index, answer),) = next(answers)
    assert index == 2
    assert isinstance(answer, Response)
    assert not slow.is_closed
    answers.close()
    assert slow.is_closed
