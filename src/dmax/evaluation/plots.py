"""Pictures of a sweep: accuracy over tokens per forward, and a page of HTML that stands alone."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmax import extras
from dmax.errors import InputError
from dmax.evaluation.statistics import Point, SweepRecord, aup_table, pareto

# Okabe and Ito's colours, which colour-blind readers can tell apart. Markers and dashes do the same
# in greyscale.
COLOURS = "#000000 #D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #999999".split()
MARKERS = "os^Dv<>P*X"
DASHES = ("-", "--", "-.", ":")
FEW = 10  # curves whose legend fits inside the plot
AXES = {
    "tpf": "tokens per forward (TPF)",
    "tokens_per_position": "tokens per computed position",
}
COLUMNS = (
    "label",
    "knob",
    "value",
    "correct",
    "total",
    "interval",
    "tpf",
    "tpf_paper",
    "tokens_per_second",
)
CSS = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} "
    "svg{max-width:100%} "
    "td,th{padding:.15em .8em;text-align:right} "
    "td:first-child,th:first-child{text-align:left}"
)


def draw(record: SweepRecord, path: Path | io.StringIO, x: str = "tpf") -> None:
    """Accuracy with its 95 % interval, one line a curve, the Pareto front underneath.

    Args:
        record: of a sweep.
        path: what to write: SVG or PNG, as its suffix says. A `StringIO` gets SVG.
        x: what accuracy is drawn over, a name of `AXES`.

    Raises:
        InputError: matplotlib is missing, or nothing was measured.
    """
    extras.require("matplotlib", "eval", "drawing a plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = record["points"]
    if x == "tokens_per_position":
        points = [{**p, x: p["generated_tokens"] / p["num_positions"]} for p in points]
    if not points:
        raise InputError("nothing was measured, so there is nothing to draw")
    is_crowded = len({point["label"] for point in points}) > FEW
    is_svg = isinstance(path, io.StringIO) or path.suffix == ".svg"
    legend: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    svg: dict[str, Any] = {"format": "svg", "metadata": {"Date": None}}
    # With a salt and without a date, the same figures give the same file.
    with pyplot.rc_context({"svg.hashsalt": "dmax", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(11.0, 5.6) if is_crowded else (7.6, 4.6))
        _draw_front(axes, points, x)
        _draw_curves(axes, points, x)
        axes.set_xlabel(AXES[x])
        axes.set_ylabel(f"correct answers, % of {points[0]['total']}")
        axes.set_ylim(0, 101)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, **(legend if is_crowded else {}))
        figure.tight_layout()
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, **(svg if is_svg else {}))
        pyplot.close(figure)


def _draw_front(axes: Any, points: Sequence[Point], x: str) -> None:
    front = pareto(points, x)
    axes.plot(
        [point[x] for point in front],
        [100 * point["accuracy"] for point in front],
        color="#DDDDDD",
        linewidth=7,
        zorder=0,
    )


def _draw_curves(axes: Any, points: Sequence[Point], x: str) -> None:
    labels = dict.fromkeys(point["label"] for point in points)
    for index, label in enumerate(labels):
        curve = [point for point in points if point["label"] == label]
        curve.sort(key=lambda point: point[x])
        shares = [100 * point["accuracy"] for point in curve]
        lows = [100 * point["interval"][0] for point in curve]
        highs = [100 * point["interval"][1] for point in curve]
        below = [max(share - low, 0) for share, low in zip(shares, lows, strict=True)]
        above = [max(high - share, 0) for share, high in zip(shares, highs, strict=True)]
        axes.errorbar(
            [point[x] for point in curve],
            shares,
            yerr=(below, above),
            label=label,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=1.4,
            markersize=4,
            capsize=2,
        )


def page(record: SweepRecord, title: str) -> str:
    """A self-contained page of HTML: the plot, AUP, every point, and the machine."""
    picture = io.StringIO()
    draw(record, picture)
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]
    areas = [
        (html.escape(row["label"]), f"{row['aup']:.0f}", f"{row['aup_paper']:.0f}")
        for row in aup_table(record)
    ]
    points = [[_cell(point[name]) for name in COLUMNS] for point in record["points"]]
    machine = [
        (html.escape(str(name)), html.escape(str(value)))
        for name, value in record["environment"].items()
    ]
    heading = html.escape(title)
    what = f"{record['points'][0]['total']} examples of {html.escape(record['task'])}"
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{heading}</title><style>{CSS}</style>\n"
        f"<h1>{heading}</h1>\n"
        f"<p>{what}, seed {record['seed']}; bars are 95 % Wilson intervals, the grey band is the "
        f"Pareto front.</p>\n{svg}\n"
        "<h2>Area under accuracy over parallelism</h2>\n"
        f"{_html_table(('curve', 'd3LLM', 'as in the paper'), areas)}\n"
        f"<h2>Points</h2>\n{_html_table(COLUMNS, points)}\n"
        f"<h2>Machine</h2>\n{_html_table(('', ''), machine)}\n</html>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(f"{100 * part:.1f} %" for part in value)
    return html.escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are escaped already."""
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{body}</table>"
