"""What a request may not ask is refused by name; what asks for nothing passes."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from running import TINY, Running

CHAT = {"model": TINY, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
COMPLETION = {"model": TINY, "prompt": "Hi", "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def dmax(**options: Any) -> dict[str, Any]:
    return {"dmax": options}


# What is asked, the field that the error names, and a part of its sentence.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [TOOL]}, "tools", "takes null or [] only: tools are not called here"),
    ({"tool_choice": "required"}, "tool_choice", "tools are not called"),
    ({"functions": [{"name": "f"}]}, "functions", "tools are not called"),
    ({"response_format": SCHEMA}, "response_format", "no form of the answer is enforced"),
    ({"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"} only'),
    ({"logit_bias": {"50": 1}}, "logit_bias", "takes null or {} only"),
    ({"top_p": 0.9}, "top_p", "takes null or 1 only"),
    ({"top_p": True}, "top_p", "takes null or 1 only"),
    ({"frequency_penalty": 0.1}, "frequency_penalty", "takes null or 0 only"),
    ({"presence_penalty": -1}, "presence_penalty", "takes null or 0 only"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "only text"),
    ({"modalities": ["text", "audio"]}, "modalities", "only text"),
    ({"store": True}, "store", "nothing is stored"),
    ({"metadata": {"a": "b"}}, "metadata", "nothing is stored"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "without reasoning"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", "takes null only"),
    ({"service_tier": "priority"}, "service_tier", "served alike"),
    ({"web_search_options": {}}, "web_search_options", "takes null only"),
    (user([IMAGE]), "messages[0].content[0].type", "should be 'text', got 'image_url'"),
    (user([{"type": "text", "text": "a", "b": 1}]), "messages[0].content[0].b", "not a field"),
    (user("Hi", name="Jack"), "messages[0].name", "chat templates know roles only"),
    (user("Hi", tool_calls=[{}]), "messages[0].tool_calls", "tools are not called"),
    (user("Hi", colour="red"), "messages[0].colour", "is not a field of this request"),
    (user(5), "messages[0].content", "should be a valid"),
    (user(None), "messages[0].content", "should be a valid"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].role", "got 'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": None}, "messages", "should be a valid list"),
    ({"model": None}, "model", "should be a valid string"),
    ({"mx_tokens": 5}, "mx_tokens", "did you mean `max_tokens`?"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "7"}, "max_tokens", "valid integer, got '7'"),
    ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer, got True"),
    ({"max_tokens": 1025}, "max_tokens", "at most 1024, got 1025"),
    ({"max_tokens": 10**400}, "max_tokens", "less than or equal to"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens", "at most 1024"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "0"}, "temperature", "valid number"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
    ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
    ({"stop": [None]}, "stop[0]", "valid string"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "`logprobs` is not true"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usag": True}}, "stream_options.include_usag", "did you mean"),
    (dmax(treshold=0.5), "dmax.treshold", "did you mean `threshold`?"),
    (dmax(strategy="sdp"), "dmax.strategy", "did you mean `spd`?"),
    (dmax(threshold=1.5), "dmax.threshold", "less than or equal to 1"),
    (dmax(threshold=0.5, strategy="entropy_bound"), "dmax.threshold", "has no `threshold`"),
    (dmax(top_k=33), "dmax.top_k", "less than or equal to 32"),
    (dmax(top_k=2, strategy="threshold"), "dmax.top_k", "has no `top_k`"),
    (dmax(block_length=16), "dmax.block_length", "that of the checkpoint, 32"),
    (dmax(options={"alpha": 1}), "dmax.options", "has no option `alpha`"),
    (dmax(options={"soft_inputs": 1}), "dmax.options", "must be true or false"),
    (dmax(options={"a": [1]}), "dmax.options.a", "got [1]"),
    (dmax(strategy="credit", options={"alpha": 1e300}), "dmax.options.alpha", "at most 1000000"),
    (
        dmax(strategy="learn2pd", options={"head": "/etc/passwd"}),
        "dmax.options",
        "`dmax.options.head` must be tiny-base in a request",
    ),
    (dmax(deadline=-1), "dmax.deadline", "greater than or equal to 0"),
    (dmax(stream="denoise"), "dmax.stream", "got 'denoise'"),
    (dmax(stream="provisional"), "dmax.stream", "`stream` is not true"),
    ({"dmax": []}, "dmax", "valid dictionary"),
]
REFUSED_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"echo": True}, "echo", "the prompt is not decoded"),
    ({"suffix": "the end"}, "suffix", "not filled in"),
    ({"best_of": 3}, "best_of", "ask for `n`"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
    ({"prompt": [1, "a"]}, "prompt[1]", "got 'a'"),
    ({"prompt": [5, 981]}, "prompt", "outside the vocabulary of 981"),
    ({"prompt": [5, 977]}, "prompt", "holds the mask token 977"),
    ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
    ({"prompt": ["Hi"] * 17}, "prompt", "at most 16 are taken"),
    ({"prompt": "word " * 2000}, "prompt", "there is room for 1024"),
    ({"prompt": [5] * 1024}, "prompt", "leaves no room for an answer"),
    ({"messages": []}, "messages", "not a field"),
    ({"tools": []}, "tools", "`tools` is not a field of this request"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "did you mean `max_tokens`?"),
]


def check(answer: httpx.Response, param: str, sentence: str) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and sentence in error["message"], error
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(("asked", "param", "sentence"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_a_chat_may_not_ask_is_refused_by_name(
    server: Running, asked: dict[str, Any], param: str, sentence: str
) -> None:
    check(server.post("/v1/chat/completions", CHAT | asked), param, sentence)


@pytest.mark.parametrize(
    ("asked", "param", "sentence"), REFUSED_COMPLETIONS, ids=lambda each: str(each)[:40]
)
def test_what_a_completion_may_not_ask_is_refused_by_name(
    server: Running, asked: dict[str, Any], param: str, sentence: str
) -> None:
    check(server.post("/v1/completions", COMPLETION | asked), param, sentence)


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(server: Running) -> None:
    for prompt in ("word " * 2000, "word " * 100_000, [5] * 1024, [5] * 5000):
        answer = server.post("/v1/completions", COMPLETION | {"prompt": prompt})
        assert answer.json()["error"]["code"] == "context_length_exceeded", answer.text


HARMLESS = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "max_completion_tokens": 4,
    "metadata": None,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": None,
    "presence_penalty": 0.0,
    "prompt_cache_key": "a",
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "safety_identifier": "b",
    "seed": 1,
    "service_tier": "auto",
    "stop": [],
    "store": False,
    "stream": False,
    "stream_options": None,
    "temperature": 0,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "user": "me",
    "verbosity": None,
    "dmax": {},
}


def test_values_that_ask_for_nothing_change_nothing(server: Running) -> None:
    plain = server.post("/v1/chat/completions", CHAT).json()
    nulls = dict.fromkeys(HARMLESS)
    nulls["max_completion_tokens"] = None
    for asked in (HARMLESS, nulls):
        answer = server.post("/v1/chat/completions", CHAT | asked)
        assert answer.status_code == 200, answer.text
        choices, expected = answer.json()["choices"], plain["choices"]
        for each in (*choices, *expected):
            each["dmax"].pop("seconds", None)
        assert choices == expected


def test_an_answer_may_be_sent_back_as_the_client_has_it(client: OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model=TINY, messages=asked, max_tokens=8)
    asked += [answer.choices[0].message, {"role": "user", "content": "And then?"}]
    again = client.chat.completions.create(model=TINY, messages=asked, max_tokens=8)
    assert again.choices[0].message.role == "assistant"
    whole: Any = [each if isinstance(each, dict) else each.model_dump() for each in asked]
    client.chat.completions.create(model=TINY, messages=whole, max_tokens=8)


def test_a_message_may_be_a_list_of_texts_and_carry_a_type(server: Running) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    answers = [
        server.post("/v1/chat/completions", CHAT | asked).json()["choices"][0]["message"]
        for asked in (user("Hi"), user(parts), user("Hi", type="text"))
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "the body is not JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b"", "the body must be a JSON object"),
        (b'{"model": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "the body is not JSON"),
    ],
)
def test_bodies_that_are_no_objects_are_refused(
    server: Running, content: bytes, sentence: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_addresses_and_methods_that_there_are_not_get_the_standard_body(server: Running) -> None:
    unknown = httpx.get(f"{server.url}/v2/models")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "invalid_request_error"
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["Allow"] == "POST"
    assert "other methods" in wrong.json()["error"]["message"]


def test_the_client_raises_its_own_error_with_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**CHAT, top_p=0.5)  # type: ignore[call-overload]
    assert (raised.value.param, raised.value.code) == ("top_p", "unsupported_field")
