"""Chats and completions through the official client: what is asked for, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from running import QUESTION, TINY, Running

from dmax import DecodingParams

MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def direct(server: Running, prompt: Any, **settings: Any) -> Any:
    """What `LLM.generate` says to the same."""
    settings.setdefault("strategy", "auto")
    [output] = server.models[0].llm.generate([prompt], DecodingParams(**settings))
    return output


def ask(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(model=TINY, messages=MESSAGES, **settings)


def test_a_chat_is_answered_as_the_model_answers_it(server: Running, client: OpenAI) -> None:
    answer = ask(client)
    output = direct(server, MESSAGES)
    [choice] = answer.choices
    assert choice.message.content == output.text
    assert choice.message.role == "assistant"
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == len(output.token_ids)
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    assert answer.dmax["num_forwards"] == output.num_forwards
    assert answer.dmax["tokens_per_forward"] == output.tokens_per_forward
    assert answer.dmax["strategy"] == "spd" and answer.dmax["threshold"] == 0.5
    assert choice.dmax["token_ids"] == list(output.token_ids)


def test_a_stream_gives_the_same_text_and_usage(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(each.choices[0].delta.content or "" for each in parts) == (
        whole.choices[0].message.content
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert [each.choices[0].finish_reason for each in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert last.choices == [] and last.usage == whole.usage
    assert {each.usage for each in parts} == {None}
    assert {each.id for each in chunks} == {parts[0].id}
    assert parts[-1].dmax["num_forwards"] == whole.dmax["num_forwards"]


def test_usage_is_left_out_of_a_stream_unless_it_is_asked_for(client: OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    assert all(each.choices and each.usage is None for each in chunks)


def test_every_forward_is_streamed_on_request(server: Running, client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, extra_body={"dmax": {"stream": "provisional"}}))
    extra = [each.dmax for each in chunks if not each.choices]
    begin, *frames = extra
    assert begin["kind"] == "begin" and begin["format"] == "dmax-trace"
    assert begin["prompt"] == MESSAGES
    assert len({each["num_forwards"] for each in frames}) == whole.dmax["num_forwards"]
    settled = [each for each in frames if each["kind"] == "committed"]
    ids = [token for each in settled for token in each["token_ids"]]
    token_ids = whole.choices[0].dmax["token_ids"]
    assert ids[: len(token_ids)] == token_ids
    text = "".join(part.delta.content or "" for each in chunks for part in each.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].dmax["kind"] == "finished" and chunks[-1].dmax["text"] == text


def test_a_stream_of_forwards_begins_with_how_it_is_decoded(client: OpenAI) -> None:
    extra: Any = {"dmax": {"stream": "provisional", "threshold": 0.7}}
    for prompt, shown in (("Two mugs", "Two mugs"), ([5, 6, 7], None)):
        chunks = client.completions.create(
            model=TINY, prompt=prompt, max_tokens=8, n=2, stream=True, extra_body=extra
        )
        begins = [each.dmax for each in chunks if not each.choices]  # type: ignore[attr-defined]
        begins = [each for each in begins if each["kind"] == "begin"]
        assert [each["index"] for each in begins] == [0, 1]
        assert [each["prompt"] for each in begins] == [shown] * 2
        assert [each["threshold"] for each in begins] == [0.7] * 2


def test_both_models_are_listed_and_answer_by_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-dmax", "tiny-base"]
    assert client.models.retrieve("tiny-base").dmax["strategy"] == "threshold"
    answers = {
        name: client.chat.completions.create(model=name, messages=MESSAGES).dmax["num_forwards"]
        for name in ("tiny-dmax", "tiny-base")
    }
    assert answers["tiny-dmax"] < answers["tiny-base"]


def test_an_unknown_model_is_an_error_that_names_those_there_are(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="tiny-dmx", messages=MESSAGES)
    body: Any = raised.value.body
    assert (body["code"], body["param"]) == ("model_not_found", "model")
    assert "did you mean `tiny-dmax`?" in body["message"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_health_says_ready_only_when_every_model_is(server: Running) -> None:
    answer = httpx.get(f"{server.url}/health")
    assert answer.status_code == 200
    assert json.loads(answer.content) == {"status": "ok", "loading": []}
