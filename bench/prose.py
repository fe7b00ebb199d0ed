"""Paragraphs and list items of the pages, in lines that a reader of their source can follow."""

from __future__ import annotations

import textwrap

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
