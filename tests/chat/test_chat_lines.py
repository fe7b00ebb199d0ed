"""What is piped in: lines, texts of several lines, and what is no text."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator

import pytest

from dmax import InputError
from dmax.chat import lines
from dmax.chat.lines import Lines


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Lines]:
    def pipe(content: bytes) -> Lines:
        stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        return Lines()

    return pipe


def read_all(lines: Lines) -> Iterator[str]:
    while True:
        try:
            yield lines.read()
        except EOFError:
            return


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        ("one\ntwo\n", ["one", "two"]),
        ("no end", ["no end"]),
        ("\n\n", ["", ""]),
        ("dos\r\n", ["dos"]),
        ("one \\\ntwo\\\nthree\nfour\n", ["one \ntwo\nthree", "four"]),
        ("one\\", ["one"]),
        ('"""\none\n\ntwo\n"""\nthree\n', ["one\n\ntwo", "three"]),
        ('"""one\ntwo"""\n', ["one\ntwo"]),
        ('"""one"""\n', ["one"]),
        ('"""never ends\nat all', ["never ends\nat all"]),
        ('say """ here\n', ['say """ here']),
        (" /not a command\n", [" /not a command"]),
    ],
)
def test_lines_and_texts(
    piped: Callable[[bytes], Lines], content: str, expected: list[str]
) -> None:
    assert list(read_all(piped(content.encode()))) == expected


def test_a_line_that_is_no_text_does_not_end_the_others(piped: Callable[[bytes], Lines]) -> None:
    lines = piped(b"one\n\xff\xfe\ntwo\n")
    assert not lines.is_terminal
    assert lines.read() == "one"
    with pytest.raises(InputError, match="not UTF-8"):
        lines.read()
    assert lines.read() == "two"


@pytest.mark.parametrize("before", ["", '"""\n', "first \\\n"])
def test_a_line_longer_than_any_prompt_does_not_end_the_others(
    piped: Callable[[bytes], Lines], monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr(lines, "LONGEST_PROMPT", 20)
    found = piped(f"{before}{'x' * 100}\nshort\n".encode())
    with pytest.raises(InputError, match="at most 20 characters"):
        found.read()
    assert found.read() == "short"


def test_a_closed_stdin_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert list(read_all(Lines())) == []
