"""The OpenAPI document says what the server does: what it takes, and what it gives."""

from __future__ import annotations

import copy
import json
from importlib.metadata import EntryPoint
from typing import Any

import httpx
import pytest
from running import QUESTION, TINY, Running

import dmax.decoding
from dmax import DecodingParams, strategies
from dmax.decoding import get_strategy
from dmax.serve.bodies import ChatRequest, CompletionRequest
from dmax.serve.replies import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Reply,
)

MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT = {"model": TINY, "messages": MESSAGES, "max_tokens": 40}
COMPLETION = {"model": TINY, "prompt": QUESTION, "max_tokens": 40}
PROVISIONAL = {"stream": True, "dmax": {"stream": "provisional"}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module", name="document")
def document_fixture(server: Running) -> Any:
    return httpx.get(f"{server.url}/openapi.json").json()


@pytest.mark.parametrize(
    ("path", "reply"),
    [("/health", Health), ("/v1/models", ModelList), ("/v1/models/tiny-base", ModelCard)],
)
def test_what_is_read_has_the_form_that_is_documented(
    server: Running, path: str, reply: type[Reply]
) -> None:
    reply.model_validate_json(httpx.get(f"{server.url}{path}").content, strict=True)


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2}, {"stop": "."}])
def test_answers_to_chats_have_the_form_that_is_documented(
    server: Running, more: dict[str, Any]
) -> None:
    answer = server.post("/v1/chat/completions", CHAT | more)
    ChatCompletion.model_validate_json(answer.content, strict=True)
    chunks(server, "/v1/chat/completions", CHAT | more, ChatChunk)


@pytest.mark.parametrize("more", [{}, {"logprobs": 0}, {"logprobs": 3, "n": 2}])
def test_answers_to_completions_have_the_form_that_is_documented(
    server: Running, more: dict[str, Any]
) -> None:
    answer = server.post("/v1/completions", COMPLETION | more)
    Completion.model_validate_json(answer.content, strict=True)
    chunks(server, "/v1/completions", COMPLETION | more, CompletionChunk)


def chunks(server: Running, path: str, asked: dict[str, Any], reply: type[Reply]) -> None:
    for more in (USAGE, PROVISIONAL):
        response = server.post(path, asked | more)
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for event in events:
            reply.model_validate_json(event.removeprefix("data: "), strict=True)


@pytest.mark.parametrize("asked", [{}, {"model": "no"}, CHAT | {"n": 99}, CHAT | {"tools": [1]}])
def test_errors_have_the_form_that_is_documented(server: Running, asked: dict[str, Any]) -> None:
    ErrorBody.model_validate_json(server.post("/v1/chat/completions", asked).content, strict=True)


def test_the_document_names_models_and_limits_of_this_server(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        properties = schemas[name]["properties"]
        assert properties["model"]["enum"] == ["tiny-dmax", "tiny-base"]
        assert properties["max_tokens"]["anyOf"][0]["maximum"] == 1024
        assert properties["n"]["anyOf"][0]["maximum"] == 16
        assert schemas[name]["additionalProperties"] is False


def test_the_document_has_every_field_and_its_meaning(document: Any) -> None:
    schemas = document["components"]["schemas"]
    for model in (ChatRequest, CompletionRequest):
        properties = schemas[model.__name__]["properties"]
        assert set(properties) == set(model.model_fields)
    plain = {"model", "messages", "prompt", "stream", "stream_options", "dmax"}
    for name, field in {**ChatRequest.model_fields, **CompletionRequest.model_fields}.items():
        assert name in plain or field.description, name


def test_every_reference_of_the_document_leads_somewhere(document: Any) -> None:
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        here = document
        for step in reference.removeprefix("#/").split("/"):
            here = here[step]
    assert "HTTPValidationError" not in document["paths"]["/v1/completions"]["post"]["responses"]


def test_the_document_has_every_strategy_with_its_own_settings(document: Any) -> None:
    unnamed, *named = document["components"]["schemas"]["DmaxOptions"]["anyOf"]
    assert unnamed["properties"]["strategy"] == {"enum": [None, "auto"]}
    described = {each["properties"]["strategy"]["const"]: each["properties"] for each in named}
    assert set(described) == set(strategies()) - {"learn2pd", "demask"}  # they take a head
    assert described["sched"]["options"]["anyOf"][0]["properties"]["schedule"]["enum"]
    alternatives = [each for each in named if each["title"] == "sched"]
    settings = [each["properties"]["options"]["anyOf"][0]["properties"] for each in alternatives]
    assert [each.get("low", {}).get("maximum") for each in settings] == [None, 7.5]
    assert [each.get("high", {}).get("minimum") for each in settings] == [2.5, None]
    for name, properties in described.items():
        for option, schema in properties["options"]["anyOf"][0]["properties"].items():
            bounds = schema["anyOf"][0] if "anyOf" in schema else schema
            for value in (bounds.get("minimum"), bounds.get("maximum"), *bounds.get("enum", ())):
                if value is not None:
                    get_strategy(DecodingParams(name, options={option: value}))
        for field in ("threshold", "stop_confidence", "top_k"):
            answerable = properties.get(field) != {"type": "null"}
            assert answerable == hasattr(get_strategy(DecodingParams(name)), field), (name, field)


def test_a_plugin_that_cannot_be_loaded_is_left_out(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [EntryPoint("mine", "notthere.module:Mine", "dmax.strategies")]
    monkeypatch.setattr(dmax.decoding, "entry_points", lambda group: found)
    assert "mine" in strategies()
    model = copy.copy(server.models[0])
    vars(model).pop("strategies", None)  # which it keeps
    known = model.describe()["dmax"]["strategies"]
    assert "spd" in known and "mine" not in known
