"""The page of `bench/noise.py`: what it found in one sentence, curves, and every point."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from noise_kinds import KIND_NAMES, NOISES, PAIR
from noise_plan import (
    BASE,
    BUNDLED,
    CAREFUL,
    PRETRAINED,
    RATIOS,
    THRESHOLDS,
    Design,
    Run,
    Stage,
    base_label,
    looked_at,
    stage_of,
)
from paper import Share, better, difference, gap

from dmax.benchmark.run import machines
from dmax.evaluation.plots import looks as looks_of
from dmax.evaluation.statistics import wilson_interval
from dmax.files import read_record, write_atomically

Record = dict[str, Any]
OURS, RANDOM = PAIR
CONTROLS = ("same-kind", "at-errors")
BASE_PLACES = (("threshold", CAREFUL), *(("spd", threshold) for threshold in THRESHOLDS))
RECIPE_RATIO = 0.75


@dataclass(frozen=True, slots=True)
class Comparison:
    """Own tokens against others after the same training, decoded alike.

    Attributes:
        rate: learning rate.
        steps: of training.
        threshold: of SPD.
        seeds: those that both have, pooled.
        own: `sampled`, or another kind of noise.
        other: `random`, likewise.
    """

    rate: float
    steps: int
    threshold: float
    seeds: tuple[int, ...]
    own: Share
    other: Share

    @property
    def verdict(self) -> str:
        """Whether own tokens are better: "holds", "fails" or "within noise"."""
        return better(self.own, self.other)

    @property
    def setting(self) -> str:
        """The setting in words."""
        where = f"{self.steps:,} steps at {scientific(self.rate)}, threshold {self.threshold:g}"
        return f"{where}, {_seeds(self.seeds)}"

    @property
    def figures(self) -> str:
        """Setting, counts and difference."""
        return f"{self.setting}: {self.own} against {self.other}, {gap(self.own, self.other)}"


class Points:
    """The measured points, by what was trained and how it was decoded.

    Args:
        record: of a sweep.
        asked: stages that the page lists, measured or not, beside those of the record.

    Attributes:
        rates: of all these stages, rising.
        steps: likewise.
        all_seeds: likewise.
    """

    def __init__(self, record: Record, asked: Sequence[Stage]) -> None:
        base = [p for p in record["points"] if p["label"] == BASE]
        self._base = {(p["strategy"], p["value"]): p for p in base}
        others = [p for p in record["points"] if p["label"] != BASE]
        self._by_place = {(p["label"], p["value"]): p for p in others}
        stages = [*asked, *(stage_of(label) for label, _ in self._by_place)]
        self.rates = sorted({run.rate for run, _ in stages})
        self.steps = sorted({steps for _, steps in stages})
        self.all_seeds = sorted({run.seed for run, _ in stages})

    def at(self, noise: str, rate: float, steps: int, threshold: float, seed: int) -> Record | None:
        """One point; None if it is not measured yet."""
        return self._by_place.get((Run(noise, rate, seed).label(steps), threshold))

    def seeds(self, noise: str, rate: float, steps: int, threshold: float) -> tuple[int, ...]:
        """The seeds that are measured."""
        place = (noise, rate, steps, threshold)
        return tuple(seed for seed in self.all_seeds if self.at(*place, seed) is not None)

    def pooled(
        self, noise: str, rate: float, steps: int, threshold: float, seeds: Sequence[int]
    ) -> Share:
        """Several seeds together."""
        found = [self.at(noise, rate, steps, threshold, seed) for seed in seeds]
        return _share([point for point in found if point is not None])

    def base(self, strategy: str, threshold: float) -> Share | None:
        """The base before any step; None if that is not measured."""
        point = self._base.get((strategy, threshold))
        return None if point is None else _share([point])

    def has(self, noises: Sequence[str]) -> bool:
        """Whether anything is measured of one of these kinds of noise."""
        return any(stage_of(label)[0].noise in noises for label, _ in self._by_place)

    def comparisons(self, other: str, own: str = OURS) -> Iterator[Comparison]:
        """A kind of noise against another one in all settings that both are measured in."""
        for rate in self.rates:
            for steps in self.steps:
                for threshold in THRESHOLDS:
                    place = (rate, steps, threshold)
                    both = (own, other)
                    ours, theirs = (set(self.seeds(noise, *place)) for noise in both)
                    seeds = tuple(sorted(ours & theirs))
                    if seeds:
                        shares = [self.pooled(noise, *place, seeds) for noise in both]
                        yield Comparison(*place, seeds, *shares)


def _share(points: Sequence[Record]) -> Share:
    """Points together."""
    names = ("correct", "total", "generated_tokens", "num_forwards")
    correct, total, tokens, forwards = (sum(p[name] for p in points) for name in names)
    return Share(correct, total, tokens / forwards)


def scientific(rate: float) -> str:
    """A learning rate as 8e-4."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def sentence(comparisons: Sequence[Comparison], planned: int) -> str:
    """When on-policy noise matters, with counts, of so many settings that are to be compared."""
    if not comparisons:
        return "Nothing is measured yet."
    total = len(comparisons)
    settings = f"{total} settings"
    if total < planned:
        settings = f"the {total} settings measured so far ({planned} are planned)"
    won = [each for each in comparisons if each.verdict == "holds"]
    lost = [each for each in comparisons if each.verdict == "fails"]
    parts = [
        f"own tokens are better than random ones beyond chance in {len(won)} of {settings} "
        f"and worse in {len(lost)}"
    ]
    if won:
        parts.append(f"the most they gain is after {_largest(won).figures}")
    if lost:
        parts.append(f"the most they lose is after {_largest(lost).figures}")
    claim = f"matters {_places(won)}" if won else "does not matter here"
    return f"On-policy noise {claim}: {'; '.join(parts)}."


def how_far(comparisons: Sequence[Comparison]) -> str:
    """Where own tokens are better, by the rate times the steps, which all rates have in common."""
    won = [_distance(each) for each in comparisons if each.verdict == "holds"]
    if not won:
        return ""
    first, last = min(won), max(won)
    every = [_distance(each) for each in comparisons]
    below = sum(distance < first for distance in every)
    above = sum(distance > last for distance in every)
    within = len(every) - below - above
    return (
        f"These settings lie where the rate times the steps is {first:.2g} to {last:.2g}: own "
        f"tokens are better in {len(won)} of the {within} settings there. Of the others, {below} "
        f"have less and {above} have more. (The range was taken from these results.)"
    )


def _distance(comparison: Comparison) -> float:
    """How far a run may have gone: its rate times its steps."""
    return float(f"{comparison.rate * comparison.steps:.6g}")  # without the last bits of a product


def _places(comparisons: Sequence[Comparison]) -> str:
    """The steps of every rate that is among them, as "after 25 and 50 steps at a rate of 8e-4"."""
    steps: dict[float, list[str]] = {}
    for each in comparisons:
        steps.setdefault(each.rate, []).append(f"{each.steps:,}")
    return ", ".join(
        f"after {' and '.join(dict.fromkeys(numbers))} steps at a rate of {scientific(rate)}"
        for rate, numbers in steps.items()
    )


def plausible(found: Record) -> str:
    """Which share of wrong tokens the base finds plausible, at the mask ratio of the runs."""
    look = found[base_label(RECIPE_RATIO)]
    shares = [percent(look[noise]["plausible"], look[noise]["wrong"]) for noise in PAIR]
    return (
        f"The base finds {shares[0]} of its own wrong tokens plausible, {shares[1]} of random ones."
    )


def reasons(points: Points, found: Record) -> list[str]:
    """What was found of the reasons (a), (b) and (d) of the design; (c) is in the curves."""
    of_a_kind = _tally(points, RANDOM, "same-kind")
    errors = ", ".join(
        f"{percent(look['wrong'], look['positions'])} at a mask ratio of {ratio:g}"
        for ratio in RATIOS
        for look in [found[base_label(ratio)][OURS]]
    )
    return [
        f"(a) Random tokens of the same kind against any random ones: {of_a_kind}. "
        f"{recognition(points, found)}",
        f"(b) By the counts at the top, {consequence(points)}.",
        f"(d) Of masked positions the base's samples are wrong at {errors}.",
    ]


def recognition(points: Points, found: Record) -> str:
    """Which wrong tokens one forward mends, and which right ones it breaks, along training."""
    base = found[base_label(RECIPE_RATIO)]
    own = base["argmax"]
    random = base["at-errors"]
    mending: list[str] = []
    keeping: list[str] = []
    for rate in points.rates:
        for steps in points.steps:
            labels = [looked_at(found, noise, rate, steps) for noise in PAIR]
            looks = [found[label]["argmax"] for label in labels if label is not None]
            if len(looks) < len(PAIR):
                continue
            mended = [Share(look["mended"], look["wrong"], 0) for look in looks]
            kept = [Share(look["right"] - look["broken"], look["right"], 0) for look in looks]
            mending.append(better(*mended))
            keeping.append(better(*kept))
    more, fewer = mending.count("holds"), mending.count("fails")
    better_kept, worse_kept = keeping.count("holds"), keeping.count("fails")
    return (
        f"The untrained base mends {percent(random['mended'], random['wrong'])} of random tokens "
        f"in the place of its errors, and {percent(own['mended'], own['wrong'])} of its own. Of "
        f"trained models' own wrong tokens one forward mends more, beyond chance, after training "
        f"on own tokens than after training on random ones in {more} of {len(mending)} looks, and "
        f"fewer in {fewer}; of their right ones it breaks fewer in {better_kept} and more in "
        f"{worse_kept}. All looks are in a table below."
    )


def controls(points: Points) -> str:
    """Own tokens against the two controls: does the number of wrong tokens matter, or which?"""
    return (
        f"Own tokens against as many random ones at the same positions: "
        f"{_tally(points, 'at-errors')}. Against random tokens of the same kind at most "
        f"positions: {_tally(points, 'same-kind')}. So {consequence(points)}."
    )


def consequence(points: Points) -> str:
    """What the two controls tell."""
    if _gain(points, "at-errors") > 0:
        return "it matters which tokens are wrong"
    if _gain(points, "same-kind") > 0:
        return "it matters how many tokens are wrong, and not which ones"
    return "neither the number nor the kind of wrong tokens has shown to matter"


def _gain(points: Points, other: str) -> int:
    """In how many more settings own tokens are better than another kind of noise than worse."""
    verdicts = [each.verdict for each in points.comparisons(other)]
    return verdicts.count("holds") - verdicts.count("fails")


def _tally(points: Points, other: str, own: str = OURS) -> str:
    """How often a kind of noise is better than another, and worse."""
    compared = list(points.comparisons(other, own))
    if not compared:
        return "not measured yet"
    verdicts = [each.verdict for each in compared]
    won, lost = (verdicts.count(verdict) for verdict in ("holds", "fails"))
    seeds = _seeds(sorted({seed for each in compared for seed in each.seeds}))
    return f"better in {won} of {len(verdicts)} settings, worse in {lost} ({seeds})"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _largest(comparisons: Sequence[Comparison]) -> Comparison:
    """The one with the largest difference, whoever gains."""
    return max(comparisons, key=lambda each: abs(difference(each.own, each.other)[0]))


# --- the curves -----------------------------------------------------------------------------------


def draw(points: Points, path: Path) -> None:
    """Accuracy over steps as an SVG, a panel for each rate and threshold, a line for each noise."""
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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Every comparison of `PAIR`."""
    head = ("rate", "steps", "threshold", "seeds", "own, sampled", "random", "difference", "")
    marks = {"holds": "**own is better**", "fails": "**random is better**", "within noise": ""}
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
    rows = [("the base", "", "0", *_look(found[base_label(RECIPE_RATIO)]))] if found else []
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


def write_page(points_file: Path, looks_file: Path, asked: Sequence[Stage], design: Design) -> None:
    """Write the page and its curves beside the records, with all stages that were asked for."""
    record = read_record(points_file)
    looked = read_record(looks_file)
    points = Points(record, asked)
    draw(points, points_file.with_suffix(".svg"))
    parts = (
        f"# {design.title}",
        *map(_filled, findings(points, looked["looks"], points_file)),
        how_measured(record, looked, points_file.stem, design),
        f"![Accuracy over training steps for each kind of noise]({points_file.stem}.svg)",
        f"## The design, written before any result\n\n{design.text.strip()}",
        *sections(points, looked["looks"], design),
    )
    write_atomically(points_file.with_suffix(".md"), "\n\n".join(filter(None, parts)) + "\n")


def _filled(text: str) -> str:
    return textwrap.fill(text, width=100)


def findings(points: Points, found: Record, points_file: Path) -> Iterator[str]:
    """What was found, each in a paragraph; empty ones have nothing to say."""
    compared = list(points.comparisons(RANDOM))
    yield sentence(compared, len(points.rates) * len(points.steps) * len(THRESHOLDS))
    yield how_far(compared)
    yield untrained(points)
    yield plausible(found)
    if points.has(CONTROLS):
        yield controls(points)
    other = points_file.with_name(f"{PRETRAINED}.json")
    if points_file.stem == BUNDLED and other.exists():
        yield elsewhere(Points(read_record(other), []))


def untrained(points: Points) -> str:
    """What the base solves before any step."""
    careful, *soft = [points.base(*place) for place in BASE_PLACES]
    if careful is None or None in soft:
        return ""
    by_spd = " and ".join(
        f"{share} at {threshold:g}" for share, threshold in zip(soft, THRESHOLDS, strict=True)
    )
    return (
        f"Before any step, the base solves {careful} by threshold {CAREFUL:g}, and by SPD {by_spd}."
    )


def elsewhere(points: Points) -> str:
    """What the study of a pretrained model has found, in short."""
    verdicts = [each.verdict for each in points.comparisons(RANDOM)]
    won, lost = (verdicts.count(verdict) for verdict in ("holds", "fails"))
    return (
        f"[On a pretrained model]({PRETRAINED}.md), own tokens are better in {won} of "
        f"{len(verdicts)} settings, and worse in {lost}."
    )


def how_measured(record: Record, looked: Record, name: str, design: Design) -> str:
    """Problems, machine, time and command."""
    decoding = sum(p["generated_tokens"] / p["tokens_per_second"] for p in record["points"])
    hours = (sum(looked["seconds"].values()) + decoding) / 3600
    return MEASURED.format(
        total=record["limit"],
        machine=machines(record),
        hours=hours,
        command=design.command,
        name=name,
    )


def sections(points: Points, found: Record, design: Design) -> Iterator[str]:
    """The tables, each under its heading."""
    if points.has(CONTROLS):
        told = [
            textwrap.fill(f"- {reason}", width=100, subsequent_indent="  ")
            for reason in reasons(points, found)
        ]
        yield "## What came of the reasons\n\n" + "\n".join(told)
    compared = list(points.comparisons(RANDOM))
    yield f"## Own tokens against random tokens\n\n{comparison_table(compared)}"
    trained = (
        "What trained models (of one seed) say in place of the masks at once, and what one more "
        "forward makes of it: wrong tokens mended and right ones broken, of their own tokens by "
        "argmax, and of their samples with random tokens where those are wrong. " + design.note
    )
    yield LOOKS.format(
        base_noise=base_noise(found), wrong_kinds=wrong_kinds(found), trained=_filled(trained)
    )
    yield along_training(found, points)
    yield f"## Every point\n\n{every_point(points)}"
    goes_on = f"How far each run is. `{design.command}` goes on from here."
    yield f"## What is measured\n\n{goes_on}\n\n{missing(points, design.noises)}"


MEASURED = """\
{total} problems a point and seed, exact final answer, seeds pooled, intervals of 95 %. All seeds
decode the same problems, so pooled intervals are somewhat too narrow. Machine: {machine}.
Training and decoding took {hours:.1f} hours. `{command}` wrote this page from
[{name}.json]({name}.json) and [{name}_tokens.json]({name}_tokens.json)."""
LOOKS = """\
## Where the noise differs

What stands at masked positions of held-out examples when the base is trained:

{base_noise}

At the mask ratio of the runs, by the kind of the clean token:

{wrong_kinds}

{trained}"""
