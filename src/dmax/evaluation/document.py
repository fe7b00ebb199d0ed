"""A page of tables in one file that needs no other; a press on a heading sorts its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        value: what its column is sorted by; empty: the text.
    """

    text: str
    value: float | str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading with its unit."""

    name: str
    unit: str = ""


def template(name: str) -> Template:
    """A template of HTML beside this file."""
    return Template(files("dmax.evaluation").joinpath(name).read_text(encoding="utf-8"))


def document(title: str, body: str) -> str:
    """A self-contained page of HTML with this body."""
    return template("document.html").substitute(title=escape(title), body=body)


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    ours: str | None = None,
) -> str:
    """A table with its caption; the rows of our curve stand out."""
    lines = [f'<table class="sorted"><caption>{escape(caption)}</caption>', "<thead><tr>"]
    for column in columns:
        unit = f" <small>{escape(column.unit)}</small>" if column.unit else ""
        lines.append(f'<th scope="col">{escape(column.name)}{unit}</th>')
    lines.append("</tr></thead><tbody>")
    for row in rows:
        marked = ' class="ours"' if row[0].text == ours else ""
        cells = (
            f'<td data-value="{escape(str(cell.text if cell.value == "" else cell.value))}">'
            f"{escape(cell.text)}</td>"
            for cell in row
        )
        lines.append(f"<tr{marked}>{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    return "\n".join(lines)
