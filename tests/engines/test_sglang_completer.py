"""SGLang behind `dmax eval` and its like: completions, what they cost, and what ends them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from reference import Wanted, load, model_path
from sglang_engine import OPTIONS

from dmax.errors import InputError
from dmax.evaluation.run import evaluate
from dmax.integrations.sglang.completer import SglangCompleter
from dmax.llm import LLM
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams
from dmax.tasks import get_task


@pytest.fixture(scope="module")
def completer() -> Iterator[SglangCompleter]:
    given = ("dtype", "max_running_requests")
    options = {name: value for name, value in OPTIONS.items() if name not in given}
    made = SglangCompleter("tiny-dmax", dtype="float32", max_batch_size=4, **options)
    yield made
    made.close()


def complete(
    completer: SglangCompleter, wanted: list[Wanted], **changes: Any
) -> list[GenerationOutput]:
    params = replace(wanted[0].params, **changes)
    prompts = [list(each.prompt) for each in wanted]
    found: dict[int, GenerationOutput] = {}
    for group in completer.completions(prompts, params, lambda done, total: None):
        found |= dict(group)
    return [found[number] for number in range(len(wanted))]


def test_completions_are_those_of_our_own_engine(completer: SglangCompleter) -> None:
    wanted = load("spd")
    for output, right in zip(complete(completer, wanted), wanted, strict=True):
        assert output.token_ids == right.token_ids
        assert output.text == right.text
        assert output.num_forwards == right.num_forwards
        assert output.finish_reason == right.finish_reason
        assert output.prompt_token_ids == right.prompt
        assert output.num_commit_forwards > 0


def test_a_stop_text_ends_a_completion_after_its_token(completer: SglangCompleter) -> None:
    tokenizer = completer.checkpoint.tokenizer
    wanted = load("spd")
    for output, right in zip(complete(completer, wanted, stop=("Then",)), wanted, strict=True):
        assert output.text == right.text.partition("Then")[0]
        assert output.token_ids == right.token_ids[: len(output.token_ids)]
        assert tokenizer.decode(list(output.token_ids)).endswith("Then")
        assert output.finish_reason == "stop"


def test_an_iterator_that_is_closed_ends_its_requests(completer: SglangCompleter) -> None:
    wanted = load("64_spd")
    prompts = [list(each.prompt) for each in wanted]
    groups = completer.completions(prompts, wanted[0].params, lambda done, total: None)
    next(groups)
    groups.close()
    assert complete(completer, wanted[:4])[0].token_ids == wanted[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([5], {"strategy": "mbd"}, "needs 2 open blocks, and SGLang has one"),
        ([5], {"max_new_tokens": 5000}, "exceeds the model's maximum context length"),
        ([5] * 1000, {}, "has 1000 tokens, and SGLang has room for"),
        ([977], {}, "mask"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    completer: SglangCompleter, prompt: list[int], changes: dict[str, Any], message: str
) -> None:
    params = replace(DecodingParams(strategy="spd"), **changes)
    with pytest.raises(InputError, match=message):
        list(completer.completions([prompt], params, lambda done, total: None))


def test_evaluation_finds_the_same_and_names_the_engine(completer: SglangCompleter) -> None:
    params = DecodingParams(strategy="spd", max_new_tokens=160)
    task = get_task("word_problems")
    own = LLM("tiny-dmax", dtype="float32", device="cpu")
    ours, _ = evaluate(own, task, params, limit=8, seed=0)
    theirs, _ = evaluate(completer, task, params, limit=8, seed=0)
    assert theirs.correct == ours.correct > 0
    assert theirs.tpf == ours.tpf > 5
    assert theirs.environment["engine"] == "SGLang 0.5.23"
    assert (theirs.dtype, theirs.batch_size, theirs.block_length) == ("float32", 4, 32)
    assert theirs.model == model_path()
