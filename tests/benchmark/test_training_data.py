"""bench/training_data.py: both ways give the same examples."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets")

import training_data  # noqa: E402


def test_lists_and_tables_hold_the_same_examples(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    training_data.write_records(file, 12)
    lists, tables = (training_data.measure(way, file) for way in ("lists", "tables"))
    for name in ("records", "tokens", "first"):
        assert lists[name] == tables[name]
    assert lists["records"] == 12
