"""The record of what bench/pretrained.py has measured: whose it is, and which points stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmax.errors import InputError
from dmax.evaluation.sweep import Curve, is_same_environment
from dmax.files import read_record

PARTS = ("points", "stages", "environment")  # of a record, by name
# What is kept of an evaluation.
KEPT = ("weights", "accuracy", "correct", "total", "interval", "tpf", "seconds")


def read(path: Path) -> dict[str, Any]:
    """The record of earlier; empty if there is none.

    Raises:
        InputError: there is something else in its place.
    """
    if not path.exists():
        return {}
    record = read_record(path)
    if not _is_ours(record):
        raise InputError(f"{path} is not a record of this script", hint="move it away")
    return dict(record)


def _is_ours(record: Any) -> bool:
    """Whether this is a record with all its parts."""
    if not isinstance(record, dict):
        return False
    parts = [record.get(name) for name in PARTS]
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(isinstance(point, dict) for point in record["points"].values())


def renew(
    record: dict[str, Any], name: str, curve: Curve, value: float, evaluated: Mapping[str, Any]
) -> bool:
    """Put what was evaluated in the place of a point, unless it says the same.

    A point names its environment if it is another than the record's, which is the first point's.
    """
    points = record["points"]
    point = {key: evaluated[key] for key in KEPT}
    point |= {"label": curve.label, "strategy": curve.strategy, "value": value}
    held = points.get(name, {})
    if all(held.get(key) == each for key, each in point.items() if key != "seconds"):
        return False
    measured_in = evaluated["environment"]
    if not points:
        record["environment"] = measured_in
    if not is_same_environment(measured_in, record["environment"]):
        point["environment"] = measured_in
    points[name] = point
    return True
