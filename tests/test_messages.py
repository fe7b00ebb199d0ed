"""Chat messages: the forms that are read as text, and the sentence for all others."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from dmax.errors import InputError
from dmax.messages import read_messages

HI = {"role": "user", "content": "Hi"}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        ("", ""),
        ([{"type": "text", "text": "Hi"}], "Hi"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        (({"text": "ü☃", "type": "text"},), "ü☃"),
    ],
)
def test_a_content_is_a_text_or_a_list_of_text_parts(content: Any, text: str) -> None:
    assert read_messages([{"role": "user", "content": content}]) == [
        {"role": "user", "content": text}
    ]


def test_a_chat_keeps_its_order_and_is_left_alone() -> None:
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        MappingProxyType(HI),
        {"role": "assistant", "content": "Hello", "tool_calls": None},
    ]
    before = json.dumps([dict(message) for message in chat])
    assert [tuple(message.values()) for message in read_messages(tuple(chat))] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
    ]
    assert json.dumps([dict(message) for message in chat]) == before


@pytest.mark.parametrize(
    "chat", [None, 3, "Hi", b"Hi", HI, {}, iter([HI]), {HI["role"]}, float("nan")]
)
def test_what_is_no_list_is_refused(chat: Any) -> None:
    with pytest.raises(InputError, match="chat messages must be a list, got "):
        read_messages(chat)


def test_an_empty_chat_is_refused() -> None:
    with pytest.raises(InputError, match="at least one message"):
        read_messages([])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (None, "message 2 must be a mapping"),
        ("Hi", "message 2 must be a mapping"),
        (["user", "Hi"], "message 2 must be a mapping"),
        ({}, "role of message 2 must be system, user or assistant, got None"),
        ({"content": "Hi"}, "role of message 2 must be"),
        ({"role": None, "content": "Hi"}, "role of message 2 must be"),
        ({"role": ["user"], "content": "Hi"}, "role of message 2 must be"),
        ({"role": "tool", "content": "Hi"}, "role of message 2 must be"),
        ({"role": "User", "content": "Hi"}, "got 'User'\n\nhint: did you mean `user`"),
        ({"role": "assistent", "content": "Hi"}, "did you mean `assistant`"),
        ({"role": "user"}, "content of message 2 must be a text or a list of text parts, got None"),
        ({"role": "user", "content": None}, "content of message 2 must be"),
        ({"role": "user", "content": 12}, "content of message 2 must be"),
        ({"role": "user", "content": True}, "content of message 2 must be"),
        ({"role": "user", "content": b"Hi"}, "content of message 2 must be"),
        ({"role": "user", "content": []}, "content of message 2 must be"),
        ({"role": "user", "content": {"type": "text", "text": "Hi"}}, "content of message 2"),
        ({"role": "user", "content": "\ud800"}, "message 2 holds half of a surrogate pair"),
        ({"role": "user", "content": [{"type": "text", "text": "\udc00"}]}, "half of a surrogate"),
        ({"role": "user", "content": ["Hi"]}, "message 2 has a part that is not text, 'Hi'"),
        ({"role": "user", "content": [None]}, "message 2 has a part that is not text"),
        ({"role": "user", "content": [{"type": "text"}]}, "part that is not text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "part that is not text"),
        ({"role": "user", "content": [{"text": "Hi"}]}, "part that is not text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            "part that is not text",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]},
            "a part of message 2 takes `text` and `type` only, got 'cache'",
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{}]},
            "message 2 takes `content` and `role` only, got 'tool_calls'",
        ),
        ({"role": "user", "content": "a", 3: 4}, "got 3"),
        ({"role": "user", "content": nested(5000)}, "part that is not text"),
        (nested(5000), "message 2 must be a mapping"),
    ],
)
def test_what_is_no_message_is_named_by_its_place(message: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        read_messages([HI, message])
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "x" * 10**6,
        {"role": "x" * 10**6, "content": "a"},
        {"role": "user", "content": ["x" * 10**6]},
        {"role": "user", "content": "a", "x" * 10**6: 1},
    ],
)
def test_what_was_given_is_quoted_in_short(message: Any) -> None:
    with pytest.raises(InputError) as caught:
        read_messages([message])
    assert len(str(caught.value)) < 500
