"""Curves and tables of `bench/noise.py`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from noise_kinds import KIND_NAMES, NOISES
from noise_plan import RATIOS, RECIPE_RATIO, THRESHOLDS, base_label, looked_at
from noise_points import OURS, Comparison, Points, Record, scientific
from prose import table
from shares import FAILS, HOLDS, WITHIN_NOISE, Share, gap

from dmax.evaluation.plots import looks as looks_of
from dmax.evaluation.statistics import wilson_interval
from dmax.files import write_atomically

# --- the curves -----------------------------------------------------------------------------------


def draw(points: Points, path: Path) -> None:
    """Accuracy over steps as an SVG, a panel for each rate and threshold, a line for each noise."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    panels = figure.subplots(
        len(THRESHOLDS), len(points.rates), sharex=True, sharey=True, squeeze=False
    )
    chosen = looks_of(list(NOISES), OURS)
    for row, threshold in zip(panels, THRESHOLDS, strict=True):
        for axes, rate in zip(row, points.rates, strict=True):
            axes.set_title(f"rate {scientific(rate)}, threshold {threshold:g}", fontsize=10)
            for noise, look in chosen.items():
                line = _line(points, noise, rate, threshold)
                if not line:
                    continue
                steps = [number for number, _ in line]
                bounds = [wilson_interval(share.correct, share.total) for _, share in line]
                low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
                axes.vlines(steps, low, high, color=look.colour, alpha=0.25, linewidth=2)
                axes.plot(
                    steps,
                    [100 * share.rate for _, share in line],
                    label=NOISES[noise].title,
                    color=look.colour,
                    linewidth=look.width / 1.5,
                    linestyle=(0, look.dashes) if look.dashes else "-",
                    marker=look.marker,
                    markersize=4,
                    zorder=look.order,
                )
            axes.set_xscale("log")
            axes.set_xticks(points.steps, [f"{number:,}" for number in points.steps], fontsize=8)
            axes.set_xlim(0.9 * points.steps[0], 1.1 * points.steps[-1])
            axes.minorticks_off()
            axes.set_ylim(0, 100)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("training steps", fontsize=10)
    figure.supylabel("problems solved, %", fontsize=10)
    handles = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    picture = io.StringIO()
    # With a salt and without a date, the same figures give the same file.
    with rc_context({"svg.hashsalt": "dmax", "svg.fonttype": "none"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(path, picture.getvalue())


def _line(points: Points, noise: str, rate: float, threshold: float) -> list[tuple[int, Share]]:
    """Steps and pooled shares of a kind of noise, where it is measured."""
    line = []
    for steps in points.steps:
        seeds = points.seeds(noise, rate, steps, threshold)
        if seeds:
            line.append((steps, points.pooled(noise, rate, steps, threshold, seeds)))
    return line


# --- the tables -----------------------------------------------------------------------------------


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Every comparison of `PAIR`."""
    head = ("rate", "steps", "threshold", "seeds", "own, sampled", "random", "difference", "")
    marks = {HOLDS: "**own is better**", FAILS: "**random is better**", WITHIN_NOISE: ""}
    rows = [
        (
            scientific(each.rate),
            f"{each.steps:,}",
            f"{each.threshold:g}",
            ", ".join(map(str, each.seeds)),
            str(each.own),
            str(each.other),
            gap(each.own, each.other),
            marks[each.verdict],
        )
        for each in comparisons
    ]
    return table(head, rows)


def every_point(points: Points) -> str:
    """Counts and TPF of every kind of noise, over the seeds that it has."""
    head = ("rate", "steps", "threshold", *(noise.title for noise in NOISES.values()))
    rows = []
    for rate in points.rates:
        for steps in points.steps:
            for threshold in THRESHOLDS:
                cells = []
                for noise in NOISES:
                    seeds = points.seeds(noise, rate, steps, threshold)
                    share = points.pooled(noise, rate, steps, threshold, seeds) if seeds else None
                    cells.append(f"{share}" if share else "")
                if any(cells):
                    rows.append((scientific(rate), f"{steps:,}", f"{threshold:g}", *cells))
    return table(head, rows)


def missing(points: Points, noises: Sequence[str]) -> str:
    """How far every run of these kinds of noise is: its last measured step count, or nothing."""
    head = ("noise", "rate", *(f"seed {seed}" for seed in points.all_seeds))
    rows = []
    for noise in noises:
        for rate in points.rates:
            cells = []
            for seed in points.all_seeds:
                done = [s for s in points.steps if points.at(noise, rate, s, THRESHOLDS[-1], seed)]
                last = f"{max(done):,} steps" if done else "not yet"
                cells.append("all" if len(done) == len(points.steps) else last)
            rows.append((NOISES[noise].title, scientific(rate), *cells))
    return table(head, rows)


def percent(part: int, whole: int) -> str:
    """A share with its counts."""
    return f"{part:,}/{whole:,} ({100 * part / whole:.1f} %)" if whole else "none"


def base_noise(found: Record) -> str:
    """What the noise of the base is like at each mask ratio."""
    head = ("mask ratio", "noise", "wrong", "of them plausible", "among the best 10", "same kind")
    rows = [
        (
            f"{ratio:g}",
            NOISES[noise].title,
            percent(counts["wrong"], counts["positions"]),
            percent(counts["plausible"], counts["wrong"]),
            percent(counts["top"], counts["wrong"]),
            percent(counts["same kind"], counts["wrong"]),
        )
        for ratio in RATIOS
        for noise, counts in found.get(base_label(ratio), {}).items()
    ]
    return table(head, rows)


def wrong_kinds(found: Record) -> str:
    """The kinds of tokens that are wrong in the base's noise, at the mask ratio of the runs."""
    head = ("noise", *(f"wrong among {kind}s" for kind in KIND_NAMES[:3]), "special tokens")
    rows = [
        (
            NOISES[noise].title,
            *(
                percent(counts[f"{kind}, wrong"], counts[f"{kind}, positions"])
                for kind in KIND_NAMES
            ),
        )
        for noise, counts in found.get(base_label(RECIPE_RATIO), {}).items()
    ]
    return table(head, rows)


def along_training(found: Record, points: Points) -> str:
    """What trained models say in place of masks, and what they mend and break in one forward."""
    head = (
        *("trained with", "rate", "steps", "own argmax wrong", "of them plausible"),
        *("mends of its own", "breaks of its own", "mends of random", "breaks beside random"),
    )
    rows = [("the base", "", "0", *_look(found[base_label(RECIPE_RATIO)]))]
    for rate in points.rates:
        for noise, described in NOISES.items():
            for steps in points.steps:
                label = looked_at(found, noise, rate, steps)
                if label is not None:
                    figures = _look(found[label])
                    rows.append((described.title, scientific(rate), f"{steps:,}", *figures))
    return table(head, rows)


def _look(look: Record) -> tuple[str, ...]:
    own, random = look["argmax"], look["at-errors"]
    return (
        percent(own["wrong"], own["positions"]),
        percent(own["plausible"], own["wrong"]),
        percent(own["mended"], own["wrong"]),
        percent(own["broken"], own["right"]),
        percent(random["mended"], random["wrong"]),
        percent(random["broken"], random["right"]),
    )
