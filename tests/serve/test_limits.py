"""What a server takes on, and what becomes of clients that leave, wait or do not read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from running import QUESTION, TINY, Gate, Running, served, until

from dmax.serve.served import Load, ServedModel
from dmax.serve.settings import ServerOptions

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
# Takes many forwards: one token each, and no end.
LONG: Any = {
    "model": TINY,
    "messages": MESSAGES,
    "max_tokens": 512,
    "dmax": {"strategy": "autoregressive", "ignore_eos": True},
}
SHORT: Any = {"model": TINY, "messages": MESSAGES, "max_tokens": 8}
NARROW = ServerOptions(max_batch_size=2, max_queue=1, max_total_tokens=2500)
IDLE = Load(0, 0, 2)


@pytest.fixture(scope="module", name="model")
def model_fixture() -> ServedModel:
    return served(TINY, NARROW)


@pytest.fixture(scope="module", name="narrow")
def narrow_fixture(model: ServedModel) -> Iterator[Running]:
    """A server with two slots and one place in the queue."""
    with Running(model, options=NARROW) as server:
        yield server


@pytest.fixture(autouse=True)
def is_idle_again(model: ServedModel) -> Iterator[None]:
    """Every test leaves the model with nothing to do."""
    yield
    until(lambda: model.busy() == IDLE and model.num_requests == 0)


def stream(server: Running, body: Any) -> Any:
    return httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}, timeout=60
    )


def test_a_client_that_leaves_a_stream_frees_its_slot(narrow: Running, model: ServedModel) -> None:
    with narrow.client() as client:
        body = {key: value for key, value in LONG.items() if key != "dmax"}
        chunks = client.chat.completions.create(
            **body, stream=True, extra_body={"dmax": LONG["dmax"]}
        )
        next(iter(chunks))
        assert model.num_requests == 1
        chunks.close()
        until(lambda: model.busy() == IDLE and model.num_requests == 0)


def test_a_client_that_gives_up_on_an_answer_frees_its_slot(
    narrow: Running, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(monkeypatch) as gate:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{narrow.url}/v1/chat/completions", json=LONG, timeout=0.5)
        until(lambda: model.num_requests == 0)
        gate.open()
        until(lambda: model.busy() == IDLE)
        assert gate.num_steps < 10  # of 512


def test_the_client_raises_its_timeout(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Gate(monkeypatch),
        narrow.client(timeout=0.5) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(**SHORT)


def test_more_than_the_queue_takes_gets_429_and_when_to_come_again(
    narrow: Running, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(monkeypatch) as gate, ThreadPoolExecutor() as pool:
        taken = [pool.submit(narrow.post, "/v1/chat/completions", SHORT) for _ in range(3)]
        until(lambda: model.num_requests == 3)
        refused = narrow.post("/v1/chat/completions", SHORT)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        several = narrow.post("/v1/chat/completions", SHORT | {"n": 2, "stream": True})
        assert several.status_code == 429
        with narrow.client() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**SHORT)
        gate.open()
        assert [each.result().status_code for each in taken] == [200] * 3
    assert narrow.post("/v1/chat/completions", SHORT).status_code == 200


def test_the_client_tries_again_and_succeeds(
    narrow: Running, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(monkeypatch) as gate, ThreadPoolExecutor() as pool:
        taken = [pool.submit(narrow.post, "/v1/chat/completions", SHORT) for _ in range(3)]
        until(lambda: model.num_requests == 3)
        with narrow.client(max_retries=5) as client:
            late = pool.submit(client.chat.completions.create, **SHORT)
            gate.open()
            assert late.result().choices[0].message.content
        assert [each.result().status_code for each in taken] == [200] * 3


def test_tokens_of_all_requests_in_progress_are_bounded(
    narrow: Running, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = SHORT | {"max_tokens": 900}
    with Gate(monkeypatch) as gate, ThreadPoolExecutor() as pool:
        taken = [pool.submit(narrow.post, "/v1/chat/completions", large) for _ in range(2)]
        until(lambda: model.num_requests == 2)
        refused = narrow.post("/v1/chat/completions", large | {"max_tokens": 940})
        gate.open()
        assert [each.result().status_code for each in taken] == [200] * 2
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "too_many_tokens"


def test_what_could_never_be_taken_on_is_refused_for_good(narrow: Running) -> None:
    choices = narrow.post("/v1/chat/completions", SHORT | {"n": 4})
    assert (choices.status_code, choices.json()["error"]["code"]) == (400, "too_many_choices")
    tokens = narrow.post("/v1/chat/completions", SHORT | {"n": 3, "max_tokens": 940})
    assert (tokens.status_code, tokens.json()["error"]["code"]) == (400, "too_many_tokens")


def test_prompts_and_answers_of_one_request_are_bounded(model: ServedModel) -> None:
    options = replace(NARROW, max_prompt_tokens=40, max_new_tokens=20)
    small = ServedModel(TINY, lambda: model.llm, options)
    small.load()
    with Running(small, options=options) as server:
        long = server.post("/v1/chat/completions", SHORT)
        assert long.json()["error"]["code"] == "context_length_exceeded"
        assert "this server takes 40" in long.json()["error"]["message"]
        prompt = {"model": TINY, "prompt": "Two mugs"}
        refused = server.post("/v1/completions", prompt | {"max_tokens": 21})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        answer = server.post("/v1/completions", prompt | {"dmax": {"ignore_eos": True}}).json()
        assert answer["usage"]["completion_tokens"] == answer["dmax"]["max_new_tokens"] == 20


def test_an_answer_ends_where_the_context_does(narrow: Running) -> None:
    asked = {"model": TINY, "prompt": [5] * 1000, "max_tokens": 100, "dmax": {"ignore_eos": True}}
    answer = narrow.post("/v1/completions", asked).json()
    assert answer["usage"]["completion_tokens"] == answer["dmax"]["max_new_tokens"] == 24
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_deadline_ends_an_answer_with_what_there_is(narrow: Running, is_stream: bool) -> None:
    with narrow.client() as client:
        asked = {**SHORT, "extra_body": {"dmax": {"deadline": 0}}}
        answer: Any = client.chat.completions.create(**asked, stream=is_stream)
        last = list(answer)[-1] if is_stream else answer
        [choice] = last.choices
        details = last.dmax if is_stream else choice.dmax
        assert (choice.finish_reason, details["finish_reason"]) == ("length", "deadline")
        assert details["token_ids"] == []


def test_the_servers_deadline_holds_for_all(model: ServedModel) -> None:
    options = replace(NARROW, max_seconds=0.001)
    hasty = ServedModel(TINY, lambda: model.llm, options)
    hasty.load()
    with Running(hasty, options=options) as server:
        for asked in (LONG, LONG | {"dmax": LONG["dmax"] | {"deadline": 1000}}):
            answer = server.post("/v1/chat/completions", asked).json()
            assert answer["choices"][0]["dmax"]["finish_reason"] == "deadline"
            assert answer["dmax"]["deadline"] == 0.001


def test_a_stream_that_nobody_reads_is_cancelled_and_others_go_on(model: ServedModel) -> None:
    options = replace(NARROW, max_buffered_bytes=20_000)
    served_here = ServedModel(TINY, lambda: model.llm, options)
    served_here.load()
    # One token a forward, and 32 candidates for each: more than a network holds back.
    dmax = {"threshold": 1, "top_k": 32, "ignore_eos": True, "stream": "provisional"}
    asked = LONG | {"stream": True, "max_tokens": 900, "dmax": dmax}
    body = json.dumps(asked).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with (
        Running(served_here, options=options) as server,
        socket.socket() as reader,
    ):
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(60)
        reader.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        reader.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = server.post("/v1/chat/completions", SHORT)
        assert answer.status_code == 200
        until(lambda: model.busy() == IDLE)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            piece = reader.recv(65536)
            assert piece, "the server closed the connection without an end"
            received += piece
    *_, error, done = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: ")]
    assert json.loads(error)["error"]["code"] == "slow_reader"
    assert done.strip() == b"[DONE]"


def test_requests_in_progress_can_be_ended_with_an_error(
    narrow: Running, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmax.serve.errors import ApiError

    with Gate(monkeypatch) as gate, ThreadPoolExecutor() as pool:
        whole = pool.submit(narrow.post, "/v1/chat/completions", LONG)
        with stream(narrow, LONG) as response:
            until(lambda: model.num_requests == 2)
            model.end_all(ApiError(503, "the server is shutting down", code="shutting_down"))
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert whole.result().status_code == 503
        gate.open()


def test_a_model_that_is_being_loaded_says_so() -> None:
    model = ServedModel(TINY, lambda: pytest.fail("nobody loads it"), ServerOptions())
    with Running(model) as server:
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert health.json() == {"status": "loading", "loading": [TINY]}
        for answer in (
            server.post("/v1/chat/completions", SHORT),
            httpx.get(f"{server.url}/v1/models"),
        ):
            assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
            assert answer.json()["error"]["code"] == "model_loading"
        assert httpx.get(f"{server.url}/openapi.json").status_code == 200
        assert model.busy() is None


def test_a_reader_in_time_loses_nothing(narrow: Running) -> None:
    client: OpenAI
    with narrow.client() as client:
        asked = {key: value for key, value in LONG.items() if key != "dmax"} | {"max_tokens": 64}
        extra = {"dmax": LONG["dmax"] | {"stream": "provisional"}}
        chunks: Any = client.chat.completions.create(**asked, stream=True, extra_body=extra)
        frames = [each.dmax for each in chunks if not each.choices][1:]
    forwards = [each["num_forwards"] for each in frames]
    assert forwards == sorted(forwards) and set(forwards) == set(range(1, len(forwards) + 1))
