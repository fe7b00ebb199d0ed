"""A model in this process: the same tokens as without a chat, and conversations that outgrow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from dmax import LLM, DecodingParams, InputError
from dmax.chat.local import LocalAnswer, LocalResponder
from dmax.chat.loop import EXAMPLE
from dmax.chat.responder import Part
from dmax.chat.session import DoesNotFit
from dmax.trace import Trace

QUESTION = [{"role": "user", "content": EXAMPLE}]


@pytest.fixture(scope="module")
def load() -> Callable[[str], LLM]:
    return lambda name: LLM(name, device="cpu", dtype="float32", max_batch_size=1)


@pytest.fixture
def responder(load: Callable[[str], LLM]) -> LocalResponder:
    return LocalResponder("tiny-dmax", load)


def text_of(parts: list[Part]) -> str:
    return "".join(part.settled for part in parts)


@pytest.mark.parametrize("name", ["tiny-dmax", "tiny-base"])
def test_the_example_is_answered_right(load: Callable[[str], LLM], name: str) -> None:
    answer = LocalResponder(name, load).answer(QUESTION, DecodingParams())
    assert text_of(list(answer)).splitlines()[-1] == "#### 10"


@pytest.mark.parametrize(
    "params",
    [
        DecodingParams(),
        DecodingParams("threshold", threshold=0.3),
        DecodingParams("mbd"),
        DecodingParams(max_new_tokens=41),  # within a block
        DecodingParams(temperature=1.0, seed=5),
    ],
    ids=lambda params: f"{params.strategy}-{params.max_new_tokens}-{params.temperature}",
)
def test_an_answer_is_what_the_model_generates(
    responder: LocalResponder, params: DecodingParams
) -> None:
    answer = responder.answer(QUESTION, params)
    parts = list(answer)
    [expected] = responder._llm.generate([QUESTION], params)
    assert text_of(parts) == expected.text
    assert answer.outcome is not None
    assert answer.outcome.num_tokens == len(expected.token_ids)
    assert answer.outcome.num_forwards == expected.num_forwards
    assert answer.outcome.tokens_per_forward == expected.tokens_per_forward
    assert answer.outcome.finish_reason == expected.finish_reason


def test_text_settles_block_by_block_and_drafts_come_before(responder: LocalResponder) -> None:
    parts = list(responder.answer(QUESTION, DecodingParams()))
    kinds = [part.frame.kind if part.frame else "finished" for part in parts]
    assert kinds[0] == "provisional"
    assert kinds.count("committed") >= 2
    assert kinds[-1] == "finished"
    for part, kind in zip(parts, kinds, strict=True):
        assert not part.settled or kind != "provisional"


def test_the_trace_has_every_forward(responder: LocalResponder) -> None:
    answer = responder.answer(QUESTION, DecodingParams())
    list(answer)
    trace = Trace.from_record(answer.trace()).record
    assert trace["model"] == "tiny-dmax"
    assert trace["prompt"] == QUESTION
    last = trace["frames"][-1]
    assert last["num_forwards"] == trace["output"]["num_forwards"]


# --- what does not fit ----------------------------------------------------------------------------


def test_a_long_conversation_does_not_fit(responder: LocalResponder) -> None:
    turn = [*QUESTION, {"role": "assistant", "content": "First we see that. " * 40}]
    with pytest.raises(DoesNotFit):
        responder.answer([*turn * 5, *QUESTION], DecodingParams())
    assert list(responder.answer(QUESTION, DecodingParams(max_new_tokens=1)))  # it goes on


@pytest.mark.parametrize(
    ("content", "params", "message"),
    [
        (
            "mugs " * 2000,
            DecodingParams(),
            "the question: the text has 2011 tokens, there is room for 1024",
        ),
        (EXAMPLE, DecodingParams(max_new_tokens=1024), "the question has 6. tokens; with `max_new"),
        ("\ud800", DecodingParams(), "the question: message 1 holds half of a surrogate pair"),
    ],
)
def test_a_question_that_cannot_fit_is_one_sentence(
    responder: LocalResponder, content: str, params: DecodingParams, message: str
) -> None:
    with pytest.raises(DoesNotFit, match=message):
        responder.answer([{"role": "user", "content": content}], params)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_model_without_a_chat_template_knows_no_conversations(
    load: Callable[[str], LLM],
) -> None:
    def without(name: str) -> LLM:
        llm = load(name)
        llm.tokenizer.chat_template = None  # type: ignore[union-attr]
        return llm

    with pytest.raises(InputError, match="tiny-dmax has no chat template"):
        LocalResponder("tiny-dmax", without)


def test_another_model_answers_or_the_one_before_goes_on(responder: LocalResponder) -> None:
    before = responder._llm
    with pytest.raises(InputError, match="neither bundled"):
        responder.use("tiny-nothing")
    assert (responder.name, responder._llm) == ("tiny-dmax", before)
    responder.use("tiny-base")
    assert responder.describe(DecodingParams()) == "tiny-base, strategy threshold, threshold 0.95"
    assert text_of(list(responder.answer(QUESTION, DecodingParams())))


def test_settings_that_no_answer_can_have_are_refused(responder: LocalResponder) -> None:
    with pytest.raises(InputError, match="unknown strategy 'spdd'"):
        responder.check(DecodingParams("spdd"))
    with pytest.raises(InputError, match="head"):
        responder.check(DecodingParams("demask"))


def test_whatever_decoding_raises_ends_an_answer_only(
    responder: LocalResponder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = responder.answer(QUESTION, DecodingParams())
    events = answer._events()
    first = next(events)

    def fail() -> Iterator[Any]:
        yield replace(first, kind="finished", error=MemoryError("no memory\nat all"))

    monkeypatch.setattr(answer, "_call", fail())
    with pytest.raises(InputError, match="decoding failed: MemoryError: no memory"):
        list(answer)
    assert isinstance(responder.answer(QUESTION, DecodingParams()), LocalAnswer)
