"""The picture of a training run: losses, rollouts and held-out problems over its steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmax import extras
from dmax.errors import InputError
from dmax.evaluation.plots import STRONG
from dmax.files import write_atomically

OTHERS = ("#2B5C8A", "#8A6A1F", "#4F7F5A", "#7A5C8E")
DASHES = ((6, 2), (1.5, 1.5), (8, 2, 1.5, 2), (3, 3))  # so that greyscale tells lines apart too
INK = "#333333"
WIDTH = 5.4  # inches of a panel
HEIGHT = 3.1
NOISY = 40  # values from which a curve is drawn as its running mean, with the values behind it
SPAN = 20  # a running mean is taken over 1 / SPAN of a curve
LABEL_HEIGHT = 0.07  # of a panel

Curve = list[tuple[int, float]]
"""Steps and values, by rising step."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the plots.

    Attributes:
        title: what it shows.
        labels: of its curves, by their names in the log; the first one stands out. A name that ends
            with `*` stands for all names that begin like it, and each is labelled by its end.
        scale: what values are multiplied by.
        highest: value that an axis reaches at least; None leaves it to the values.
    """

    title: str
    labels: Mapping[str, str]
    scale: float = 1.0
    highest: float | None = None


PANELS = (
    Panel("loss", {"loss": "mean", "loss_*": "", "eval_loss": "held-out"}),
    Panel(
        "wrong tokens of the rollout, %",
        {"rollout_error": "", "eval_rollout_error": "held-out"},
        scale=100,
    ),
    Panel("squared MMD of samples", {"mmd_*": ""}),
    Panel("entropy of right predictions, nats", {"entropy_right": ""}),
    Panel("held-out problems solved, %", {"eval_accuracy": ""}, scale=100, highest=100),
    Panel("held-out tokens per forward (TPF)", {"eval_tpf": ""}),
)


def draw_history(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw what a training run has logged as a PNG, a panel for each kind of value that is there.

    Args:
        history: the lines of the log, each with its `step` (`trainer.state.log_history`).
        path: of the picture.
        title: of the picture.

    Raises:
        InputError: matplotlib is missing, nothing was logged, or the file cannot be written.
    """
    extras.require("matplotlib", "eval", "drawing a picture of the run")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = [(panel, panel_curves(history, panel)) for panel in PANELS]
    drawn = [(panel, curves) for panel, curves in found if curves]
    if not drawn:
        raise InputError("nothing was logged that could be drawn", hint="lower `logging_steps`")
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    last = max(step for _, curves in drawn for curve in curves.values() for step, _ in curve)

    figure = Figure(
        figsize=(WIDTH * columns, HEIGHT * rows + 0.4),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, weight="bold", color=INK)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (panel, curves) in zip(grid, drawn, strict=False):
        _draw_panel(axes, panel, curves, last)
    for axes in list(grid)[len(drawn) :]:
        axes.remove()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())


def panel_curves(history: Sequence[Mapping[str, float]], panel: Panel) -> dict[str, Curve]:
    """The curves of a panel by their labels, those without a finite value left out."""
    names = dict.fromkeys(name for line in history for name in line)
    curves: dict[str, Curve] = {}
    for pattern, label in panel.labels.items():
        start = pattern.removesuffix("*")
        is_start = pattern.endswith("*")
        for name in names:
            if name == pattern or (is_start and name.startswith(start)):
                curve = _curve(history, name, panel.scale)
                if curve:
                    curves[name.removeprefix(start) if is_start else label] = curve
    return curves


def running_mean(curve: Curve) -> Curve:
    """The mean of the values around each one; fewer of them at both ends."""
    reach = max(1, len(curve) // (2 * SPAN))
    smooth = []
    for index, (step, _) in enumerate(curve):
        side = min(reach, index, len(curve) - 1 - index)
        around = [value for _, value in curve[index - side : index + side + 1]]
        smooth.append((step, sum(around) / len(around)))
    return smooth


def _curve(history: Sequence[Mapping[str, float]], name: str, scale: float) -> Curve:
    found = {int(line["step"]): scale * line[name] for line in history if name in line}
    return [(step, value) for step, value in sorted(found.items()) if math.isfinite(value)]


def _draw_panel(axes: Any, panel: Panel, curves: Mapping[str, Curve], last: int) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    for index, curve in enumerate(curves.values()):
        _draw_curve(axes, curve, index)
    axes.set_xlim(0, last)
    values = [value for curve in curves.values() for _, value in curve]
    lowest = min(*values, 0)  # a policy gradient's loss has either sign
    axes.set_ylim(1.05 * lowest, 1.05 * max(*values, panel.highest or 0, 1e-9))
    _label_ends(axes, curves)


def _draw_curve(axes: Any, curve: Curve, index: int) -> None:
    """A line; where there are many values it is their running mean."""
    colour, dashes = look(index)
    is_noisy = len(curve) >= NOISY
    if is_noisy:
        axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(
        *zip(*(running_mean(curve) if is_noisy else curve), strict=True),
        color=colour,
        linewidth=1.5 if index else 2.2,
        linestyle=(0, dashes) if dashes else "-",
        marker="" if is_noisy else "o",
        markersize=3,
        zorder=3 if index else 4,
        clip_on=False,
    )


def look(index: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of a curve: the first of a panel stands out."""
    if index == 0:
        return STRONG, ()
    return OTHERS[(index - 1) % len(OTHERS)], DASHES[(index - 1) % len(DASHES)]


def _label_ends(axes: Any, curves: Mapping[str, Curve]) -> None:
    """Name and last value of each curve to the right of the panel, the highest first."""
    low, high = axes.get_ylim()
    ends = []
    for index, (label, curve) in enumerate(curves.items()):
        smooth = running_mean(curve) if len(curve) >= NOISY else curve
        value = smooth[-1][1]
        ends.append(((value - low) / (high - low), f"{label} {value:#.3g}".strip(), index))
    places = spread([place for place, _, _ in ends], LABEL_HEIGHT)
    for place, (_, text, index) in zip(places, ends, strict=True):
        axes.annotate(
            text,
            (1, place),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=look(index)[0],
            weight="normal" if index else "bold",
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places from 0 on, moved apart in their order so that neighbours differ by `gap` at least."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for below, above in zip(order, order[1:], strict=False):
        moved[above] = max(moved[above], moved[below] + gap)
    pushed = sum(after - before for before, after in zip(places, moved, strict=True))
    back = min(pushed / len(places), min(moved) - gap / 2)  # so that all share what was pushed
    return [place - back for place in moved]
