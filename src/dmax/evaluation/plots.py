"""Pictures of a sweep: accuracy over tokens per forward, one line a curve, labelled at its end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmax import extras
from dmax.errors import InputError
from dmax.evaluation.labels import along, place_labels
from dmax.evaluation.statistics import (
    Point,
    SweepRecord,
    careful_base,
    furthest_at_best,
    our_curve,
)

STRONG = "#B3001B"  # dark, so that it stands out in greyscale too
MUTED = ("#7F8A99", "#A08C78", "#7F9A85", "#9A86A0", "#8C8C8C")
MARKERS = "os^Dv<>P*X"
# Lengths of dashes and gaps. Every line has a pattern of its own, so greyscale tells them apart.
DASHES = (
    (4, 2),
    (1, 1.5),
    (6, 2, 1, 2),
    (2, 2),
    (8, 3),
    (6, 2, 1, 2, 1, 2),
    (3, 1, 1, 1),
    (10, 2, 3, 2),
    (1, 3),
    (5, 4),
    (8, 2, 2, 2, 2, 2),
)
AXES = {
    "tpf": "tokens per forward (TPF)",
    "tokens_per_position": "tokens per computed position",
}
FEW = 10  # curves that a small picture has room for
LABELS = 6  # above all curves
STEP = 6.0  # pixels between the points of a line that labels keep clear of


@dataclass(frozen=True, slots=True)
class Look:
    """How a curve is drawn.

    Attributes:
        colour: of its line.
        width: of its line.
        marker: of its points.
        dashes: of its line; empty: it is solid.
        weight: of its label.
        order: what is drawn later lies above.
    """

    colour: str
    width: float
    marker: str
    dashes: tuple[float, ...]
    weight: str
    order: int


def looks(labels: Sequence[str], ours: str | None) -> dict[str, Look]:
    """Our curve thick, solid and strong; the others muted, no pattern of dashes used twice."""
    found = {}
    others = [label for label in labels if label != ours]
    for index, label in enumerate(others):
        stretch = 1 + index // len(DASHES)
        found[label] = Look(
            MUTED[index % len(MUTED)],
            width=1.3,
            marker=MARKERS[index % len(MARKERS)],
            dashes=tuple(length * stretch for length in DASHES[index % len(DASHES)]),
            weight="normal",
            order=2,
        )
    if ours is not None:
        found[ours] = Look(STRONG, 3.2, "o", (), "bold", 4)
    return found


def draw(
    record: SweepRecord,
    path: Path | io.StringIO,
    x: str = "tpf",
    *,
    ours: str | None = None,
    against: str | None = None,
) -> None:
    """Accuracy with its 95 % interval, one line a curve.

    Args:
        record: of a sweep.
        path: what to write: SVG or PNG, as its suffix says. A `StringIO` gets SVG.
        x: what accuracy is drawn over, a name of `AXES`.
        ours: label of the curve that stands out; None: as `our_curve` says.
        against: label of the curve that the title compares it with; None: that of `careful_base`,
            or the one that keeps its accuracy furthest.

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
    curves = curves_of(points, x)
    ours = our_curve(points) if ours is None else ours
    is_svg = isinstance(path, io.StringIO) or path.suffix == ".svg"
    svg: dict[str, Any] = {"format": "svg", "metadata": {"Date": None}}
    # With a salt and without a date, the same figures give the same file.
    with pyplot.rc_context({"svg.hashsalt": "dmax", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8.0, 4.8) if len(curves) <= FEW else (10.5, 6.4))
        axes.set_xlabel(AXES[x])
        axes.set_ylabel(f"correct answers, % of {points[0]['total']}")
        axes.set_title(title(points, x, ours, against), loc="left", fontsize=10)
        axes.set_ylim(0, 103)
        axes.set_xlim(0, 1.1 * max(point[x] for point in points) or 1)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        chosen = looks(list(curves), ours)
        for label, curve in curves.items():
            _draw_curve(axes, curve, x, chosen[label])
        _draw_labels(figure, axes, curves, x, chosen, ours)
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, **(svg if is_svg else {}))
        pyplot.close(figure)


def curves_of(points: Sequence[Point], x: str) -> dict[str, list[Point]]:
    """Points by the label of their curve, each curve by rising `x`."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point["label"], []).append(point)
    return {label: sorted(curve, key=lambda p: p[x]) for label, curve in curves.items()}


def title(points: Sequence[Point], x: str, ours: str | None, against: str | None) -> str:
    """What is seen: how far our curve keeps its accuracy, and how far another one does."""
    curves = curves_of(points, x)
    ends = {label: furthest_at_best(curve, x) for label, curve in curves.items()}
    others = [label for label in ends if label != ours]
    base = careful_base(points)
    if against is None and base is not None:
        against = base["label"]
    if against not in others:
        against = max(others, key=lambda label: ends[label][x], default=None)
    unit = AXES[x].removesuffix(" (TPF)")
    return "\n".join(
        f"{label}: {100 * ends[label]['accuracy']:.0f} % correct up to {ends[label][x]:.2g} {unit}"
        for label in (ours, against)
        if label is not None
    )


def _draw_curve(axes: Any, curve: Sequence[Point], x: str, look: Look) -> None:
    """A line through the points, with their intervals behind it."""
    at = [point[x] for point in curve]
    shares = [100 * point["accuracy"] for point in curve]
    lows = [100 * point["interval"][0] for point in curve]
    highs = [100 * point["interval"][1] for point in curve]
    axes.vlines(at, lows, highs, color=look.colour, alpha=0.25, linewidth=2, zorder=look.order - 1)
    axes.plot(
        at,
        shares,
        color=look.colour,
        linewidth=look.width,
        linestyle=(0, look.dashes) if look.dashes else "-",
        marker=look.marker,
        markersize=2 + look.width,
        zorder=look.order,
    )


def _draw_labels(
    figure: Any,
    axes: Any,
    curves: dict[str, list[Point]],
    x: str,
    chosen: dict[str, Look],
    ours: str | None,
) -> None:
    """The name of each curve near its end, with a thin line to it where it stands apart."""
    renderer = figure.canvas.get_renderer()
    labels = sorted(curves, key=lambda label: (label != ours, -curves[label][-1][x]))
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    texts = [
        axes.text(
            0,
            0,
            label,
            fontsize=8,
            color=chosen[label].colour,
            weight=chosen[label].weight,
            bbox=ground,
            zorder=LABELS,
        )
        for label in labels
    ]
    boxes = [text.get_window_extent(renderer) for text in texts]
    places = {
        label: axes.transData.transform([(p[x], 100 * p["accuracy"]) for p in curve])
        for label, curve in curves.items()
    }
    anchors = np.array([places[label][-1] for label in labels])
    sizes = np.array([(box.width, box.height) for box in boxes])
    room = axes.get_window_extent(renderer)
    bars = [
        axes.transData.transform([(p[x], 100 * bound) for bound in p["interval"]])
        for curve in curves.values()
        for p in curve
    ]
    obstacles = along([*places.values(), *bars], STEP)
    corners = place_labels(anchors, sizes, obstacles, room.min, room.max)
    back = axes.transData.inverted().transform
    for text, label, corner, size, anchor in zip(
        texts, labels, corners, sizes, anchors, strict=True
    ):
        text.set_position(back(corner))
        text.set_va("bottom")
        nearest = np.clip(anchor, corner, corner + size)
        leader = back([anchor, nearest])
        axes.plot(
            leader[:, 0],
            leader[:, 1],
            color=chosen[label].colour,
            linewidth=0.7,
            zorder=1,
        )
