"""A server that answers, or fails in every way: one sentence, and the next question works."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_server import BODY, Fault, Server

from dmax import DecodingParams, InputError
from dmax.chat.responder import Part
from dmax.chat.server import ServerResponder
from dmax.chat.session import DoesNotFit
from dmax.chat.streamed import ServerAnswer
from dmax.trace.frames import Frame

pytest.importorskip("openai")

PARAMS = DecodingParams()
KEY = "OPENAI_API_KEY"


def responder(server: Server, name: str | None = None) -> ServerResponder:
    return ServerResponder(server.url, name, None)


def ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def once(fault: str) -> Any:
    """The first time that something is asked."""

    def find(prompt: str, times: int) -> Fault:
        return fault if times == 1 else None

    return find


def text_of(answer: ServerAnswer) -> str:
    return "".join(part.settled for part in answer)


def test_text_comes_as_it_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, " secret\n")
    with Server() as server:
        answer = responder(server).answer(ask("one two"), DecodingParams(seed=3, max_new_tokens=9))
        parts = list(answer)
    assert parts == [Part("answer "), Part("to "), Part("one "), Part("two")]
    assert answer.outcome is not None
    assert answer.outcome.num_tokens == 4
    assert (answer.outcome.finish_reason, answer.outcome.num_forwards) == ("stop", None)
    assert server.keys == {"Bearer secret"}
    [body] = server.bodies
    assert body == {
        "model": "served",
        "messages": ask("one two"),
        "max_tokens": 9,
        "temperature": 0.0,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with pytest.raises(InputError, match="shows no forwards"):
        answer.trace()


def test_other_servers_know_neither_strategy_nor_threshold() -> None:
    with Server() as server:
        found = responder(server)
        assert found.describe(PARAMS) == f"served at {server.url}"
        for params in (DecodingParams("spd"), DecodingParams(threshold=0.5)):
            with pytest.raises(InputError, match="it is no `dmax serve`"):
                found.check(params)
        found.check(PARAMS)


def test_models_are_those_that_the_server_lists() -> None:
    with Server(models=("one", "two")) as server:
        found = responder(server)
        assert found.name == "one"
        found.use("two")
        with pytest.raises(InputError, match="there is no model 'tow' at .*; it has one, two"):
            found.use("tow")
        text_of(found.answer(ask("hi"), PARAMS))
        assert server.bodies[0]["model"] == "two"
        with pytest.raises(InputError, match="there is no model 'three'"):
            responder(server, "three")
    with Server(models=()) as server:
        assert responder(server, "any").name == "any"
        with pytest.raises(InputError, match="does not say which models it has"):
            responder(server)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("401", "answers 401: Incorrect API key", f"environment variable {KEY}"),
        ("404", "answers 404: The model `no` does not exist", "/v1"),
        ("429", "answers 429: slow down", "wait a moment, then /retry"),
        ("500", "answers 500: out of memory", None),
        ("dropped", "cannot reach http://127.0.0.1", "/retry"),
        ("torn", "cannot reach http://127.0.0.1", "/retry"),
        ("unfinished", "ended before the answer did", "/retry"),
        ("error event", "ends the answer: out of memory", "/retry"),
        ("malformed event", "something that is no chat completion", "OpenAI-compatible"),
        ("another event", "something that is no chat completion", "OpenAI-compatible"),
        *((body, "ended before the answer did", None) for body in BODY),
    ],
)
def test_a_fault_is_one_sentence_and_the_next_answer_comes(
    fault: str, message: str, hint: str | None
) -> None:
    with Server(fault=once(fault)) as server:
        found = responder(server)
        with pytest.raises(InputError, match=message) as caught:
            text_of(found.answer(ask("hi"), PARAMS))
        assert hint is None or hint in str(caught.value.hint)
        assert not isinstance(caught.value, DoesNotFit)
        assert text_of(found.answer(ask("hi"), PARAMS)) == "answer to hi"
        assert server.asked == {"hi": 2}  # nothing is asked twice in silence


def test_what_the_server_calls_too_long_may_fit_with_fewer_messages() -> None:
    with Server(fault=once("400")) as server, pytest.raises(DoesNotFit, match="maximum context"):
        responder(server).answer(ask("hi"), PARAMS)


def test_a_lost_server_is_one_sentence() -> None:
    with Server() as server:
        pass
    with pytest.raises(InputError, match="cannot reach http://127.0.0.1"):
        responder(server)


FRAME = {
    "kind": "provisional",
    "position": 0,
    "step": 1,
    "num_forwards": 1,
    "seconds": 0.1,
    "token_ids": [1],
    "texts": ["one"],
    "masked": [False],
    "confidence": [0.5],
    "written": [True],
    "forced": False,
    "capped": False,
}


def chunk(record: Any) -> SimpleNamespace:
    return SimpleNamespace(choices=[], usage=None, dmax=record)


def said(*records: dict[str, Any]) -> ServerAnswer:
    """An answer of a server that says these things beside the text."""
    with Server() as server:
        asking = responder(server)._asking
    return ServerAnswer(map(chunk, records), 0.0, asking)


@pytest.mark.parametrize(
    "record",
    [
        FRAME | {"texts": [1]},
        FRAME | {"confidence": ["sure"]},
        {"kind": "committed"},
        {"kind": "finished", "num_forwards": "many"},
    ],
)
def test_a_damaged_frame_is_one_sentence(record: dict[str, Any]) -> None:
    parts = iter(said(FRAME, record))
    assert next(parts) == Part(frame=Frame(**FRAME, candidates=[]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="something that is no chat completion"):
        next(parts)


def test_a_damaged_header_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="has no `format`"):
        said({"kind": "begin", "params": []}).begin()


def test_what_a_later_version_adds_to_a_frame_is_passed_over() -> None:
    part = next(iter(said(FRAME | {"mood": "calm"})))
    assert part.frame == Frame(**FRAME, candidates=[])  # type: ignore[arg-type]


def test_closing_an_answer_closes_its_connection() -> None:
    with Server(fault=once("hanging")) as server:
        found = responder(server)
        answer = found.answer(ask("hi"), PARAMS)
        parts = iter(answer)
        assert next(parts) == Part("answer ")
        answer.close()
        assert text_of(found.answer(ask("hi"), PARAMS)) == "answer to hi"


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret")
    said = {"error": {"message": "Incorrect API key provided: sk-secret"}}
    monkeypatch.setattr("fake_server.STATUS", {"echo": (401, said)})
    with Server(fault=once("echo")) as server:
        with pytest.raises(InputError, match="provided: …") as caught:
            responder(server).answer(ask("hi"), PARAMS)
        assert "sk-secret" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("key", ["schlüssel", "one\ntwo", "a\x00b"])
def test_a_key_that_no_request_can_carry(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    environment = {KEY: key}
    monkeypatch.setattr("os.environ", environment)
    with pytest.raises(InputError, match=f"the key in {KEY} holds characters") as caught:
        ServerResponder("http://127.0.0.1:1", None, KEY)
    assert key not in str(caught.value)


def test_a_key_of_another_name_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with Server() as server:
        with pytest.raises(InputError, match="there is no key in the environment variable MY_KEY"):
            ServerResponder(server.url, None, "MY_KEY")
        monkeypatch.setenv("MY_KEY", "mine")
        text_of(ServerResponder(server.url, None, "MY_KEY").answer(ask("hi"), PARAMS))
        assert server.keys == {"Bearer mine"}


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://127.0.0.1:port"])
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with Server() as server:
        with pytest.raises(InputError, match="a proxy in the environment cannot be used") as caught:
            responder(server)
        assert "NO_PROXY='*'" in str(caught.value.hint)
        monkeypatch.setenv("NO_PROXY", "*")
        assert responder(server).name == "served"


def test_a_password_in_the_address_is_not_shown() -> None:
    with Server() as server:
        url = server.url.replace("http://", "http://me:secret@")
        found = ServerResponder(url, None, None)
        assert found.describe(PARAMS) == f"served at {server.url}"
    with pytest.raises(InputError, match="cannot reach http://127.0.0.1") as caught:
        ServerResponder(url, None, None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:x"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="`--url` must be an address, got"):
        ServerResponder(url, None, KEY)
