"""Signs and styles of a text that is being written, and which characters a terminal may get.

Whatever colour says is also said by a sign, so a pipe and a screen without colours show the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

MASKED = "dim"
OPEN = "bright_blue"
REVISED = "bold dark_orange"
WRONG = "bold red"
RIGHT = "bold green"

UNSHOWN = "?"
JOINERS = "\u200c\u200d"  # not printable to Python, harmless, and part of words and emoji
TAB = 4  # columns


@dataclass(frozen=True, slots=True)
class Marks:
    """Signs beside the words, in characters that the terminal has.

    Attributes:
        masked: a position without a token.
        revised: stands before a word that replaced another.
        wrong: stands before a mistake.
        right: stands before a right answer.
    """

    masked: str
    revised: str
    wrong: str
    right: str


SIGNS = Marks(masked="·", revised="~", wrong="✗", right="✓")
ASCII_SIGNS = Marks(masked="_", revised="~", wrong="!", right="+")


def signs(console: Console) -> Marks:
    """The marks that a console has the characters for."""
    return ASCII_SIGNS if console.options.ascii_only else SIGNS


def masked(marks: Marks) -> Text:
    """A position without a token."""
    return Text(f" {marks.masked}", style=MASKED)


def marked(text: str, mark: str, style: str) -> Text:
    """A token with its mark, which stands before the word and after the space."""
    word = text.lstrip(" ")
    space = text[: len(text) - len(word)]
    return Text.assemble(space, (f"{mark}{word}", style))


def visible(text: str) -> str:
    """A text of a model as a terminal may show it: its control characters would be obeyed."""
    plain = text.replace("\r\n", "\n").replace("\t", " " * TAB)
    return "".join(sign if _is_shown(sign) else UNSHOWN for sign in plain)


def _is_shown(sign: str) -> bool:
    return sign.isprintable() or sign == "\n" or sign in JOINERS
