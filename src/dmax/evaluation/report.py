"""The page of a sweep: plot, AUP, every point and the machine, in one file that needs no other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

from dmax.evaluation.document import Cell, Column, document, table, template
from dmax.evaluation.plots import draw
from dmax.evaluation.statistics import (
    CAREFUL,
    PAPER_MARGIN,
    Point,
    SweepRecord,
    aup_table,
    careful_base,
    our_curve,
)

NONE = "none"
AUP_UNIT = "% × tokens per forward"


POINT_COLUMNS = (
    Column("curve"),
    Column("setting"),
    Column("correct", "% (answers)"),
    Column("95 % interval", "%"),
    Column("TPF", "tokens per forward"),
    Column("TPF, prefill counted", "tokens per forward"),
    Column("speed", "tokens/s"),
)
AREA_COLUMNS = (
    Column("curve"),
    Column("as d3LLM defines it", AUP_UNIT),
    Column("as in the DMax paper", AUP_UNIT),
)


def page(record: SweepRecord, title: str) -> str:
    """A self-contained page of HTML; its tables sort by a press on a heading.

    Raises:
        InputError: matplotlib is missing, or nothing was measured.
    """
    picture = io.StringIO()
    draw(record, picture)
    svg = picture.getvalue()
    points = record["points"]
    ours = our_curve(points)
    areas = aup_table(record)
    machine = [(Cell(name), Cell(str(value))) for name, value in record["environment"].items()]
    body = template("report.html").substitute(
        what=escape(_what(record)),
        picture=svg[svg.index("<svg") :],
        areas=table(_aup_caption(points), AREA_COLUMNS, [_area_row(row) for row in areas], ours),
        points=table(_points_caption(points), POINT_COLUMNS, list(map(_point_row, points)), ours),
        machine=table(_machine_caption(points), (Column("what"), Column("value")), machine),
    )
    return document(title, body)


def _what(record: SweepRecord) -> str:
    total = record["points"][0]["total"]
    return f"{total} examples of the task {record['task']}, drawn with seed {record['seed']}."


def _machine_caption(points: Sequence[Point]) -> str:
    num_elsewhere = sum("environment" in point for point in points)
    if not num_elsewhere:
        return "Of all points."
    return (
        f"Of {len(points) - num_elsewhere} of the {len(points)} points. The record says beside "
        "every other where it was measured. Compare no speeds between them."
    )


def _points_caption(points: Sequence[Point]) -> str:
    sizes = sorted({point["batch_size"] for point in points if "batch_size" in point})
    batch = f", at batch size {', '.join(map(str, sizes))}" if sizes else ""
    return (
        "Accuracy is scored strictly. TPF: generated tokens over denoising forwards of all "
        "answers; with the prefill counted: the mean over answers, as the DMax paper counts. "
        f"Speed: generated tokens over wall time, prefill included{batch}."
    )


def _aup_caption(points: Sequence[Point]) -> str:
    """What both areas mean, and which base model the second one is measured against."""
    d3llm = (
        f"The area under accuracy (%) over TPF, in {AUP_UNIT}; larger is better. d3LLM: what lies "
        "below the sweep's best accuracy is discounted, and what lies more than 5 points below the "
        "first of its curve left out. "
    )
    base = careful_base(points)
    if base is None:
        return d3llm + (
            "There is none as in the paper: it needs exactly one base model, decoded by threshold "
            f"at {CAREFUL:g} or more, with right answers."
        )
    return d3llm + (
        f"DMax paper: the same with the base model's careful accuracy as the best, "
        f"{100 * base['accuracy']:.1f} % ({base['label']}, threshold {base['value']:g}), and "
        f"what lies more than {PAPER_MARGIN:g} points below it left out."
    )


def _area_row(row: dict[str, float | str | None]) -> tuple[Cell, ...]:
    areas = (row["aup"], row["aup_paper"])
    return (
        Cell(str(row["label"])),
        *(Cell(NONE, -1) if area is None else Cell(f"{area:.0f}", area) for area in areas),
    )


def _point_row(point: Point) -> tuple[Cell, ...]:
    low, high = (100 * bound for bound in point["interval"])
    accuracy = 100 * point["accuracy"]
    return (
        Cell(point["label"]),
        Cell(f"{point['knob']} {point['value']:g}", point["value"]),
        Cell(f"{accuracy:.1f} ({point['correct']}/{point['total']})", accuracy),
        Cell(f"{low:.1f} to {high:.1f}", low),
        *(
            Cell(format(point[name], form), point[name])
            for name, form in (("tpf", ".2f"), ("tpf_paper", ".2f"), ("tokens_per_second", ".0f"))
        ),
    )
