"""A request that fails gets an error, the others their answers; no stack trace leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import openai
import pytest
import torch
from running import QUESTION, TINY, Gate, Running, served, until

from dmax.decoding.block import Decision, Output, State, View
from dmax.decoding.spd import SoftParallelDecoding
from dmax.serve.served import ServedModel
from dmax.serve.settings import ServerOptions

SECRET = "what only the log may say"
BAD = 7  # a token whose embedding is NaN


@dataclass(frozen=True)
class Failing(SoftParallelDecoding):
    """Raises in the first block, or in the second one, which holds nothing of the prompt."""

    name: ClassVar[str] = "failing"

    late: bool = False

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        if not self.late or view.active.all():
            raise RuntimeError(SECRET)
        return super().step(view, output, state)


@pytest.fixture(scope="module", name="model")
def model_fixture() -> ServedModel:
    model = served(TINY, ServerOptions())
    with torch.no_grad():
        model.llm.model.get_input_embeddings().weight[BAD] = float("nan")
    return model


@pytest.fixture(scope="module", name="server")
def server_fixture(model: ServedModel) -> Iterator[Running]:
    with Running(model) as server:
        yield server


@pytest.fixture(autouse=True)
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = EntryPoint("failing", f"{__name__}:Failing", "dmax.strategies")
    monkeypatch.setattr("dmax.decoding.entry_points", lambda group: [plugin])


def chat(**more: Any) -> dict[str, Any]:
    # With "Hi" its last block is shared by the prompt and the answer.
    return {"model": TINY, "messages": [{"role": "user", "content": f"Hi. {QUESTION}"}], **more}


def fails(*, late: bool = False) -> dict[str, Any]:
    return {"dmax": {"strategy": "failing", "options": {"late": late}}}


def check(body: Any) -> None:
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["type"], body["code"]) == ("server_error", "decoding_failed")
    assert SECRET not in str(body) and "\n" not in body["message"]


def test_a_strategy_that_raises_is_an_error_of_the_server(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "dmax"):  # as `dmax --debug serve` does
        answer = server.post("/v1/chat/completions", chat(**fails()))
    assert answer.status_code == 500
    check(answer.json()["error"])
    assert "RuntimeError" in answer.json()["error"]["message"]
    assert SECRET in caplog.text


def test_nan_logits_are_an_error_of_the_server(server: Running) -> None:
    answer = server.post("/v1/completions", {"model": TINY, "prompt": [5, BAD, 6]})
    assert answer.status_code == 500
    check(answer.json()["error"])
    assert "NaN logits" in answer.json()["error"]["message"]


def test_within_a_stream_the_error_is_an_event_that_the_client_raises(server: Running) -> None:
    with server.client() as client:
        chunks: Any = client.chat.completions.create(
            **chat(), stream=True, extra_body=fails(late=True)
        )
        texts: list[str] = []
        with pytest.raises(openai.APIError) as raised:
            texts.extend(each.choices[0].delta.content for each in chunks)
        check(raised.value.body)
        assert "".join(texts)  # of the first block


@pytest.mark.parametrize("is_stream", [False, True])
def test_others_in_the_same_forwards_get_their_answers(
    server: Running, model: ServedModel, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    alone = server.post("/v1/chat/completions", chat()).json()["choices"][0]["message"]
    bad = {"model": TINY, "prompt": [5, BAD, 6], "stream": is_stream}
    with Gate(monkeypatch) as gate, ThreadPoolExecutor() as pool:
        fine = [pool.submit(server.post, "/v1/chat/completions", chat()) for _ in range(3)]
        failing = [
            pool.submit(server.post, "/v1/chat/completions", chat(**fails(), stream=is_stream)),
            pool.submit(server.post, "/v1/completions", bad),
        ]
        until(lambda: model.num_requests == 5)
        gate.open()
        assert [each.result().json()["choices"][0]["message"] for each in fine] == [alone] * 3
        for each in failing:
            response = each.result()
            assert response.status_code == (200 if is_stream else 500)
            assert "decoding_failed" in response.text and SECRET not in response.text
    assert model.num_requests == 0


def test_one_choice_that_fails_ends_the_request(server: Running, model: ServedModel) -> None:
    asked = {"model": TINY, "prompt": [[5, 6], [5, BAD, 6]]}
    assert server.post("/v1/completions", asked).status_code == 500
    until(lambda: model.busy() is not None and model.busy().num_running == 0)  # type: ignore[union-attr]


def test_an_engine_that_breaks_is_an_error_of_all_and_the_next_is_new(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmax.engine.engine import Engine

    with monkeypatch.context() as broken:
        broken.setattr(Engine, "step", lambda engine: (_ for _ in ()).throw(MemoryError(SECRET)))
        answer = server.post("/v1/chat/completions", chat())
    assert answer.status_code == 500
    check(answer.json()["error"])
    assert server.post("/v1/chat/completions", chat()).status_code == 200
