"""What the demo draws: whole words, lines that fit, marks that need no colour."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dmax.cli.marks import ASCII_SIGNS, SIGNS, Marks
from dmax.demo.replay import show
from dmax.demo.screen import answers, legend, picture, written
from dmax.demo.story import Story

MARKS = "".join((SIGNS.masked, SIGNS.revised, SIGNS.wrong, SIGNS.right))
STATUS = {"forward", "forwards", "s"}
MOMENTS = (0.0, 0.05, 0.1, 0.3, 0.7, 1.0)  # of the story's time


class Text8(io.TextIOWrapper):
    """A stream of an encoding, whose content can be read."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def getvalue(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def drawn(story: Story, moment: float, width: int, height: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, **options)  # type: ignore[arg-type]
    console.print(picture(console, story, moment * story.seconds, "a title", height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def known_words(story: Story) -> set[str]:
    texts = [story.example.prompt, story.example.answer]
    texts += [
        "".join(piece.text for piece in frame.pieces)
        for recording in story.recordings
        for frame in recording.frames
    ]
    return {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize("width", [120, 80, 72, 71, 40])
@pytest.mark.parametrize("moment", MOMENTS)
def test_no_word_is_broken_and_no_line_too_wide(story: Story, width: int, moment: float) -> None:
    lines = drawn(story, moment, width, 60).splitlines()
    assert max(map(len, lines)) <= width
    inside = [part for line in lines for part in re.split("[│]", line)[1:-1]]
    words = {word for part in inside for word in re.findall(r"\w+", part)}
    assert {word for word in words if word.isalpha()} - STATUS <= known_words(story)


@pytest.mark.parametrize(("width", "height"), [(120, 30), (80, 24), (40, 30), (80, 10), (30, 8)])
def test_a_picture_is_no_higher_than_the_terminal(story: Story, width: int, height: int) -> None:
    for moment in MOMENTS:
        lines = drawn(story, moment, width, height).splitlines()
        if height >= 10:
            assert len(lines) <= height
        assert sum("base, careful" in line for line in lines) == 1


@pytest.mark.parametrize(("width", "num_lines"), [(120, 1), (80, 1), (40, 3)])
def test_answers_stand_side_by_side_where_there_is_room(
    story: Story, width: int, num_lines: int
) -> None:
    lines = drawn(story, 1.0, width, 60).splitlines()
    names = [recording.setting.label for recording in story.recordings]
    titles = [line for line in lines if any(f" {name} " in line for name in names)]
    assert len(titles) == num_lines


def test_dmax_is_done_while_the_careful_base_has_hardly_begun(story: Story) -> None:
    careful, _, dmax = story.recordings
    assert careful.num_forwards(dmax.seconds) < careful.output.num_forwards / 2
    text = drawn(story, dmax.seconds / story.seconds, 120, 40)
    assert f"{dmax.output.num_forwards} forwards, {dmax.seconds:.3f} s" in text
    assert f"forward {careful.num_forwards(dmax.seconds) + 1}, {dmax.seconds:.3f} s" in text


def test_marks_say_what_colours_say(story: Story) -> None:
    end = drawn(story, 1.0, 120, 40)
    _, pushed, dmax = story.recordings
    for _, after in dmax.revisions:
        assert f"~{after}" in end
    num_wrong = sum(piece.is_wrong for piece in pushed.frames[-1].pieces)
    assert end.count("✗") == num_wrong + 2  # in the legend and the verdict
    assert end.count("✓ ") == 2 and "no valid answer" in end
    assert "·" in drawn(story, 0.0, 120, 40)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_gets_ascii(story: Story, encoding: str) -> None:
    console = Console(file=Text8(encoding), width=80)
    for moment in MOMENTS:
        console.print(picture(console, story, moment * story.seconds, "a title", 40))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.isascii() and "!wrong" in shown and "+ " in shown


def test_a_pipe_gets_stills_without_escape_codes(story: Story) -> None:
    console = Console(file=io.StringIO(), width=80)
    show(console, story, seconds=1000)  # nothing is played, so this takes no time
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert shown.count("after 0.") == 3 and shown.count(" DMax ") == 3
    middle = shown.split("after 0.")[2]
    assert (
        f"✓ {story.example.answer} is right" in middle and "no valid answer" in middle
    )  # both fast ones are done
    assert "forward " in middle  # and the careful base is not


def test_a_pipe_that_wants_colours_gets_stills_too(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO(), width=80)
    show(console, story, seconds=1000)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("after 0.") == 3 and "\x1b[?1049h" not in shown


def test_without_colours_there_are_none(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = drawn(story, 1.0, 120, 40, force_terminal=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)


def test_a_dumb_terminal_gets_stills(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    show(console, story, seconds=1000)
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("marks", [SIGNS, ASCII_SIGNS])
def test_the_legend_explains_every_mark(story: Story, marks: Marks) -> None:
    text = legend(marks).plain
    assert all(mark in text for mark in (marks.masked, marks.revised, marks.wrong))
    assert len(text) <= 80
    assert not written(story.recordings[0], 0.0, marks).plain.startswith(" ")
    assert answers(Console(width=80), story, story.seconds).row_count == 1
