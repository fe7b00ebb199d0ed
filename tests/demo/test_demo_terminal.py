"""`dmax demo` in a real terminal: what its screen shows while it plays, and how it leaves it."""

from __future__ import annotations

import re

import pytest

from dmax.tiny.tokenizer import words

pytest.importorskip("pyte")

import pyte
from terminals import Terminal

PLAYS = b"\x1b[?1049h"  # the screen of its own begins
PLAYED = b"\x1b[?1049l"
TOLD = {"forward", "forwards", "s", "no", "valid", "answer", "is", "right", "wrong"}


def demo(width: int, height: int, replay: float) -> Terminal:
    constants = {"dmax.demo.NUM_PROBLEMS": 2, "dmax.demo.REPLAY_SECONDS": replay}
    return Terminal("demo", width=width, height=height, constants=constants)


def screen_after(written: bytes, width: int, height: int) -> pyte.Screen:
    screen = pyte.Screen(width, height)
    pyte.ByteStream(screen).feed(written)
    return screen


@pytest.mark.parametrize(("width", "height"), [(120, 32), (80, 24)])
def test_the_demo_in_a_terminal(width: int, height: int) -> None:
    with demo(width, height, replay=1.0) as terminal:
        assert terminal.end() == 0
    written = terminal.written
    before, _, rest = written.partition(PLAYS)
    played, _, after = rest.partition(PLAYED)
    assert b"loading" in before

    vocabulary = {word.strip() for word in words()}
    parts = played.split(b"\x1b[H")  # each begins in the upper left corner
    pictures = [part for part in parts if b"base, careful" in part]
    for number in (0, len(pictures) // 2, -1):
        shown = screen_after(b"\x1b[H" + pictures[number], width, height).display
        assert any(re.search(" base, careful .* base, pushed .* DMax ", line) for line in shown)
        inside = " ".join(part for line in shown for part in line.split("│")[1:-1])
        seen = {word for word in re.findall(r"\w+", inside) if word.isalpha()}
        assert seen - TOLD <= vocabulary

    end = screen_after(after, width, 100)
    text = "\n".join(line.rstrip() for line in end.display)
    assert "DMax against the careful base: " in text and "95 % interval" in text and "Next:" in text
    assert not screen_after(written, width, height).cursor.hidden


def test_an_interrupted_demo_leaves_the_terminal_whole() -> None:
    with demo(80, 24, replay=60.0) as terminal:
        terminal.until_written(PLAYS)
        terminal.interrupt()
        assert terminal.end() == 130
    assert PLAYED in terminal.written.partition(PLAYS)[2]
    assert not terminal.screen.cursor.hidden
