"""Records of every shape are read, and what is wrong with one is said with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmax.errors import InputError
from dmax.records.readers import Conversation, Prompt, get_reader, read_conversation, read_prompt
from dmax.records.sources import Source, read_prompts, records_of

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}
THOUGHTS = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "r"}]


def read(path: Path) -> list[Conversation]:
    return [read_conversation(record, where) for where, record in records_of(Source(str(path)))]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "q", "response": "r"}, [QUESTION]),
        ({"prompt": [SYSTEM, QUESTION], "response": "r"}, [SYSTEM, QUESTION]),
        ({"prompt": "q", "completion": "r", "messages": None}, [QUESTION]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, [QUESTION]),
        ({"question": "q", "answer": "r"}, [QUESTION]),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "source": "a"}, [SYSTEM, QUESTION]),
        (  # AI-MO/NuminaMath-CoT
            {"source": "aops", "problem": "q", "solution": "r", "messages": [QUESTION, ANSWER]},
            [QUESTION],
        ),
        ({"system": "s", "conversations": THOUGHTS}, [SYSTEM, QUESTION]),  # OpenThoughts-114k
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
            [QUESTION],
        ),
        (  # nvidia/OpenCodeInstruct
            {"id": "1", "input": "q", "output": "r", "unit_tests": "[]", "domain": "generic"},
            [QUESTION],
        ),
    ],
)
def test_records_of_every_shape_teach_and_ask_the_same(record: dict[str, Any], prompt: Any) -> None:
    assert read_conversation(record, "here") == Conversation(prompt, "r", "here")
    asked = "q" if prompt == [QUESTION] else prompt
    assert read_prompt(record, "here").prompt == asked


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q"}, Prompt("q", None, "here")),
        ({"question": "q", "answer": "#### 3"}, Prompt("q", "#### 3", "here")),
        ({"prompt": "q", "completion": "r"}, Prompt("q", "r", "here")),
        ({"problem": "q"}, Prompt("q", None, "here")),
        ({"messages": [SYSTEM, QUESTION]}, Prompt([SYSTEM, QUESTION], None, "here")),
        (  # examples before the question belong to it
            {"messages": [QUESTION, ANSWER, QUESTION]},
            Prompt([QUESTION, ANSWER, QUESTION], None, "here"),
        ),
        (  # of a chat that was answered, the first question is asked
            {"system": "s", "conversations": [*THOUGHTS, *THOUGHTS]},
            Prompt([SYSTEM, QUESTION], "r", "here"),
        ),
    ],
)
def test_a_prompt_needs_no_response(record: dict[str, Any], expected: Prompt) -> None:
    assert read_prompt(record, "here") == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "q", "label": 1}, Prompt("q", None, "here")),
        ({"text": "q", "prompt": "p", "response": "r"}, Prompt("q", None, "here")),
        ({"text": [QUESTION]}, Prompt("q", None, "here")),
        ({"text": [SYSTEM, QUESTION, ANSWER]}, Prompt([SYSTEM, QUESTION], "r", "here")),
    ],
)
def test_a_named_column_holds_texts_or_chats(record: dict[str, Any], expected: Prompt) -> None:
    assert read_prompt(record, "here", get_reader(None, {"prompt": "text"})) == expected


def test_a_named_column_may_be_the_usual_one() -> None:
    named = get_reader(None, {"prompt": "prompt"})
    assert read_prompt({"prompt": "q"}, "here", named) == Prompt("q", None, "here")
    assert read_prompt({"prompt": [QUESTION]}, "here", named) == Prompt("q", None, "here")
    with pytest.raises(InputError, match="here: no prompt: `prompt` is blank"):
        read_prompt({"prompt": " "}, "here", named)
    with pytest.raises(InputError, match="here: the last of `prompt` must be the assistant's"):
        read_conversation({"prompt": "q"}, "here", named)


def test_a_chat_that_was_written_as_one_text_is_no_prompt() -> None:
    with pytest.raises(InputError, match="here: chat messages must be a list"):
        read_prompt({"messages": json.dumps([QUESTION])}, "here")


def test_columns_that_fit_two_readers_take_a_name() -> None:
    record = {"prompt": "q", "response": "r", "completion": "c"}
    with pytest.raises(
        InputError, match="here: the columns fit the readers prompt_response and prompt_completion"
    ):
        read_conversation(record, "here")
    named = read_conversation(record, "here", get_reader("prompt_completion"))
    assert named.response == "c"
    chosen = read_conversation(record, "here", get_reader(None, {"prompt": "completion"} | NAMED))
    assert (chosen.messages[0]["content"], chosen.response) == ("c", "r")


NAMED = {"response": "response"}


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("numinas", None, "`reader` must be one of numina"),
        ("numina", {"prompt": "a"}, "`reader` and `columns` exclude each other"),
        (None, {"response": "a"}, "`columns` names the column of `prompt`"),
        (None, {"prompt": "a", "answer": "b"}, "`columns` names the column of `prompt`"),
    ],
)
def test_a_reader_that_does_not_exist(name: Any, columns: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_reader(name, columns)


def test_a_named_reader_finds_its_columns_or_says_so() -> None:
    record = {"prompt": "q", "response": "r"}
    with pytest.raises(InputError, match="here: no prompt: `problem` is missing"):
        read_conversation(record, "here", get_reader("numina"))
    with pytest.raises(InputError, match="here: a record without a response: `solution` is None"):
        read_conversation({"problem": "q"}, "here", get_reader("numina"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("nonsense\n", r"data.jsonl:1: not a JSON object"),
        (
            '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
            r"data.jsonl:2: a record without a response",
        ),
        ('{"response": "b"}\n', r"data.jsonl:1: no prompt"),
        ("[1]\n", r"data.jsonl:1: expected a JSON object"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            r"data.jsonl:1: the last of `messages`",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}\n',
            r"data.jsonl:1: .* and others before it",
        ),
        ('{"messages": []}\n', r"data.jsonl:1: a chat needs at least one message"),
        ('{"messages": "text"}\n', r"data.jsonl:1: chat messages must be a list"),
        ('{"messages": ["a", "b"]}\n', r"data.jsonl:1: message 1 must be a mapping"),
        ('{"messages": null}\n', r"data.jsonl:1: no prompt"),
        (
            '{"messages": [{"role": "human", "content": "a"}]}\n',
            r"data.jsonl:1: the role of message 1 must be system, user or assistant, got 'human'",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
            r"data.jsonl:1: message 1 has a part that is not text",
        ),
        ('{"prompt": "a", "response": ""}\n', r"data.jsonl:1: a record without a response"),
        ('{"prompt": "a", "response": 3}\n', r"data.jsonl:1: a record without a response"),
        ('{"prompt": ["a"], "response": "b"}\n', r"data.jsonl:1: message 1 must be a mapping"),
        ('{"prompt": null, "response": "b"}\n', r"data.jsonl:1: no prompt"),
        ('{"question": "a"}\n', r"data.jsonl:1: a record without a response"),
        ('{"prompt": "a", "completion": []}\n', r"data.jsonl:1: a record without a response"),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}\n',
            r"data.jsonl:1: the content of message 1 must be a text",
        ),
        (
            '{"prompt": "\\ud800", "response": "b"}\n',
            r"data.jsonl:1: message 1 holds half of a surrogate pair",
        ),
        ("[" * 100_000 + "\n", r"data.jsonl:1: not a JSON object"),
        (
            '{"system": "Be kind.", "prompt": "a", "response": "b"}\n',
            r"data.jsonl:1: `system` beside the chat would not be learnt",
        ),
        (
            '{"conversations": [{"from": "tool", "value": "a"}]}\n',
            r"data.jsonl:1: the role of message 1 must be .*, got 'tool'",
        ),
    ],
)
def test_bad_data_names_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message) as raised:
        read(path)
    assert raised.value.message.count("data.jsonl") == 1


def test_text_that_is_not_utf_8_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "caf\xe9", "response": "b"}\n')
    with pytest.raises(InputError, match=r"data.jsonl:2: not UTF-8 text") as raised:
        read(path)
    assert "iconv" in str(raised.value)


def test_one_file_may_hold_several_shapes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    records = ({"prompt": "q", "response": "r"}, {"question": "q", "answer": "r"})
    lines = [*map(json.dumps, records), "", json.dumps({"messages": [QUESTION, ANSWER]})]
    path.write_text("\n".join(lines) + "\n\n")
    assert read(path) == [Conversation([QUESTION], "r", f"{path}:{line}") for line in (1, 2, 4)]


def test_text_parts_are_learnt_as_their_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    parts = [{"type": "text", "text": "Tom has "}, {"type": "text", "text": "3."}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    path.write_text(json.dumps({"messages": chat}) + "\n")
    [record] = read(path)
    assert record.messages == [{"role": "user", "content": "Tom has 3."}]
    assert record.response == "3."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "data.jsonl` holds no record"),
        ('{"answer": "a"}\n', "data.jsonl:1: no prompt"),
        ('{"prompt": " "}\n', "data.jsonl:1: no prompt: `prompt` is blank"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "data.jsonl:1: no prompt"),
        ('{"prompt": "a", "question": "b"}\n', "data.jsonl:1: the columns fit the readers"),
    ],
)
def test_bad_prompts_name_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message):
        list(read_prompts(path))
