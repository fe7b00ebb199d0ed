"""How an answer appears: what settles stays, drafts are gone, and nothing is obeyed."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dmax.chat.drafts import Drafts, Piece
from dmax.chat.screen import LiveScreen, PlainScreen, drafted, open_screen, shade
from dmax.cli.marks import ASCII_SIGNS, SIGNS, visible
from dmax.trace.frames import Frame

pyte = pytest.importorskip("pyte")

EOS = (9,)


class Window(io.StringIO):
    """A stream that says it is a terminal; a real one would make new lines of "\\n"."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(width, height, history=5000)
        self._stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return super().write(text)

    def lines(self) -> list[str]:
        above = [
            "".join(line[column].data for column in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return [line.rstrip() for line in [*above, *self.screen.display]]


def console_of(file: Any, width: int = 40, height: int = 10, **options: Any) -> Console:
    return Console(file=file, width=width, height=height, force_terminal=True, **options)


def frame(
    *tokens: int | None, texts: dict[int, str], position: int = 0, kind: Any = "provisional"
) -> Frame:
    ids = [0 if token is None else token for token in tokens]
    return Frame(
        kind=kind,
        position=position,
        step=1,
        num_forwards=1,
        seconds=0.0,
        token_ids=ids,
        texts=["" if token is None else texts.get(token, "") for token in tokens],
        masked=[token is None for token in tokens],
        confidence=[0.5] * len(tokens),
        written=[token is not None for token in tokens],
        candidates=[],
        forced=False,
        capped=False,
    )


# --- drafts ---------------------------------------------------------------------------------------

TEXTS = {1: "one", 2: " two", 3: " three", 4: "\x1b[2J"}


def shown(drafts: Drafts) -> str:
    return drafted(drafts.pieces(), SIGNS).plain


def test_drafts_show_masks_and_revisions() -> None:
    drafts = Drafts(limit=32)
    drafts.take(frame(1, 2, None, None, texts=TEXTS), EOS)
    assert shown(drafts) == "one two · ·"
    drafts.take(frame(1, 3, 3, None, texts=TEXTS), EOS)
    assert shown(drafts) == "one ~three three ·"
    assert [piece.is_new for piece in drafts.pieces()] == [False, True, False, False]
    drafts.take(frame(1, 3, 3, 2, texts=TEXTS), EOS)
    assert shown(drafts) == "one ~three three two"
    assert not any(piece.is_new for piece in drafts.pieces())
    drafts.take(frame(1, 3, 3, 2, texts=TEXTS, kind="committed"), EOS)
    assert shown(drafts) == ""


def test_drafts_end_where_the_answer_does() -> None:
    drafts = Drafts(limit=6)
    drafts.take(frame(1, 9, 2, None, texts=TEXTS), EOS)
    assert shown(drafts) == "one"
    drafts.take(frame(1, None, 9, 2, texts=TEXTS), EOS)
    assert shown(drafts) == "one ·"
    drafts.take(frame(1, 2, 3, 2, texts=TEXTS, position=4), EOS)
    assert shown(drafts) == "one ·one two"  # two blocks are open; the limit cuts the second


def test_special_tokens_and_control_characters_are_not_shown() -> None:
    drafts = Drafts(limit=32)
    drafts.take(frame(1, 7, 4, texts=TEXTS), EOS)
    assert shown(drafts) == "one?[2J"


def test_the_surer_the_bolder() -> None:
    assert [shade(each).split()[0] for each in (0.2, 0.49, 0.95)] == ["dim", "dim", "bold"]
    assert shade(0.6) == "bright_blue"
    text = drafted([Piece(" a", 0.1), Piece(" b", 0.99)], SIGNS)
    assert [str(span.style) for span in text.spans] == ["dim bright_blue", "bold bright_blue"]


def test_signs_are_ascii_where_nothing_else_is_shown() -> None:
    pieces = [Piece(), Piece(" two", 0.5, is_revised=True)]
    assert drafted(pieces, ASCII_SIGNS).plain == " _ ~two"


# --- screens --------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("ab  \n日.-"), max_size=30)
PIECES = st.lists(st.builds(Piece, st.sampled_from(["", " word", "\n", "x" * 50])), max_size=40)


@given(
    parts=st.lists(st.tuples(WORDS, PIECES), max_size=12),
    width=st.integers(3, 30),
    height=st.integers(2, 12),
)
def test_what_has_settled_is_left_and_nothing_else(
    parts: list[tuple[str, list[Piece]]], width: int, height: int
) -> None:
    """Whatever was drawn in between, and however small the terminal is."""
    window = Window(width, height)
    text = "".join(settled for settled, _ in parts)
    with LiveScreen(console_of(window, width, height)) as screen:
        for settled, pieces in parts:
            screen.show(settled, pieces)
    left = "".join(window.lines())
    assert re.sub(r"\s", "", left) == re.sub(r"\s", "", text)
    if text.strip():
        assert window.screen.cursor.x == 0
    assert not window.screen.cursor.hidden


def test_an_answer_longer_than_the_screen_scrolls_away_line_by_line() -> None:
    words = [f"word{number}" for number in range(400)]
    window = Window(24, 6)
    with LiveScreen(console_of(window, 24, 6)) as screen:
        for word in words:
            screen.show(f"{word} ", [Piece(" draft", 0.5)] * 20)
            assert len("\n".join(window.screen.display).strip().splitlines()) <= 6
    lines = [line for line in window.lines() if line]
    assert " ".join(lines).split() == words  # in order, none twice, none broken
    assert max(map(len, lines)) <= 24


def test_drafts_stand_behind_what_has_settled() -> None:
    window = Window(30, 8)
    with LiveScreen(console_of(window, 30, 8)) as screen:
        screen.show("First we see", [Piece(" that", 0.9), Piece(), Piece()])
        assert window.lines()[0] == "First we see that · ·"
        screen.show(" that 4", [])
        assert window.lines()[0] == "First we see that 4"
        assert window.screen.cursor.hidden


@pytest.mark.parametrize("width", [10, 20, 40])
def test_a_narrower_window_keeps_no_old_drafts(width: int) -> None:
    window = Window(60, 12)
    console = Console(file=window, force_terminal=True)
    console._width, console._height = 60, 12
    with LiveScreen(console) as screen:
        screen.show("Settled. ", [Piece(" draft", 0.5)] * 9)
        window.screen.resize(12, width)
        console._width = width
        screen.show("", [Piece(" later", 0.5)] * 9)
        assert "draft" not in "".join(window.lines())
        screen.show("The end.", [])
    assert " ".join(" ".join(window.lines()).split()) == "Settled. The end."


def test_a_model_cannot_move_the_cursor() -> None:
    hostile = "a\x1b[2J\x07\x9b1mb\u202ec\rd\te\x00\u2028f"
    for kind in (LiveScreen, PlainScreen):
        window = Window(60, 5)
        with kind(console_of(window, 60, 5)) as screen:
            screen.show(hostile, [Piece(hostile)])
        assert "a?[2J??1mb?c?d    e??f" in window.lines()
    assert visible("one\r\ntwo 👩\u200d🚀") == "one\ntwo 👩\u200d🚀"


@pytest.mark.parametrize(
    ("environment", "is_terminal"),
    [({"TERM": "dumb"}, True), ({"NO_COLOR": "1"}, True), ({}, False)],
)
def test_where_nothing_can_move_there_is_settled_text_only(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Window(40, 5) if is_terminal else io.StringIO()
    assert isinstance(open_screen(console_of(file)), LiveScreen) == is_terminal
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open_screen(console_of(file)) as screen:
        screen.show("Settled", [Piece(" draft", 0.5)])
        screen.show(" text.", [])
        screen.show("", [])
    assert file.getvalue() == "Settled text.\n"
