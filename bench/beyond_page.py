"""The page of `beyond.py`: what was found, what else differs, and every point."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beyond_runs import BASE, DECODINGS, DMAX, SEEDS, TRAINED, Run
from beyond_verdict import (
    FASTER,
    SOME_SEEDS,
    TOO_FEW_SEEDS,
    VERDICTS,
    Found,
    all_differences,
    control_of,
    deciding,
    differences,
    mean_interval,
    start_of,
    together,
    verdict,
)
from prose import filled, table

from dmax.benchmark.run import hardware, machines
from dmax.evaluation.plots import draw
from dmax.files import write_atomically
from dmax.recipe.sections import load_recipe

Record = dict[str, Any]


def write_page(record: Record, folder: Path) -> None:
    """Write `beyond.md` and its plots."""
    found = Found(record)
    for decoding in ("spd", "mbd"):
        curves = [found.curve(DMAX, decoding), *(found.pooled(run, decoding) for run in TRAINED)]
        points = [point for curve in curves for point in curve]
        ours = DMAX.curve(decoding).label
        draw({**record, "points": points}, folder / f"beyond-{decoding}.svg", ours=ours)
    write_atomically(folder / "beyond.md", page(found))


def page(found: Found) -> str:
    """The Markdown page: the answer, the figures behind it, and every point."""
    return TEMPLATE.format(
        answer=answer(found),
        unequal=unequal(found),
        problems=found.record["limit"],
        level=f"{100 * found.level('spd'):.1f}",
        level_base=f"{100 * found.level('threshold'):.1f}",
        figures=figures(found),
        training=training(found),
        missing=missing(found),
        points=points_table(found),
        machine=machines(found.record),
    )


def compared() -> list[tuple[Run, str]]:
    """What the question is asked of: every objective but OPUT, in each of its decodings."""
    return [(run, name) for run in TRAINED if run.control for name in run.decodings]


def answer(found: Found) -> str:
    """One line for each verdict, what a clear winner would change, and what needs no objective."""
    lines = []
    for verdict_name in VERDICTS:
        names = [
            f"{run.label} by {DECODINGS[decoding][0]}{counted(found, run, decoding)}"
            for run, decoding in compared()
            if found.seeds(run, decoding) and verdict(found, run, decoding) == verdict_name
        ]
        lines += [f"**{verdict_name.capitalize()}:** {', '.join(names)}."] if names else []
    lines = lines or ["No objective has been measured yet."]
    winners = [run for run, decoding in compared() if verdict(found, run, decoding) == FASTER]
    lines += [shipped(found, run) for run in dict.fromkeys(winners)]
    lines += filter(None, [untrained(found), more_oput(found)])
    return filled("\n\n".join(lines))


def counted(found: Found, run: Run, decoding: str) -> str:
    """How many seeds are compared, or as accurate where none is compared; "" if all or none."""
    figures, verdict_name = found.tpfs(run, decoding), verdict(found, run, decoding)
    num = len(figures) - figures.count(None)
    if verdict_name != SOME_SEEDS:
        every = all_differences(found, run, decoding)
        if verdict_name != TOO_FEW_SEEDS and len(deciding(found, run, decoding)) < len(every):
            return " (against its start alone)"
        num = min(len(values or ()) for values in every)
    some = verdict_name != TOO_FEW_SEEDS and 0 < num < len(figures)
    return f" ({num} of {len(figures)} seeds)" if some else ""


def shipped(found: Found, run: Run) -> str:
    """What shipping a winner as `tiny-dmax` would change."""
    (now,) = (p for p in found.curve(DMAX, "spd") if p["value"] == 0.5)
    (then,) = (p for p in found.pooled(run, "spd") if p["value"] == 0.5)
    return (
        f"By SPD at 0.5, {run.label} writes {then['tpf']:.1f} tokens a forward where `tiny-dmax` "
        f"writes {now['tpf']:.1f}, at {100 * then['accuracy']:.1f} and "
        f"{100 * now['accuracy']:.1f} % correct. The bundled model is not replaced. Shipped as "
        f"`tiny-dmax`, {run.label} would change every figure that rests on the bundled weights."
    )


def untrained(found: Found) -> str:
    """What MBD does for `tiny-dmax` as it is, beside the winners by SPD."""
    by_spd, by_mbd = found.tpf(DMAX, "spd"), found.tpf(DMAX, "mbd")
    if by_spd is None or by_mbd is None:
        return ""
    said = (
        f"Without any training, `tiny-dmax` goes from {by_spd:.2f} tokens a forward by SPD to "
        f"{by_mbd:.2f} by MBD at equal accuracy; a forward of MBD computes up to two blocks."
    )
    for run, decoding in compared():
        if decoding == "spd" and verdict(found, run, decoding) == FASTER:
            mean = statistics.mean(filter(None, found.tpfs(run, decoding)))
            said += f" {run.label} by SPD writes {mean:.2f}, the mean of its seeds."
    return said


def more_oput(found: Found) -> str:
    """What becomes of `tiny-dmax` when it goes on with OPUT alone."""
    run = next(run for run in TRAINED if run.start == DMAX.start and not run.control)
    said = [
        f"{verdict(found, run, name)} by {DECODINGS[name][0]}, "
        f"TPF {gap(differences(found, run, name, DMAX))}"
        for name in run.decodings
        if found.seeds(run, name)
    ]
    ways = ", and ".join(said)
    return f"After more OPUT alone, the control, `tiny-dmax` is {ways}." if said else ""


def unequal(found: Found) -> str:
    """What runs do not share with their control, besides the objective."""
    lines = []
    for run in dict.fromkeys(run for run, decoding in compared() if found.seeds(run, decoding)):
        ours, theirs = settings(found, run), settings(found, control_of(run) or run)
        names = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
        each = [f"{name} {ours[name]} (control: {theirs[name]})" for name in names]
        lines.append(f"- {run.label}: {'; '.join(each) or 'nothing'}.")
    return "\n".join(lines)


def settings(found: Found, run: Run) -> dict[str, str]:
    """What a fair control shares with a run."""
    (teacher,) = re.findall(r"# dmax distill --model (\S+)", run.path.read_text(encoding="utf-8"))
    said = load_recipe(run.path, run.overrides).training
    names = ("rollout", "learning_rate", "warmup_steps")
    return {
        "answers of": f"`{teacher}`",
        "sequences": f"{said['max_steps'] * said['per_device_train_batch_size']:,}",
        **{name.replace("_", " "): str(said[name]) for name in names if name in said},
        "trained and decoded on": computed_on(found, run),
    }


def computed_on(found: Found, run: Run) -> str:
    """Where a run was trained and decoded, and which seeds were not trained in bfloat16."""
    trainings = found.trainings(run)
    said = [*trainings.values(), *(point for seed in SEEDS for point in found.decoded(run, seed))]
    places = [hardware(one.get("environment") or found.record["environment"]) for one in said]
    precisions = {seed: one.get("precision", "bfloat16") for seed, one in trainings.items()}
    odd = [f"seed {seed} trained in {p}" for seed, p in precisions.items() if p != "bfloat16"]
    return ", ".join([*dict.fromkeys(places), *odd])


def figures(found: Found) -> str:
    """The TPF of every run at equal accuracy, and its differences."""
    head = ("trained by", "decoded by", "TPF, each seed", "TPF − control", "TPF − start", "verdict")
    rows = []
    for run in (DMAX, BASE, *TRAINED):
        for decoding in run.decodings:
            way = DECODINGS[decoding][0]
            if run.recipe is None:
                rows.append((f"`{run.label}`", way, number(found.tpf(run, decoding)), "", "", ""))
                continue
            if figures := found.tpfs(run, decoding):
                each = ", ".join(map(number, figures))
                control = control_of(run)
                against = gap(differences(found, run, decoding, control)) if control else ""
                begun = gap(differences(found, run, decoding, start_of(run, decoding)))
                said = verdict(found, run, decoding)
                rows.append((run.label, way, each, against, begun, said))
    return table(head, rows)


def number(tpf: float | None) -> str:
    """A TPF, or that there is none."""
    return "never" if tpf is None else f"{tpf:.2f}"


def gap(values: Sequence[float] | None) -> str:
    """Differences of the seeds as text: the mean and its interval, if there are enough."""
    if not values:
        return "not compared"
    seeds = "" if len(values) == len(SEEDS) else f", {len(values)} of {len(SEEDS)} seeds"
    if len(values) < 2:
        return f"{values[0]:+.2f}{seeds}"
    mean, low, high = mean_interval(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}){seeds}"


def training(found: Found) -> str:
    """What every run took."""
    head = ("run", "recipe", "from", "steps", "sequences a step", "training", "decoding", "on")
    rows = []
    for run in TRAINED:
        if said := found.trainings(run):
            recipe = f"[{run.recipe}](../../recipes/{run.recipe}.yaml)"
            recipe += "".join(f", `{name}: {value}`" for name, value in run.overrides.items())
            first = next(iter(said.values()))
            trained = ", ".join(f"{one['seconds'] / 60:.1f}" for one in said.values())
            decoded = ", ".join(f"{found.decoding_seconds(run, seed) / 60:.1f}" for seed in said)
            steps = (str(first["steps"]), str(first["batch_size"]))
            times = (trained, decoded)
            start = f"`{run.start}`"
            rows.append((run.label, recipe, start, *steps, *times, computed_on(found, run)))
    return table(head, rows) if rows else "Nothing has been trained yet."


def missing(found: Found) -> str:
    """What is not measured, each with its command."""
    lines = []
    for run in TRAINED:
        measured = [found.seeds(run, decoding) for decoding in run.decodings]
        seeds = [str(seed) for seed in SEEDS if not all(seed in seeds for seeds in measured)]
        asked = f"python bench/beyond.py --only {run.name} --seeds {' '.join(seeds)}"
        lines += [f"- {run.label}: `{asked}`"] if seeds else []
    return "\n".join(lines or ["Nothing."])


def points_table(found: Found) -> str:
    """Every point, each seed and all together."""
    setting = ("trained by", "decoded by", "threshold")
    rows = []
    for run in (DMAX, BASE, *TRAINED):
        for decoding in run.decodings:
            seeds: list[int | None] = [*found.seeds(run, decoding)] if run.recipe else [None]
            curves = [found.curve(run, decoding, seed) for seed in seeds]
            for points in zip(*curves, strict=True):
                each = ", ".join(str(point["correct"]) for point in points)
                one = together(points, run.label)
                low, high = (100 * bound for bound in one["interval"])
                share = f"{one['correct']}/{one['total']} ({100 * one['accuracy']:.1f} %)"
                interval = f"{low:.1f} to {high:.1f}"
                name = (run.label, DECODINGS[decoding][0], f"{one['value']:g}")
                rows.append((*name, each, share, interval, f"{one['tpf']:.2f}"))
    return table((*setting, "each seed", "together", "95 % interval", "TPF"), rows)


TEMPLATE = """# What came after DMax, in miniature

{answer}

Runs differ from their control in more than the objective, so a gain may have other causes. OPUT on
answers of `tiny-dmax` was not run. What else differs:

{unequal}

Written by `python bench/beyond.py` from [beyond.json](beyond.json): {problems} unseen word problems
(seed 7) for every point, exact final answer.
Machine: {machine}.

**How it is judged**, written down before anything was measured. Equal accuracy is {level} % of the
answers, the lower end of the 95 % interval of `tiny-dmax` by SPD at 0.5; by threshold it is
{level_base} %, that of `tiny-base` at 0.95. We compare the largest TPF (tokens a forward) at which
a model still has it, interpolating between points. *Faster* means that this TPF is above that of
the control, which goes on with OPUT from the same model, and above that of the start (`tiny-dmax`,
or `tiny-base` by threshold), each with a 95 % interval over the seeds (Student's) that excludes
zero. *Within noise* means that at least one of the two intervals includes zero. OPUT is compared
with the start alone. A model is not compared if one of its seeds never has that accuracy. Where not
all seeds count, their number is given. The seeds differ in order and noise of training and share
the start and the problems. One rule came later: if the control of a seed never reaches that
accuracy, the seed is compared with the start alone.

![Accuracy against TPF by SPD](beyond-spd.svg)

![Accuracy against TPF by MBD, two open blocks](beyond-mbd.svg)

## TPF at equal accuracy

{figures}

## What the runs took

Minutes of wall time, each seed, with whatever else the machine did; up to 22 runs shared the GPU.
The time for writing answers and trajectories was not measured. CForce learns from trajectories of
the model it begins from, all others from the 5,000 answers of `tiny-base` that made `tiny-dmax`.

{training}

## Not measured yet

{missing}

## Every point

{points}
"""
