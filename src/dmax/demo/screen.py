"""What the demo shows of recordings at one moment: columns side by side, or one above another."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dmax.cli.marks import MASKED, OPEN, REVISED, RIGHT, WRONG, Marks, marked, masked, signs
from dmax.demo.settings import DMAX
from dmax.demo.story import Piece, Recording, Story
from dmax.tasks import Example

SIDE_BY_SIDE = 72  # columns of a terminal from which the answers stand beside each other
SIDES = 4  # columns of a frame, with the spaces inside
FRAME = 3  # lines of a frame, with the one that tells forwards and time
GAP = 1  # columns between frames

STRONG = "dark_orange"
MUTED = "bright_black"


def picture(console: Console, story: Story, seconds: float, title: str, height: int) -> Group:
    """Problem, answers and legend at a moment, in a terminal of that many lines.

    Where they are too few, the problem is left out, and then the beginning of each answer.

    Args:
        console: where it will be printed.
        story: problem and answers.
        seconds: the moment, in the story's own time.
        title: said above.
        height: lines there are.
    """
    above = [Text(title, style="bold"), problem(story.example)]
    below = legend(signs(console))
    used = [len(text.wrap(console, console.width)) for text in (*above, below)]
    num_rows = len(story.recordings) // num_columns(console, story)
    num_lines = max(map(len, _wrapped(console, story, story.seconds)))
    if sum(used) + num_rows * (num_lines + FRAME) > height:
        del above[1], used[1]
    num_lines = max(min(num_lines, (height - sum(used)) // num_rows - FRAME), 1)
    return Group(*above, answers(console, story, seconds, num_lines), below)


def answers(console: Console, story: Story, seconds: float, num_lines: int | None = None) -> Table:
    """The answers at a moment, in frames side by side or one above another.

    Args:
        console: where it will be printed.
        story: the answers.
        seconds: the moment, in the story's own time.
        num_lines: how many each answer has; the last ones are shown. None: all that it needs.
    """
    columns = _wrapped(console, story, seconds)
    height = max(map(len, columns)) if num_lines is None else num_lines
    frames = [
        _frame(console, story, recording, seconds, lines[-height:], height)
        for recording, lines in zip(story.recordings, columns, strict=True)
    ]
    grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    beside = num_columns(console, story)
    for first in range(0, len(frames), beside):
        grid.add_row(*frames[first : first + beside])
    return grid


def num_columns(console: Console, story: Story) -> int:
    """How many answers stand beside each other."""
    return len(story.recordings) if console.width >= SIDE_BY_SIDE else 1


def _width(console: Console, story: Story) -> int:
    """Columns of a frame."""
    beside = num_columns(console, story)
    return (console.width - GAP * (beside - 1)) // beside


def _wrapped(console: Console, story: Story, seconds: float) -> list[list[Text]]:
    """The answers at a moment, as lines that fit into frames."""
    marks = signs(console)
    texts = [written(recording, seconds, marks) for recording in story.recordings]
    return [list(text.wrap(console, _width(console, story) - SIDES)) for text in texts]


def _frame(
    console: Console,
    story: Story,
    recording: Recording,
    seconds: float,
    lines: Sequence[Text],
    num_lines: int,
) -> Panel:
    """Lines of an answer with its name above and its verdict below."""
    is_ours = recording.setting == DMAX
    return Panel(
        Text("\n").join([progress(recording, seconds), *lines]),
        box=box.ROUNDED,
        title=Text(recording.setting.label, style="bold" if is_ours else "bold default"),
        subtitle=verdict(recording, seconds, signs(console)),
        width=_width(console, story),
        height=num_lines + FRAME,
        border_style=STRONG if is_ours else MUTED,
    )


def problem(example: Example) -> Text:
    """The question with its right answer."""
    return Text.assemble((example.prompt, "italic"), f" Right answer: {example.answer}.")


def legend(marks: Marks) -> Text:
    """What the marks mean."""
    return Text.assemble(
        (f"{marks.masked} unwritten", MASKED),
        "  ",
        ("open", OPEN),
        "  ",
        (f"{marks.revised}revised", REVISED),
        "  ",
        (f"{marks.wrong}wrong", WRONG),
        " (a repeat, or a number not in the solution)",
    )


def progress(recording: Recording, seconds: float) -> Text:
    """The forward that runs then and the time, or what the finished answer took."""
    if seconds >= recording.seconds:
        took = f"{recording.num_forwards(seconds)} forwards, {recording.seconds:.3f} s"
        return Text(took, style="bold")
    return Text(f"forward {recording.num_forwards(seconds) + 1}, {seconds:.3f} s", style=MASKED)


def written(recording: Recording, seconds: float, marks: Marks) -> Text:
    """What stands there then."""
    num_forwards = recording.num_forwards(seconds)
    if num_forwards == 0:
        blank = Piece()
        pieces = (blank,) * len(recording.frames[0].pieces)
    else:
        pieces = recording.frames[num_forwards - 1].pieces
    text = Text().join(_marked(piece, marks) for piece in pieces)
    return text[1:] if text.plain.startswith(" ") else text


def verdict(recording: Recording, seconds: float, marks: Marks) -> Text | None:
    """Whether the finished answer is right; None while it is written."""
    if seconds < recording.seconds:
        return None
    if recording.is_correct:
        return Text(f"{marks.right} {recording.extracted} is right", style=RIGHT)
    if recording.extracted is None:
        return Text(f"{marks.wrong} no valid answer", style=WRONG)
    return Text(f"{marks.wrong} {recording.extracted} is wrong", style=WRONG)


def _marked(piece: Piece, marks: Marks) -> Text:
    """A token with its mark."""
    if not piece.text:
        return masked(marks)
    if piece.is_wrong:
        return marked(piece.text, marks.wrong, WRONG)
    if piece.is_revised:
        return marked(piece.text, marks.revised, f"{REVISED} reverse" if piece.is_new else REVISED)
    return marked(piece.text, "", "" if piece.is_final else OPEN)
