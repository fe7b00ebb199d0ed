"""What tables amount to: ratios, each beside what was aimed at."""

from __future__ import annotations

from collections.abc import Sequence

from dmax.benchmark.report import MISSING, Row, Table, figure


def ratio(name: str, value: float, target: str = "") -> Row:
    """A row of the table; `target` is what was aimed at, ">= 2.5" or "<= 0.1"."""
    met = None
    if target:
        sign, limit = target.split()
        met = value >= float(limit) if sign == ">=" else value <= float(limit)
    return {"name": name, "value": value, "target": target or None, "met": met}


def ratio_table(rows: Sequence[Row], note: str = "") -> Table:
    """The table of these ratios."""
    words = {True: "yes", False: "no", None: MISSING}
    cells = [
        {
            "": row["name"],
            "measured": figure(row["value"], ".3g"),
            "target": row["target"] or MISSING,
            "met": words[row["met"]],
        }
        for row in rows
    ]
    return Table("ratios", "ratios", rows, cells, note)
