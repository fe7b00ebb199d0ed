"""Measured steps beside predicted ones, row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dmax.benchmark.report import Row, Table, figure

RECORD = Path(__file__).parent / "results/prediction.json"


def predictions(device_name: str, record: Path = RECORD) -> list[Row]:
    """Rows of tools/predict_step.py for this GPU; none for others, or if none were made."""
    if not record.is_file():
        return []
    rows: list[Row] = json.loads(record.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["gpu"] in device_name]


def beside(measured: Sequence[Row], predicted: Sequence[Row]) -> Table | None:
    """A table of the steps that were predicted; None if there are none.

    Args:
        measured: rows of `dmax.benchmark.gpu.step_row`, those of the engine as it is by default.
        predicted: rows of `predictions`.
    """
    by_case = {(row["experts"], row["batch"], row["context"]): row for row in predicted}
    rows: list[Row] = []
    for row in measured:
        guess = by_case.get((row.get("format", "bf16"), row["batch"], row["context"]))
        if guess is None or "error" in row:
            continue
        for name in ("step_ms", "first_step_ms"):
            median = row[name]["median"]
            rows.append(
                {
                    "case": row["case"],
                    "batch": row["batch"],
                    "context": row["context"],
                    "what": name,
                    "measured": median,
                    "predicted": guess[name],
                    "ratio": median / guess[name],
                }
            )
    if not rows:
        return None
    cells = [
        {
            "case": row["case"],
            "batch": str(row["batch"]),
            "positions": str(row["context"]),
            "": row["what"].removesuffix("_ms").replace("_", " "),
            "measured ms": figure(row["measured"], ".2f"),
            "predicted ms": figure(row["predicted"], ".2f"),
            "measured / predicted": figure(row["ratio"], ".2f"),
        }
        for row in rows
    ]
    note = "Predicted: bench/results/prediction.json, by tools/predict_step.py."
    return Table("predicted", "measured beside predicted", rows, cells, note)
