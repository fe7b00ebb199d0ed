"""The page of `bench/noise.py`: what it found in one sentence, curves, and every point."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from noise_kinds import PAIR
from noise_plan import (
    BUNDLED,
    CAREFUL,
    PRETRAINED,
    PRETRAINED_GPU,
    RATIOS,
    RECIPE_RATIO,
    THRESHOLDS,
    Design,
    base_label,
    looked_at,
)
from noise_points import (
    OURS,
    RANDOM,
    Comparison,
    Points,
    Record,
    scientific,
    seeds_in_words,
)
from noise_tables import (
    along_training,
    base_noise,
    comparison_table,
    draw,
    every_point,
    missing,
    percent,
    wrong_kinds,
)
from shares import Share, better, difference

from dmax.benchmark.run import machines
from dmax.files import read_record, write_atomically

CONTROLS = ("same-kind", "at-errors")
ELSEWHERE = {
    PRETRAINED: "On a pretrained model",
    PRETRAINED_GPU: "On a pretrained model that a GPU has trained",
}
BETWEEN_SEEDS = "The intervals do not cover how much one training differs from another."
Place = tuple[float, int]
"""A rate and a number of steps."""
BASE_PLACES = (("threshold", CAREFUL), *(("spd", threshold) for threshold in THRESHOLDS))
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


def write_page(points_file: Path, looks_file: Path, design: Design) -> None:
    """Write the page and its curves beside the records, with all that is planned or measured."""
    record = read_record(points_file)
    looked = read_record(looks_file)
    points = Points(record, design.stages)
    draw(points, points_file.with_suffix(".svg"))
    parts = (
        f"# {design.title}",
        *map(_filled, findings(points, looked["looks"], points_file, design)),
        how_measured(record, looked, points_file.stem, design),
        f"![Accuracy over training steps for each kind of noise]({points_file.stem}.svg)",
        f"## The design, written before any result\n\n{design.text.strip()}",
        *sections(points, looked["looks"], design),
    )
    write_atomically(points_file.with_suffix(".md"), "\n\n".join(filter(None, parts)) + "\n")


def _filled(text: str) -> str:
    return textwrap.fill(text, width=100)


def findings(points: Points, found: Record, points_file: Path, design: Design) -> Iterator[str]:
    """What was found, each in a paragraph; empty ones have nothing to say."""
    compared = list(points.comparisons(RANDOM))
    planned = len(points.rates) * len(points.steps) * len(THRESHOLDS)
    yield f"{sentence(compared, planned)} {extremes(compared)}".strip()
    if split := by_seed(points, compared):
        yield f"{split} {BETWEEN_SEEDS}"
    yield how_far(compared)
    yield speed(compared)
    if design.expected:
        yield as_expected(compared, design.expected)
    yield untrained(points)
    yield plausible(found)
    if points.has(CONTROLS):
        yield controls(points)
    if points_file.stem == BUNDLED:
        for name, base in ELSEWHERE.items():
            other = points_file.with_name(f"{name}.json")
            if other.exists():
                yield elsewhere(Points(read_record(other), []), name, base)


def speed(comparisons: Sequence[Comparison]) -> str:
    """Which noise makes models that write more tokens a forward at the same threshold."""
    if not comparisons:
        return ""
    faster = sum(each.own.tpf > each.other.tpf for each in comparisons)
    told = (
        "At the same threshold, models trained on own tokens write more tokens a forward in "
        f"{faster} of {len(comparisons)} settings."
    )
    level = [each for each in comparisons if each.verdict == "within noise"]
    if level:
        slower = sum(each.own.tpf < each.other.tpf for each in level)
        told += (
            " Where neither noise is better, models trained on random tokens write more in "
            f"{slower} of {len(level)}."
        )
    return told


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


def elsewhere(points: Points, name: str, base: str) -> str:
    """What the study of another base has found, in short."""
    compared = list(points.comparisons(RANDOM))
    verdicts = [each.verdict for each in compared]
    won, lost = (verdicts.count(verdict) for verdict in ("holds", "fails"))
    told = (
        f"[{base}]({name}.md), own tokens are better in {won} of "
        f"{len(verdicts)} settings, and worse in {lost}. {by_seed(points, compared)}"
    )
    return told.strip()


def how_measured(record: Record, looked: Record, name: str, design: Design) -> str:
    """Problems, machine, time and command."""
    timed = [p for p in record["points"] if p["tokens_per_second"]]  # not where nothing was written
    decoding = sum(p["generated_tokens"] / p["tokens_per_second"] for p in timed)
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
    claim = (
        f"matters {_places([(each.rate, each.steps) for each in won])}"
        if won
        else "does not help here"
    )
    return (
        f"On-policy noise {claim}: own tokens are better than random ones beyond chance in "
        f"{len(won)} of {settings} and worse in {len(lost)}."
    )


def extremes(comparisons: Sequence[Comparison]) -> str:
    """Where own tokens gain most beyond chance, and where they lose most."""
    told = []
    for verdict, verb in (("holds", "gain"), ("fails", "lose")):
        some = [each for each in comparisons if each.verdict == verdict]
        if some:
            told.append(f"The most they {verb} is after {_largest(some).figures}.")
    return " ".join(told)


def by_seed(points: Points, comparisons: Sequence[Comparison]) -> str:
    """In how many settings the seeds, each by itself, do not agree on who is better."""
    several = [each for each in comparisons if len(each.seeds) > 1]
    num_split = sum(_is_split(points, each) for each in several)
    if not num_split:
        return ""
    return (
        f"In {num_split} of the {len(several)} settings with several seeds, these do not agree on "
        "who is better."
    )


def _is_split(points: Points, comparison: Comparison) -> bool:
    """Whether own tokens are ahead with one seed and behind with another."""
    place = (comparison.rate, comparison.steps, comparison.threshold)
    leads = []
    for seed in comparison.seeds:
        own, other = (points.pooled(noise, *place, (seed,)) for noise in PAIR)
        leads.append(own.rate - other.rate)
    return min(leads) < 0 < max(leads)


def how_far(comparisons: Sequence[Comparison]) -> str:
    """Where own tokens are better, by the rate times the steps, which all rates have in common."""
    won = [_distance(each) for each in comparisons if each.verdict == "holds"]
    if not won or len({each.rate for each in comparisons}) == 1:
        return ""
    first, last = min(won), max(won)
    every = [_distance(each) for each in comparisons]
    below = sum(distance < first for distance in every)
    above = sum(distance > last for distance in every)
    within = len(every) - below - above
    return (
        f"Own tokens are better where the rate times the steps is {first:.2g} to {last:.2g}: in "
        f"{len(won)} of the {within} settings there. Of the others, {below} have less and {above} "
        f"have more. (The range was taken from these results.)"
    )


def as_expected(comparisons: Sequence[Comparison], expected: Sequence[Place]) -> str:
    """Whether own tokens are better where the design expected it, and nowhere else."""
    there = [each.verdict for each in comparisons if (each.rate, each.steps) in expected]
    others = [each.verdict for each in comparisons if (each.rate, each.steps) not in expected]
    told = (
        f"Own tokens were expected to lead {_places(expected)}: they do in {there.count('holds')} "
        f"of {len(there)} settings there"
    )
    if others:
        return f"{told}, and in {others.count('holds')} of {len(others)} others."
    return f"{told}. No other setting is measured yet."


def _distance(comparison: Comparison) -> float:
    """How far a run may have gone: its rate times its steps."""
    return float(f"{comparison.rate * comparison.steps:.6g}")  # without the last bits of a product


def _places(places: Sequence[Place]) -> str:
    """The steps of each rate among them, as "after 25, 50 and 100 steps at a rate of 8e-4"."""
    steps: dict[float, list[str]] = {}
    for rate, number in places:
        steps.setdefault(rate, []).append(f"{number:,}")
    return ", ".join(
        f"after {_listed(dict.fromkeys(numbers))} steps at a rate of {scientific(rate)}"
        for rate, numbers in steps.items()
    )


def _listed(words: Iterable[str]) -> str:
    """Words as "one, two and three"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


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
    seeds = seeds_in_words(sorted({seed for each in compared for seed in each.seeds}))
    return f"better in {won} of {len(verdicts)} settings, worse in {lost} ({seeds})"


def _largest(comparisons: Sequence[Comparison]) -> Comparison:
    """The one with the largest difference, whoever gains."""
    return max(comparisons, key=lambda each: abs(difference(each.own, each.other)[0]))
