"""`dmax chat` in a terminal: typing, Ctrl-C, narrow windows, and terminals that cannot move."""

from __future__ import annotations

import pytest

pytest.importorskip("pyte")

from fake_server import Server
from terminals import Terminal

from dmax.chat.loop import EXAMPLE

SMALL = ("chat", "--device", "cpu", "--dtype", "float32")
ENTER = "\r"
CTRL_D = "\x04"
ANSWER = (
    "First we see that 4 - 3 is 1 mugs. Then adding 3 to the 1 mugs leaves her with 4 mugs. Next "
    "we see that 4 x 3 is 12 mugs. Then adding 3 to the 12 mugs leaves her with 15 mugs. Next we "
    "see that 15 - 5 is 10 mugs. #### 10"
)


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_conversation_in_a_terminal() -> None:
    with Terminal(*SMALL, "--pace", "0.05", width=72) as terminal:
        first = terminal.until_prompt()
        assert "tiny-dmax, strategy spd, threshold 0.5" in first
        assert f"such as: {EXAMPLE}" in words(first)

        terminal.type(f"{EXAMPLE}{ENTER}")
        terminal.until("·")  # a draft
        terminal.until("TPF 10.33")
        shown = terminal.until_prompt()
        assert ANSWER in words(shown)
        assert "·" not in shown

        terminal.type(f"/threshold 3{ENTER}")
        terminal.until("`threshold` must be a number between 0 and 1, got 3.0")
        terminal.type(f"/help{ENTER}")
        terminal.until("/strategy [NAME [OPTION=VALUE …]]")
        terminal.type(f'"""one{ENTER}two"""{ENTER}')
        terminal.until("forwards, TPF", times=2)
        terminal.until_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert not terminal.screen.cursor.hidden


def test_history_comes_back_with_the_arrow() -> None:
    readline = pytest.importorskip("readline")
    assert readline
    with Terminal(*SMALL) as terminal:
        terminal.until_prompt()
        terminal.type(f"/threshold 0.25{ENTER}")
        terminal.until("threshold 0.25", times=2)
        terminal.type(f"\x1b[A{ENTER}")
        terminal.until("threshold 0.25", times=4)
        terminal.type(f"/quit{ENTER}")
        assert terminal.end() == 0


def test_several_lines_that_are_pasted_are_one_question() -> None:
    with Server() as server, Terminal("chat", "--url", server.url) as terminal:
        terminal.until_prompt()
        terminal.until_written(b"\x1b[?2004h")  # the terminal is to mark what is pasted
        terminal.type("\x1b[200~one\ntwo\x1b[201~")
        terminal.until("two")
        terminal.type(ENTER)
        terminal.until("answer to one")
        terminal.until_prompt()
        assert [body["messages"][-1]["content"] for body in server.bodies] == ["one\ntwo"]


def test_ctrl_c_ends_an_answer_and_keeps_the_chat() -> None:
    with Terminal(*SMALL, "--pace", "10") as terminal:
        terminal.until_prompt()
        terminal.type(f"{EXAMPLE}{ENTER}")
        terminal.until("·")
        terminal.type("not shown")
        terminal.interrupt()
        terminal.until("ended; nothing had settled")
        shown = terminal.until_prompt()
        assert "·" not in shown
        assert "not shown" not in shown
        terminal.type(f"/threshold{ENTER}")
        terminal.until("strategy spd, threshold 0.5", times=2)
        terminal.type(f"/quit{ENTER}")
        assert terminal.end() == 0


def test_a_chat_that_is_told_to_end_leaves_the_terminal_whole() -> None:
    with Terminal(*SMALL, "--pace", "10") as terminal:
        terminal.until_prompt()
        terminal.type(f"{EXAMPLE}{ENTER}")
        terminal.until("·")
        assert terminal.screen.cursor.hidden
        assert not terminal.echoes()
        terminal.terminate()
        assert terminal.end() == 143
        assert not terminal.screen.cursor.hidden
        assert terminal.echoes()


def test_what_had_settled_is_kept_when_an_answer_is_ended() -> None:
    with (
        Server(fault=lambda prompt, times: "hanging" if prompt == "one two" else None) as server,
        Terminal("chat", "--url", server.url) as terminal,
    ):
        terminal.until_prompt()
        terminal.type(f"one two{ENTER}")
        terminal.until("answer")
        terminal.interrupt()
        terminal.until("ended; what had settled is kept")
        terminal.until_prompt()
        terminal.type(f"three{ENTER}")
        terminal.until("answer to three")
        sent = [each["content"] for each in server.bodies[-1]["messages"]]
        assert sent == ["one two", "answer to ", "three"]


def test_ctrl_c_at_an_empty_prompt_ends_the_chat_the_second_time() -> None:
    with Terminal(*SMALL) as terminal:
        terminal.until_prompt()
        terminal.interrupt()
        terminal.until("Ctrl-C once more or Ctrl-D ends the chat")
        terminal.type("half a question")
        terminal.until("half a question")
        terminal.interrupt()  # drops the line
        terminal.until_prompt()
        terminal.interrupt()
        terminal.until("Ctrl-C once more or Ctrl-D ends the chat", times=2)
        terminal.interrupt()
        assert terminal.end() == 0


def test_a_window_that_becomes_narrow_in_the_middle_of_an_answer() -> None:
    with Terminal(*SMALL, "--pace", "0.2", width=72, height=30) as terminal:
        terminal.until_prompt()
        terminal.type(f"{EXAMPLE}{ENTER}")
        terminal.until("Then adding")
        terminal.resize(20, 30)
        terminal.until("TPF 10.33")
        shown = terminal.until_prompt()
        assert "·" not in shown
        answer = words(shown[shown.rindex("First we see") :])
        assert answer.startswith(ANSWER)
        terminal.type(f"/help{ENTER}")
        terminal.until_true(lambda shown: "Ctrl-D the chat." in words(shown), "help")
        assert terminal.text().count("First we see") == 1


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1", "TERM": "xterm"}])
def test_a_plain_terminal_gets_settled_text_only(environment: dict[str, str]) -> None:
    with Terminal(*SMALL, environment=environment) as terminal:
        terminal.until_prompt()
        terminal.type(f"{EXAMPLE}{ENTER}")
        terminal.until("TPF 10.33")
        before, _, answer = terminal.written.rpartition(b"at the end.")
        assert before
        assert words(answer.split(b"62 tokens")[0].decode()) == ANSWER
        assert b"\x1b" not in answer
        terminal.until_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
