"""The chat against `dmax serve`: the same answers as in this process, and drafts over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmax import DecodingParams, InputError
from dmax.chat.loop import EXAMPLE
from dmax.chat.server import ServerResponder
from dmax.chat.session import DoesNotFit
from dmax.chat.streamed import ServerAnswer
from dmax.trace import Trace

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from running import Running, served

from dmax.serve.settings import ServerOptions

QUESTION = [{"role": "user", "content": EXAMPLE}]
PARAMS = DecodingParams()


@pytest.fixture(scope="module", name="server")
def server_fixture() -> Iterator[Running]:
    options = ServerOptions(max_batch_size=1)
    with Running(served("tiny-dmax", options), served("tiny-base", options)) as server:
        yield server


@pytest.fixture
def responder(server: Running) -> ServerResponder:
    return ServerResponder(server.url, None, None)


def text_of(answer: ServerAnswer) -> str:
    return "".join(part.settled for part in answer)


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        DecodingParams("threshold", threshold=0.4),
        DecodingParams("mbd", options={"blocks": 2}),
        DecodingParams(temperature=1.0, seed=5, max_new_tokens=40),
    ],
    ids=lambda params: params.strategy,
)
def test_an_answer_is_what_the_model_generates(
    server: Running, responder: ServerResponder, params: DecodingParams
) -> None:
    answer = responder.answer(QUESTION, params)
    parts = list(answer)
    [expected] = server.models[0].llm.generate([QUESTION], params)
    assert "".join(part.settled for part in parts) == expected.text
    assert answer.outcome is not None
    assert answer.outcome.num_tokens == len(expected.token_ids)
    assert answer.outcome.num_forwards == expected.num_forwards
    assert answer.outcome.tokens_per_forward == expected.tokens_per_forward
    frames = [part.frame for part in parts if part.frame is not None]
    assert frames[-1].num_forwards == expected.num_forwards
    assert {frame.kind for frame in frames} == {"provisional", "committed"}
    trace = Trace.from_record(answer.trace())
    assert trace.output["text"] == expected.text
    assert len(trace.frames) == len(frames)


def test_settings_and_models_are_those_of_the_server(responder: ServerResponder) -> None:
    place = responder.describe(PARAMS)
    assert place.startswith("tiny-dmax at http://127.0.0.1:")
    assert place.endswith("/v1, strategy spd, threshold 0.5")
    chosen = DecodingParams("threshold")
    assert responder.describe(chosen).endswith("strategy threshold, threshold 0.95")
    with pytest.raises(InputError, match="unknown strategy 'thresold'; the server has ") as caught:
        responder.check(DecodingParams("thresold"))
    assert caught.value.hint == "did you mean `threshold`?"
    responder.use("tiny-base")
    assert responder.describe(PARAMS).endswith("strategy threshold, threshold 0.95")
    assert text_of(responder.answer(QUESTION, PARAMS)).endswith("#### 10")


def test_what_the_server_refuses_is_one_sentence(responder: ServerResponder) -> None:
    with pytest.raises(InputError, match="answers 400: .*no option"):
        responder.answer(QUESTION, DecodingParams("spd", options={"blocks": 3}))
    with pytest.raises(InputError, match="answers 400: `max_tokens` must be at most 1024"):
        responder.answer(QUESTION, DecodingParams(max_new_tokens=2000))


def test_a_conversation_that_leaves_no_room_for_an_answer_does_not_fit(
    responder: ServerResponder,
) -> None:
    turn = [{"role": "user", "content": "mugs " * 300}, {"role": "assistant", "content": "mugs"}]
    for num_turns in (3, 4):  # first there is room for a part of the answer, then for none
        with pytest.raises(DoesNotFit):
            responder.answer([*turn * num_turns, *QUESTION], PARAMS)
    fitting = responder.answer([*turn, *QUESTION], PARAMS)
    assert fitting.num_new == PARAMS.max_new_tokens
    fitting.close()
    alone = [{"role": "user", "content": "mugs " * 950}]
    answer = responder.answer(alone, PARAMS)
    assert answer.num_new < PARAMS.max_new_tokens
    answer.close()
    with pytest.raises(DoesNotFit, match="there is room for 1024"):
        responder.answer([{"role": "user", "content": "mugs " * 2000}], PARAMS)


def test_closing_an_answer_frees_the_slot(responder: ServerResponder) -> None:
    """The server has one slot, and the answer that is closed would be a long one."""
    long = DecodingParams("autoregressive", max_new_tokens=900)
    answer = responder.answer(QUESTION, long)
    next(iter(answer))
    answer.close()
    assert text_of(responder.answer(QUESTION, PARAMS)).endswith("#### 10")
