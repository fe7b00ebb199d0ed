"""Pictures of a sweep: accuracy over tokens per forward, and a page of HTML that needs nothing else."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

from dmax.errors import InputError
from dmax.evaluation.sweep import Record, aup_table, pareto

# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes do the same in
# greyscale.
COLOURS = "#000000 #D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #999999".split()
MARKERS = "os^Dv<>P*X"
DASHES = ("-", "--", "-.", ":")
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
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} svg{max-width:100%} "
    "td,th{padding:.15em .8em;text-align:right} td:first-child,th:first-child{text-align:left}"
)


AXES: dict[str, str] = {
    "tpf": "tokens per forward (TPF)",
    "tokens_per_position": "tokens per computed position",
}


def draw(record: Record, path: Path | io.StringIO, x: str = "tpf") -> None:
    """Accuracy with its 95 % interval, one line a curve, the Pareto front underneath; SVG or PNG by suffix.

    Args:
        record: of a sweep.
        path: what to write.
        x: what accuracy is drawn over, of `AXES`: TPF, or what the computing of a position yields.

    Raises:
        InputError: matplotlib is missing, or nothing was measured.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib", hint='pip install "dmax[eval]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = record["points"]
    if x == "tokens_per_position":
        points = [{**p, x: p["generated_tokens"] / p["num_positions"]} for p in points]
    if not points:
        raise InputError("nothing was measured, so there is nothing to draw")
    labels = list(dict.fromkeys(point["label"] for point in points))
    with pyplot.rc_context(
        {"svg.hashsalt": "dmax", "svg.fonttype": "none"}
    ):  # the same figures give the same file
        figure, axes = pyplot.subplots(figsize=(7.6, 4.6) if len(labels) <= 10 else (11.0, 5.6))
        front = pareto(points, x)
        axes.plot(
            [p[x] for p in front],
            [100 * p["accuracy"] for p in front],
            color="#DDDDDD",
            linewidth=7,
            zorder=0,
        )
        for index, label in enumerate(labels):
            _line(
                axes,
                sorted((p for p in points if p["label"] == label), key=lambda p: p[x]),
                index,
                x,
            )
        axes.set_xlabel(AXES[x])
        axes.set_ylabel(f"correct answers, % of {points[0]['total']}")
        axes.set_ylim(0, 101)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if len(labels) <= 10:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        is_svg = isinstance(path, io.StringIO) or path.suffix == ".svg"
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path,
            format="svg" if is_svg else None,
            dpi=150,
            metadata={"Date": None} if is_svg else None,
        )
        pyplot.close(figure)


def _line(axes: Any, points: list[Record], index: int, x: str) -> None:
    shares = [100 * p["accuracy"] for p in points]
    below = [
        max(share - 100 * p["interval"][0], 0) for share, p in zip(shares, points, strict=True)
    ]
    above = [
        max(100 * p["interval"][1] - share, 0) for share, p in zip(shares, points, strict=True)
    ]
    axes.errorbar(
        [p[x] for p in points],
        shares,
        yerr=(below, above),
        label=points[0]["label"],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=DASHES[index % len(DASHES)],
        linewidth=1.4,
        markersize=4,
        capsize=2,
    )


def page(record: Record, title: str) -> str:
    """A self-contained HTML page: the plot, AUP, every point, and the machine."""
    picture = io.StringIO()
    draw(record, picture)
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]
    rows = [[_cell(point[name]) for name in COLUMNS] for point in record["points"]]
    areas = [
        [html.escape(a["label"]), f"{a['aup']:.0f}", f"{a['aup_paper']:.0f}"]
        for a in aup_table(record)
    ]
    machine = [
        [html.escape(str(key)), html.escape(str(value))]
        for key, value in record["environment"].items()
    ]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{record['points'][0]['total']} examples of "
        f"{html.escape(record['task'])}, seed {record['seed']}; bars are 95 % Wilson intervals, the grey band is the "
        f"Pareto front.</p>\n{svg}\n"
        f"<h2>Area under accuracy over parallelism</h2>\n{_table(('curve', 'd3LLM', 'as in the paper'), areas)}\n"
        f"<h2>Points</h2>\n{_table(COLUMNS, rows)}\n<h2>Machine</h2>\n{_table(('', ''), machine)}\n</html>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(f"{100 * part:.1f} %" for part in value)
    return html.escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    return (
        f"<table><tr>{top}</tr>"
        + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
        + "</table>"
    )
