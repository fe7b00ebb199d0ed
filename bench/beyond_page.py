"""The page of `beyond.py`: does an objective move the curve of accuracy over TPF to the right?

The criterion was written down before anything was measured. *As accurate* means at least the lower
end of the 95 % interval of a reference: `tiny-dmax` by SPD at its default threshold, or `tiny-base`
at 0.95 where a model is decoded by threshold. The figure of a curve is the largest TPF at which it
is as accurate, on straight lines between its points. It is compared, seed by seed, with that of the
control and with that of the model that the run began from, and a difference counts when Student's
95 % interval over the seeds leaves out zero.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from beyond_runs import BASE, DECODINGS, DMAX, SEEDS, TRAINED, Run

from dmax.benchmark.run import hardware, machines
from dmax.evaluation.plots import draw
from dmax.evaluation.statistics import Point, wilson_interval
from dmax.files import write_atomically

Record = dict[str, Any]
REFERENCES = {
    "spd": (DMAX, "spd", 0.5),
    "mbd": (DMAX, "spd", 0.5),
    "threshold": (BASE, "threshold", 0.95),
}
T_95 = {2: 12.706, 3: 4.303}  # Student's two-sided quantile, by the number of seeds

RIGHT = "to the right"
LEFT = "to the left"
NOISE = "within noise"
SHORT = "never as accurate"
EARLY = "not decided yet: fewer than two seeds"
VERDICTS = (RIGHT, NOISE, LEFT, SHORT, EARLY)


# --- the criterion --------------------------------------------------------------------------------


def tpf_at(points: Sequence[Point], level: float) -> float | None:
    """The largest TPF at which a curve has this accuracy or more; None: nowhere.

    Between neighbours by TPF the accuracy is taken to change evenly. Nothing is said beyond the
    boldest point.
    """
    curve = sorted((point["tpf"], point["accuracy"]) for point in points)
    reached = [tpf for tpf, accuracy in curve if accuracy >= level]
    for (tpf, accuracy), (next_tpf, next_accuracy) in pairwise(curve):
        if next_accuracy < level < accuracy:
            share = (accuracy - level) / (accuracy - next_accuracy)
            reached.append(tpf + share * (next_tpf - tpf))
    return max(reached, default=None)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two or three values with its 95 % interval by Student's distribution."""
    mean = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


class Found:
    """The measured points, by model, decoding and seed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.trained: Record = record.get("training", {})
        self._curves: dict[str, list[Point]] = {}
        for point in record["points"]:
            self._curves.setdefault(point["label"], []).append(point)

    def curve(self, run: Run, decoding: str, seed: int | None = None) -> list[Point]:
        """The points of a curve from careful to bold; empty unless all are measured."""
        asked = run.curve(decoding, seed)
        points = {point["value"]: point for point in self._curves.get(asked.label, [])}
        if not points.keys() >= set(asked.values):
            return []
        return [points[value] for value in asked.values]

    def seeds(self, run: Run, decoding: str) -> list[int]:
        """The seeds whose curve is measured."""
        return [seed for seed in SEEDS if self.curve(run, decoding, seed)]

    def level(self, decoding: str) -> float:
        """The accuracy that a curve is asked for."""
        run, name, value = REFERENCES[decoding]
        (point,) = (point for point in self.curve(run, name) if point["value"] == value)
        return float(point["interval"][0])

    def tpf(self, run: Run, decoding: str, seed: int | None = None) -> float | None:
        """The figure of one curve; None if it is never as accurate."""
        return tpf_at(self.curve(run, decoding, seed), self.level(decoding))

    def pooled(self, run: Run, decoding: str) -> list[Point]:
        """The points of a curve, all measured seeds counted together."""
        curves = [self.curve(run, decoding, seed) for seed in self.seeds(run, decoding)]
        label = f"{run.label}, {DECODINGS[decoding][0]}"
        return [together(points, label) for points in zip(*curves, strict=True)]


def together(points: Sequence[Point], label: str) -> Point:
    """One point of the counts of several."""
    names = ("correct", "total", "generated_tokens", "num_forwards")
    correct, total, tokens, forwards = (sum(point[name] for point in points) for name in names)
    return points[0] | {
        "label": label,
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "interval": wilson_interval(correct, total),
        "tpf": tokens / forwards,
    }


def start_of(run: Run, decoding: str) -> Run:
    """The model whose curve a run's is compared with: SPD says nothing of `tiny-base`."""
    return BASE if decoding == "threshold" else DMAX


def control_of(run: Run) -> Run | None:
    """The run that goes on with OPUT from the same model."""
    return next((other for other in TRAINED if other.name == run.control), None)


def differences(found: Found, run: Run, decoding: str, other: Run) -> list[float] | None:
    """The TPF of a run less that of another, seed by seed; None if one is never as accurate.

    Seeds of which only the other is never as accurate have no difference.
    """
    is_trained = other.recipe is not None
    seeds = found.seeds(run, decoding)
    if is_trained:
        seeds = [seed for seed in seeds if found.curve(other, decoding, seed)]
    pairs = [
        (found.tpf(run, decoding, seed), found.tpf(other, decoding, seed if is_trained else None))
        for seed in seeds
    ]
    values: list[float] = []
    for ours, theirs in pairs:
        if ours is None:
            return None
        if theirs is not None:
            values.append(ours - theirs)
    return values


def judge(values: Sequence[float] | None) -> str:
    """What the differences of the seeds say."""
    if values is None:
        return SHORT
    if len(values) < 2:
        return EARLY
    _, low, high = mean_interval(values)
    if low > 0:
        return RIGHT
    return LEFT if high < 0 else NOISE


def verdict(found: Found, run: Run, decoding: str) -> str:
    """Right of both the control and the start, left of one of them, or neither."""
    others = [start_of(run, decoding), *filter(None, [control_of(run)])]
    verdicts = {judge(differences(found, run, decoding, other)) for other in others}
    for name in (EARLY, SHORT, LEFT, NOISE):
        if name in verdicts:
            return name
    return RIGHT


# --- the page -------------------------------------------------------------------------------------


def write_page(record: Record, folder: Path) -> None:
    """Write `beyond.md` and its plots."""
    found = Found(record)
    for decoding in ("spd", "mbd"):
        curves = [found.curve(DMAX, decoding)]
        curves += [found.pooled(run, decoding) for run in TRAINED]
        points = [point for curve in curves for point in curve]
        ours = DMAX.curve(decoding).label
        draw({**record, "points": points}, folder / f"beyond-{decoding}.svg", ours=ours)
    write_atomically(folder / "beyond.md", page(found))


def page(found: Found) -> str:
    """The Markdown page: the answer, the figures behind it, and every point."""
    record = found.record
    return TEMPLATE.format(
        answer=answer(found),
        problems=record["limit"],
        level=f"{100 * found.level('spd'):.1f}",
        level_base=f"{100 * found.level('threshold'):.1f}",
        figures=figures(found),
        training=training(found),
        missing=missing(found),
        points=points_table(found),
        machine=machines(record),
    )


def compared() -> list[tuple[Run, str]]:
    """What the question is asked of: every objective but OPUT, in each of its decodings."""
    return [(run, name) for run in TRAINED if run.control for name in run.decodings]


def answer(found: Found) -> str:
    """One line for each verdict, and what a clear winner would change."""
    names: dict[str, list[str]] = {}
    for run, decoding in compared():
        if found.seeds(run, decoding):
            name = f"{run.label} by {DECODINGS[decoding][0]}"
            names.setdefault(verdict(found, run, decoding), []).append(name)
    lines = [
        textwrap.fill(f"**{found_so.capitalize()}:** {', '.join(names[found_so])}.", width=120)
        for found_so in VERDICTS
        if found_so in names
    ]
    if not lines:
        lines = ["No objective has been measured yet."]
    winners = [run for run, decoding in compared() if verdict(found, run, decoding) == RIGHT]
    return "\n\n".join([*lines, *(shipped(found, run) for run in dict.fromkeys(winners))])


def shipped(found: Found, run: Run) -> str:
    """What shipping a winner as `tiny-dmax` would change."""
    (now,) = (p for p in found.curve(DMAX, "spd") if p["value"] == 0.5)
    (then,) = (p for p in found.pooled(run, "spd") if p["value"] == 0.5)
    return (
        f"Shipped as `tiny-dmax`, {run.label} would change SPD at 0.5 from {share(now)} at TPF "
        f"{now['tpf']:.2f} to {share(then)} at TPF {then['tpf']:.2f}, and every figure that rests "
        "on the bundled weights would have to be measured again."
    )


def share(point: Point) -> str:
    """Counts and percent."""
    return f"{point['correct']}/{point['total']} ({100 * point['accuracy']:.1f} %)"


def figures(found: Found) -> str:
    """The TPF of every run at equal accuracy, and its differences."""
    rows = [
        "| trained by | decoded by | TPF, each seed | less its control | less its start | curve |",
        "|---|---|---|---|---|---|",
    ]
    for run in (DMAX, BASE, *TRAINED):
        for decoding in run.decodings:
            way = DECODINGS[decoding][0]
            if run.recipe is None:
                rows.append(f"| `{run.label}` | {way} | {number(found.tpf(run, decoding))} | | | |")
                continue
            seeds = found.seeds(run, decoding)
            if not seeds:
                continue
            each = ", ".join(number(found.tpf(run, decoding, seed)) for seed in seeds)
            control = control_of(run)
            against = gap(differences(found, run, decoding, control)) if control else ""
            begun = gap(differences(found, run, decoding, start_of(run, decoding)))
            said = verdict(found, run, decoding) if control else ""
            rows.append(f"| {run.label} | {way} | {each} | {against} | {begun} | {said} |")
    return "\n".join(rows)


def number(tpf: float | None) -> str:
    """A TPF, or that there is none."""
    return "never" if tpf is None else f"{tpf:.2f}"


def gap(values: Sequence[float] | None) -> str:
    """Differences of the seeds as text: the mean and its interval, if there are enough."""
    if values is None:
        return SHORT
    if len(values) < 2:
        return ", ".join(f"{value:+.2f}" for value in values)
    mean, low, high = mean_interval(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def training(found: Found) -> str:
    """What every run took."""
    rows = [
        "| run | recipe | from | steps | sequences a step | minutes, each seed | on |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in TRAINED:
        done = [found.trained.get(f"{run.name}-{seed}") for seed in SEEDS]
        present = [said for said in done if said]
        if present:
            minutes = ", ".join(f"{said['seconds'] / 60:.0f}" for said in present)
            recipe = f"[{run.recipe}](../../recipes/{run.recipe}.yaml)"
            steps = present[0]["steps"]
            size = present[0]["batch_size"]
            places = "; ".join(dict.fromkeys(map(_trained_on, present)))
            rows.append(
                f"| {run.label} | {recipe} | `{run.start}` | {steps} | {size} | {minutes} "
                f"| {places} |"
            )
    return "\n".join(rows) if len(rows) > 2 else "Nothing has been trained yet."


def _trained_on(said: Record) -> str:
    """Where a run was trained, and in which precision if it was not bfloat16."""
    machine = hardware(said["environment"])
    precision = said.get("precision", "bfloat16")  # of models that do not say
    return machine if precision == "bfloat16" else f"{machine}, in {precision}"


def missing(found: Found) -> str:
    """What is not measured, each with its command."""
    lines = []
    for run in TRAINED:
        measured = [found.seeds(run, decoding) for decoding in run.decodings]
        seeds = [seed for seed in SEEDS if not all(seed in seeds for seeds in measured)]
        if seeds:
            asked = " ".join(map(str, seeds))
            lines.append(
                f"- {run.label}: `python bench/beyond.py --only {run.name} --seeds {asked}`"
            )
    return "\n".join(lines or ["Nothing."])


def points_table(found: Found) -> str:
    """Every point, each seed and all together."""
    rows = [
        "| trained by | decoded by | threshold | each seed | together | 95 % interval | TPF |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in (DMAX, BASE, *TRAINED):
        for decoding in run.decodings:
            seeds: list[int | None] = [*found.seeds(run, decoding)] if run.recipe else [None]
            curves = [found.curve(run, decoding, seed) for seed in seeds]
            for points in zip(*curves, strict=True):
                each = ", ".join(str(point["correct"]) for point in points)
                one = together(points, run.label)
                low, high = (100 * bound for bound in one["interval"])
                rows.append(
                    f"| {run.label} | {DECODINGS[decoding][0]} | {one['value']:g} | {each} "
                    f"| {share(one)} | {low:.1f} to {high:.1f} | {one['tpf']:.2f} |"
                )
    return "\n".join(rows)


TEMPLATE = """# What came after DMax, in miniature

{answer}

The question is whether an objective that goes on from a finished model moves its curve of accuracy
over TPF to the right. Written by `python bench/beyond.py` from [beyond.json](beyond.json):
{problems} unseen word problems (seed 7) for every point, exact final answer.
Machine: {machine}.

**How it is judged**, written down before anything was measured. A curve is asked for {level} % of
the answers, the lower end of the 95 % interval of `tiny-dmax` by SPD at 0.5; by threshold for
{level_base} %, that of `tiny-base` at 0.95. Its figure is the largest TPF at which it has them, on
straight lines between its points. *To the right* means that this TPF is above that of the control,
which goes on with OPUT from the same model, and above that of the model it is compared with as a
start (`tiny-dmax`, or `tiny-base` by threshold), each with a 95 % interval over three seeds
(Student's) that leaves out zero. *Within noise* means that one of the two does not. The seeds
differ in order and noise of training and share the start and the problems. Added when it had
happened: a seed whose control never has as many answers counts against the start only.

![Accuracy against TPF by SPD](beyond-spd.svg)

![Accuracy against TPF by MBD, two open blocks](beyond-mbd.svg)

## TPF at equal accuracy

{figures}

## What the runs took

Wall time, with whatever else the machine was doing; up to 22 runs shared the GPU. CForce learns
from trajectories of the model it begins from, all others from the 5,000 answers of `tiny-base` that
made `tiny-dmax`.

{training}

## Not measured yet

{missing}

## Every point

{points}
"""
