"""Paragraphs, list items and tables of the pages, as a reader of their source can follow them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100  # columns


def filled(text: str, *, width: int = WIDTH, indent: str = "") -> str:
    """Paragraphs in lines of at most so many columns; links and numbers stay whole.

    Args:
        text: paragraphs with an empty line between them.
        width: columns.
        indent: before every line of a paragraph but its first.
    """
    return "\n\n".join(
        textwrap.fill(
            paragraph,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for paragraph in text.split("\n\n")
    )


def bullet(text: str, *, width: int = WIDTH) -> str:
    """An item of a list."""
    return filled(f"- {text}", width=width, indent="  ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    line = "|---" * len(head) + "|"
    begin, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([begin, line, *rest])
