"""`dmax chat` without a terminal: each line of a pipe is a turn, whatever goes wrong with it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_server import Server

from dmax import LLM, cli
from dmax.chat.loop import EXAMPLE
from dmax.trace import Trace

SPOKEN = {"role": "user", "content": EXAMPLE}
SMALL = ("--device", "cpu", "--dtype", "float32")


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


Chat = Callable[..., Result]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Runs `dmax chat WORDS` with lines on stdin, in this process."""

    def run(lines: list[str], *words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["dmax", "chat", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", device="cpu", dtype="float32", max_batch_size=1)


def test_each_line_is_a_turn_of_one_conversation(chat: Chat, llm: LLM) -> None:
    result = chat([EXAMPLE, "", "And now?"], *SMALL)
    [first] = llm.generate([[SPOKEN]])
    answered = {"role": "assistant", "content": first.text}
    [second] = llm.generate([[SPOKEN, answered, {"role": "user", "content": "And now?"}]])
    assert result.code == 0
    assert result.out == f"{first.text}\n{second.text}\n"
    assert "62 tokens, 6 forwards, TPF 10.33, " in result.err
    assert "\x1b" not in result.out + result.err


def test_nothing_is_asked_at_the_end_of_an_empty_pipe(chat: Chat) -> None:
    result = chat([], *SMALL)
    assert (result.code, result.out) == (0, "")


def test_commands_work_and_bad_ones_say_what_is_wrong(chat: Chat, tmp_path: Path) -> None:
    bad = {
        "/nope": "there is no command `/nope`",
        "/threshold much": "`/threshold` takes a number between 0 and 1, or auto, got 'much'",
        "/threshold 7": "`threshold` must be a number between 0 and 1, got 7.0",
        "/strategy spdd": "unknown strategy 'spdd'",
        "/strategy spd top=": "",
        "/model tiny-nothing": "`tiny-nothing` is neither bundled",
        "/retry": "nothing was asked yet; type a question first",
        "/trace": "there is no finished answer to trace",
        "/trace ~nobody-there/x.html": "there is no finished answer to trace",
        "/clear it": "`/clear` takes nothing behind it, got 'it'",
        "mugs " * 2000: "the question: the text has 2010 tokens, there is room for 1024",
    }
    result = chat([*bad, EXAMPLE], *SMALL)
    assert result.code == 0
    assert [said for said in bad.values() if said not in result.err] == []
    assert result.err.count("error: ") == len(bad)
    assert result.out.endswith("#### 10\n")


def test_settings_change_how_the_next_answer_is_decoded(chat: Chat) -> None:
    lines = [
        EXAMPLE,
        "/model tiny-base",
        "/retry",
        "/threshold 0.3",
        "/retry",
        "/strategy autoregressive",
        "/retry",
        "/threshold auto",
        "/strategy auto",
        "/model",
    ]
    result = chat(lines, *SMALL)
    told = [line for line in result.err.splitlines() if line.startswith("tiny-")]
    assert told == [
        "tiny-base, strategy threshold, threshold 0.95",
        "tiny-base, strategy threshold, threshold 0.3",
        "tiny-base, strategy autoregressive",
        "tiny-base, strategy autoregressive",
        "tiny-base, strategy threshold, threshold 0.95",
        "tiny-base, strategy threshold, threshold 0.95",
    ]
    costs = [line for line in result.err.splitlines() if "TPF" in line]
    tpf = [float(line.split("TPF ")[1].split(",")[0]) for line in costs]
    assert tpf[2] > tpf[1] > tpf[3]


def test_retry_and_clear_and_system_decide_what_is_sent(chat: Chat) -> None:
    with Server() as server:
        lines = ["one", "/retry", "two", "/system Be brief.", "three", "/clear", "four"]
        lines += ["/system off", "/clear", "five", "/system"]
        result = chat(lines, "--url", server.url)
        assert result.code == 0
        sent = [[each["content"] for each in body["messages"]] for body in server.bodies]
    assert sent == [
        ["one"],
        ["one"],
        ["one", "answer to one", "two"],
        ["Be brief.", "one", "answer to one", "two", "answer to two", "three"],
        ["Be brief.", "four"],
        ["five"],
    ]
    assert result.err.count("system message: Be brief.") == 1
    assert result.err.count("no system message") == 2


def test_the_oldest_turns_are_left_out_once_they_do_not_fit(chat: Chat) -> None:
    result = chat(["mugs " * 300] * 5, *SMALL, "--max-new-tokens", "32")
    assert result.code == 0
    assert result.err.count("the oldest turn no longer fits the context and is left out") == 1
    assert result.err.count("the 2 oldest turns no longer fit the context and are left out") == 1
    assert result.err.count(" tokens, ") == 5


def test_a_server_may_find_that_turns_do_not_fit(chat: Chat) -> None:
    def fault(prompt: str, times: int) -> str | None:
        return "400" if prompt == "three" and times <= 2 else None

    with Server(fault=fault) as server:
        result = chat(["one", "two", "three"], "--url", server.url, "--system", "Be brief.")
        sent = [each["content"] for each in server.bodies[-1]["messages"]]
    assert sent == ["Be brief.", "three"]
    assert "the 2 oldest turns no longer fit the context and are left out" in result.err


def test_a_server_that_fails_is_one_sentence_and_the_chat_goes_on(chat: Chat) -> None:
    faults = ("401", "429", "500", "dropped", "torn", "a page")
    with Server(fault=lambda prompt, times: prompt if prompt in faults else None) as server:
        result = chat([*faults, "fine", "/retry"], "--url", server.url)
        last = [each["content"] for each in server.bodies[-1]["messages"]]
    assert result.code == 0
    assert result.err.count("error: ") == len(faults)
    assert result.err.count("what had settled is kept, and /retry asks again") == 1  # torn
    assert last == ["torn", "answer to ", "fine"]  # what settled is kept, nothing else
    assert result.out.endswith("answer to fine\nanswer to fine\n")


def test_the_last_answer_is_written_down(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.html").write_text("mine")
    lines = [
        EXAMPLE,
        "/trace",
        "/trace",
        "/trace raw.json",
        "/trace notes.html",
        "/trace no/x.html",
    ]
    result = chat(lines, *SMALL)
    assert result.err.count("error: ") == 1
    assert "notes.html exists and is no trace, so it is not replaced" in result.err
    assert Path("notes.html").read_text() == "mine"
    assert "dmax-trace" in Path("trace.html").read_text(encoding="utf-8")
    assert Trace.load("raw.json").output["text"] == result.out.removesuffix("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url", "nowhere"), "`--url` must be an address, got 'nowhere'"),
        (("--url", "http://127.0.0.1:9/v1"), "cannot reach http://127.0.0.1:9/v1"),
        (("--url", "http://x", "--device", "cpu"), "`--device` does not go with --url"),
        (("--api-key-env", "KEY"), "`--api-key-env` goes with --url only"),
        (("--url", "http://x", "--api-key-env", "NO_SUCH"), "no key in the environment variable"),
        (("--model", "tiny-nothing"), "`tiny-nothing` is neither bundled"),
        (("--strategy", "spdd"), "unknown strategy 'spdd'"),
        (("--threshold", "2"), "`threshold` must be a number between 0 and 1"),
        (("--strategy", "demask"), "head"),
    ],
)
def test_what_no_chat_can_begin_with(chat: Chat, words: tuple[str, ...], message: str) -> None:
    result = chat(["hi"], *words)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
