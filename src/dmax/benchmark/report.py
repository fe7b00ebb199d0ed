"""The tables of a benchmark: what they hold, and how they look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
MISSING = "–"


@dataclass(frozen=True, slots=True)
class Section:
    """A table.

    Attributes:
        name: its key in the record.
        title: above it.
        columns: headings, each with the key of its values and their format: `{"tokens/s":
            "tokens_per_second:.0f"}`.
        rows: values by key; a `Spread` shows its median and range. All are recorded, whether they
            have a column or not.
        note: below it, what the figures mean.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    note: str = ""


def console(*, stderr: bool = False) -> Console:
    """Where tables go; a file or pipe is as wide as they need."""
    shown = Console(stderr=stderr)
    if not shown.is_terminal:
        shown.width = 160
    return shown


def show(section: Section, target: Console) -> None:
    """Print a section."""
    target.print(table(section), highlight=False)
    if section.note:
        target.print(section.note, style="dim", highlight=False)


def table(section: Section) -> Table:
    """A section as rich shows it; texts to the left, numbers to the right."""
    shown = Table(title=section.title, title_justify="left", title_style="bold")
    for heading, column in section.columns.items():
        shown.add_column(heading, justify="right" if ":" in column else "left", overflow="fold")
    for row in section.rows:
        shown.add_row(*(cell(row, column) for column in section.columns.values()))
    return shown


def cell(row: Row, column: str) -> str:
    """The value of a column `KEY` or `KEY:FORMAT`; a spread as median (low to high)."""
    key, _, form = column.partition(":")
    value = row.get(key)
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return f"{value['median']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
    return f"{value:{form}}"


def ratio(name: str, value: float, target: str = "") -> Row:
    """A row of a table of ratios; `target` is ">= 2.5" or "<= 0.1"."""
    row: Row = {"name": name, "value": value, "target": target or None, "met": None}
    if target:
        sign, limit = target.split()
        row["met"] = value >= float(limit) if sign == ">=" else value <= float(limit)
    return row


RATIO_COLUMNS = {"": "name", "measured": "value:.3g", "target": "target", "met": "met"}
