"""The tables of a benchmark: what is recorded, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from dmax.benchmark.measure import Spread

Row = dict[str, Any]
MISSING = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of measurements.

    Attributes:
        name: its key in the record.
        title: printed above it.
        rows: what is recorded.
        cells: what is printed of each row, by heading.
        note: printed below it; says what the figures mean.
    """

    name: str
    title: str
    rows: Sequence[Row]
    cells: Sequence[Mapping[str, str]]
    note: str = ""


def console(*, stderr: bool = False) -> Console:
    """Where tables go; a file or a pipe is as wide as they need."""
    target = Console(stderr=stderr)
    if not target.is_terminal:
        target.width = 160
    return target


def show(table: Table, target: Console, machine: str = "") -> None:
    """Print a table, what its figures mean and the machine they were measured on.

    Columns of figures stand to the right, words to the left.
    """
    grid = Grid(title=table.title, title_justify="left", title_style="bold")
    for heading in table.cells[0] if table.cells else ():
        column = [cells[heading] for cells in table.cells]
        has_figures = all(text == MISSING or text[0].isdigit() for text in column)
        grid.add_column(heading, justify="right" if has_figures else "left", overflow="fold")
    for cells in table.cells:
        grid.add_row(*cells.values())

    target.print(grid, highlight=False)
    caption = " ".join(part for part in (table.note, machine and f"Machine: {machine}.") if part)
    if caption:
        target.print(caption, style="dim", highlight=False)


def figure(value: Spread | float | None, form: str) -> str:
    """A number as a cell shows it, a spread as its median with the lowest and the highest.

    Where these look the same, as after a single round, the median stands alone.
    """
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        median, low, high = (format(value[key], form) for key in ("median", "low", "high"))
        return median if low == high else f"{median} ({low} to {high})"
    return format(value, form)
