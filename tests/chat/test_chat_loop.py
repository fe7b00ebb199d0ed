"""The chat with somebody who answers anything: no line ends it, and what is sent is a chat."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator
from contextlib import redirect_stderr, redirect_stdout
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmax import DecodingParams, InputError
from dmax.chat.commands import COMMANDS
from dmax.chat.loop import Chat, in_words
from dmax.chat.responder import Outcome, Part
from dmax.chat.session import DoesNotFit, Messages
from dmax.decoding import check_strategy
from dmax.messages import read_messages

ROOM = 60  # characters of all messages


class Echo:
    """Answers with the question, or in a way that the question names."""

    name = "echo"

    def __init__(self) -> None:
        self.sent: list[Messages] = []

    def describe(self, params: DecodingParams) -> str:
        return f"{self.name}, {params.strategy}, {params.threshold}"

    def check(self, params: DecodingParams) -> None:
        check_strategy(params)

    def use(self, name: str) -> None:
        if name == "none":
            raise InputError("there is no model none")
        self.name = name

    def answer(self, messages: Messages, params: DecodingParams) -> EchoAnswer:
        if sum(len(message["content"]) for message in messages) > ROOM:
            raise DoesNotFit("too long", "say less")
        self.sent.append(messages)
        return EchoAnswer(messages[-1]["content"])


class EchoAnswer:
    eos_token_ids: Collection[int] = ()
    outcome: Outcome | None = None
    is_closed = False

    def __init__(self, text: str) -> None:
        self._text = text

    def __iter__(self) -> Iterator[Part]:
        for word in self._text.split(" "):
            if word == "lost":
                raise InputError("the connection is lost", "try again")
            yield Part(f"{word} ")
        self.outcome = Outcome(0.5, "stop")

    def trace(self) -> dict[str, Any]:
        raise InputError("no forwards")

    def close(self) -> None:
        self.is_closed = True


def talk(lines: list[str], system: str | None = None) -> tuple[Echo, str, str]:
    """Who answered, and what stdout and stderr got."""
    responder = Echo()
    out, err = io.StringIO(), io.StringIO()
    with (
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        Chat(responder, DecodingParams(), system).run()
    return responder, out.getvalue(), err.getvalue()


TEXTS = st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=20)
LINES = st.one_of(
    st.sampled_from(["hello", "and now?", "lost", "a lost b", "/retry", "/clear", "x" * 70, " /a"]),
    st.builds("/{} {}".format, st.sampled_from([*COMMANDS, "nope"]), TEXTS),
    TEXTS,
)


@given(lines=st.lists(LINES, max_size=12), system=st.none() | TEXTS)
def test_no_line_ends_the_chat_and_what_is_sent_is_a_chat(
    lines: list[str], system: str | None
) -> None:
    responder, out, err = talk(lines, system)
    for messages in responder.sent:
        assert read_messages(messages) == messages
        assert sum(len(message["content"]) for message in messages) <= ROOM
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert [message["role"] for message in messages].count("system") <= 1
    assert "\x1b" not in out + err


def test_turns_are_left_out_for_good_until_another_model_answers() -> None:
    long = "x" * 20
    responder, _, err = talk([long, long, "/model other", "y"])
    assert [len(messages) for messages in responder.sent] == [1, 1, 3]
    assert responder.sent[2][0]["content"] == long
    assert err.count("the oldest turn no longer fits") == 2  # the first was tried again


def test_a_question_that_never_fits_leaves_nothing_out() -> None:
    responder, _, err = talk(["one", "z" * 100, "two"])
    assert err.count("error: too long; say less") == 1
    assert [message["content"] for message in responder.sent[-1]] == ["one", "one ", "two"]


def test_what_is_lost_midway_is_kept_and_can_be_asked_again() -> None:
    responder, out, err = talk(["a lost b", "/retry", "c"])
    assert err.count("error: the connection is lost; what had settled is kept") == 2
    assert out == "a \na \nc \n"
    assert [message["content"] for message in responder.sent[-1]] == ["a lost b", "a ", "c"]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome(0.5), "0.50 s"),
        (Outcome(1.25, "stop", 62, 6, 62 / 6), "62 tokens, 6 forwards, TPF 10.33, 1.25 s"),
        (Outcome(1.0, "length", 256), "256 tokens, 1.00 s, cut by --max-new-tokens"),
        (Outcome(1.0, "length", 100), "100 tokens, 1.00 s, cut where the context ends"),
        (Outcome(1.0, "length"), "1.00 s, cut by --max-new-tokens"),
    ],
)
def test_what_an_answer_cost_stands_on_one_line(outcome: Outcome, expected: str) -> None:
    assert in_words(outcome, 256) == expected
