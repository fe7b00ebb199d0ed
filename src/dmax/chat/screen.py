"""An answer on the terminal while it is written: settled text above, the open blocks below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from rich.console import Console
from rich.text import Text

from dmax.chat.drafts import Piece
from dmax.cli.marks import OPEN, REVISED, Marks, marked, masked, signs, visible

SURE = 0.9
UNSURE = 0.5
NARROWEST = 2  # columns
ERASE_LINE = "\x1b[K"  # from the cursor on
ERASE_BELOW = "\x1b[J"
UP = "\x1b[{}A"


class Screen(Protocol):
    """Where an answer appears; left at its end, however it ends."""

    def show(self, settled: str, drafts: Sequence[Piece]) -> None:
        """Add text that has settled, and show the open blocks as they stand."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def is_live(console: Console) -> bool:
    """Whether pictures can change there: not in a pipe or a dumb terminal, nor without colours."""
    return console.is_interactive and console.file.isatty() and not console.no_color


def open_screen(console: Console) -> Screen:
    """A screen that moves, or plain text where nothing can."""
    return LiveScreen(console) if is_live(console) else PlainScreen(console)


class PlainScreen:
    """Text as it settles, and nothing else."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._is_in_line = False

    def show(self, settled: str, drafts: Sequence[Piece]) -> None:
        """As `Screen.show`; open blocks are not shown."""
        if settled:
            self._file.write(visible(settled))
            self._file.flush()
            self._is_in_line = not settled.endswith("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_in_line:
            self._file.write("\n")
            self._file.flush()


class LiveScreen:
    """Settled lines scroll away as ordinary text; below them stands a picture that changes.

    The picture begins with the settled line that is not full yet. After each picture the cursor
    goes back to its beginning: a terminal that is resized may wrap its lines anew, and takes the
    cursor along, so that the next picture covers this one. A picture is never as high as the
    terminal, which would lose its upper lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._marks = signs(console)
        self._line = ""  # settled, and not scrolled away yet

    def show(self, settled: str, drafts: Sequence[Piece]) -> None:
        """As `Screen.show`."""
        console = self._console
        width = max(console.width - 1, NARROWEST)  # a full line would leave the cursor undecided
        full, self._line = settled_lines(console, self._line + visible(settled), width)
        picture = Text(self._line).append(drafted(drafts, self._marks))
        lines = list(picture.wrap(console, width))[: max(console.height - 1, 1)]
        self._draw(full, lines)

    def __enter__(self) -> Self:
        self._console.show_cursor(False)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the settled text, and drop what was still a draft."""
        try:
            self._draw([Text(self._line)] if self._line else [], [Text()])
        finally:
            self._console.show_cursor(True)

    def _draw(self, full: Sequence[Text], picture: Sequence[Text]) -> None:
        """Write lines that stay, then a picture, all at once so that nothing flickers."""
        with self._console.capture() as capture:
            lines = Text(f"{ERASE_LINE}\n").join([*full, *picture])
            self._console.print(lines, end="", soft_wrap=True)
        up = UP.format(len(picture) - 1) if len(picture) > 1 else ""
        self._console.file.write(f"\r{capture.get()}{ERASE_BELOW}\r{up}")
        self._console.file.flush()


def settled_lines(console: Console, text: str, width: int) -> tuple[list[Text], str]:
    """The full lines of a text, and the rest, which later text may still continue.

    More text changes the last line only, since words go to the first line that has room.
    """
    body = text.rstrip(" ")
    *full, last = Text(body).wrap(console, width) if body else [Text()]
    return full, last.plain + text[len(body) :]


def drafted(drafts: Sequence[Piece], marks: Marks) -> Text:
    """Open blocks: the surer a token, the bolder, and a sign before each that was revised."""
    return Text().join(_drawn(piece, marks) for piece in drafts)


def _drawn(piece: Piece, marks: Marks) -> Text:
    if not piece.text:
        return masked(marks)
    if piece.is_revised:
        return marked(piece.text, marks.revised, f"{REVISED} reverse" if piece.is_new else REVISED)
    return marked(piece.text, "", shade(piece.confidence))


def shade(confidence: float) -> str:
    """The style of a draft: dim, plain or bold, which light and dark terminals show alike."""
    if confidence >= SURE:
        return f"bold {OPEN}"
    return OPEN if confidence >= UNSURE else f"dim {OPEN}"
