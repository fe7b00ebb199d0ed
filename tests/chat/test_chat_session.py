"""What a conversation keeps and sends, and what its commands ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmax import DecodingParams, InputError
from dmax.chat.commands import COMMANDS, Command, is_command, parse, with_strategy, with_threshold
from dmax.chat.session import Session

PARAMS = DecodingParams()


def talked(num_turns: int, system: str | None = None) -> Session:
    session = Session(system)
    for number in range(num_turns):
        session.asked = f"question {number}"
        session.answer(f"answer {number}")
    return session


def contents(session: Session) -> list[str]:
    return [message["content"] for message in session.messages()]


def test_everything_is_sent_while_it_fits() -> None:
    session = talked(1, "Be brief.")
    session.asked = "and now?"
    assert session.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "question 0"},
        {"role": "assistant", "content": "answer 0"},
        {"role": "user", "content": "and now?"},
    ]


@given(num_turns=st.integers(0, 6), num_dropped=st.integers(0, 9))
def test_whole_oldest_turns_are_left_out_and_the_system_message_stays(
    num_turns: int, num_dropped: int
) -> None:
    session = talked(num_turns, "Be brief.")
    session.asked = "and now?"
    for number in range(num_dropped):
        assert session.leave_out() == (number < num_turns)
    left = range(min(num_dropped, num_turns), num_turns)
    turns = [text for number in left for text in (f"question {number}", f"answer {number}")]
    assert contents(session) == ["Be brief.", *turns, "and now?"]
    session.include_all()
    assert len(session.messages()) == 2 + 2 * num_turns


def test_an_answer_is_taken_back_once() -> None:
    session = talked(2)
    session.leave_out()
    session.leave_out()
    session.take_back()
    assert contents(session) == ["question 1"]  # the other turn is left out
    session.include_all()
    session.take_back()  # it has no answer now
    assert contents(session) == ["question 0", "answer 0", "question 1"]


def test_there_is_nothing_to_take_back_at_first_and_after_clear() -> None:
    session = Session("Be brief.")
    with pytest.raises(InputError, match="nothing was asked yet"):
        session.take_back()
    session = talked(2, "Be brief.")
    session.clear()
    assert contents(session) == ["Be brief."]
    with pytest.raises(InputError, match="nothing was asked yet"):
        session.take_back()


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/help", Command("help", "")),
        ("/HELP  ", Command("help", "")),
        ("/?", Command("help", "")),
        ("/exit", Command("quit", "")),
        ("/model  tiny-base ", Command("model", "tiny-base")),
        ("/system Say a b  c.", Command("system", "Say a b  c.")),
        ("/system two\nlines", Command("system", "two\nlines")),
    ],
)
def test_commands_are_read(line: str, expected: Command) -> None:
    assert is_command(line)
    assert parse(line) == expected


@pytest.mark.parametrize("line", [" /help", "1/2", "", "what is /help?"])
def test_what_does_not_begin_with_a_slash_is_a_question(line: str) -> None:
    assert not is_command(line)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/hlep", "there is no command `/hlep`", "did you mean `/help`?"),
        ("/", "there is no command `/`", "/help lists them"),
        ("/\x1b[2J", r"there is no command `/\\x1b\[2J`", "/help lists them"),
        ("/clear all", "`/clear` takes nothing behind it, got 'all'", None),
    ],
)
def test_a_wrong_command_is_one_sentence(line: str, message: str, hint: str | None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(line)
    assert hint is None or hint in str(caught.value.hint)
    assert caught.value.message.isprintable()


@given(st.text())
def test_any_line_is_a_command_or_an_error(text: str) -> None:
    try:
        found = parse(f"/{text}").name
    except InputError as error:
        found = error.message
    assert found in COMMANDS or (found.isprintable() and "`/" in found)


def test_a_threshold_is_set_and_given_back() -> None:
    params = with_threshold(PARAMS, "0.25")
    assert params.threshold == 0.25
    assert with_threshold(params, "auto").threshold is None
    for text in ("1.5", "-1", "nan", "half", "0.5 0.6", "9" * 5000):
        with pytest.raises(InputError, match="threshold` (takes|must be) a number between 0 and 1"):
            with_threshold(PARAMS, text)


def test_another_strategy_begins_with_its_own_threshold_and_options() -> None:
    before = DecodingParams("spd", threshold=0.2, options={"soft_inputs": False})
    params = with_strategy(before, "credit alpha=0.7")
    assert (params.strategy, params.threshold) == ("credit", None)
    assert params.options == (("alpha", 0.7),)
    with pytest.raises(InputError, match="must be NAME=VALUE, got 'alpha'"):
        with_strategy(before, "credit alpha")
