"""What the study of noise has found, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from noise_kinds import PAIR
from noise_plan import CAREFUL, RATIOS, RECIPE_RATIO, THRESHOLDS, base_label, looked_at
from noise_points import (
    OURS,
    RANDOM,
    Comparison,
    Points,
    Record,
    scientific,
    seeds_in_words,
)
from noise_tables import percent
from shares import FAILS, HOLDS, WITHIN_NOISE, Share, difference, verdict

BETWEEN_SEEDS = "The intervals do not cover how much one training differs from another."
BASE_PLACES = (("threshold", CAREFUL), *(("spd", threshold) for threshold in THRESHOLDS))
ARGMAX = "argmax"
Place = tuple[float, int]
"""A rate and a number of steps."""


def speed(comparisons: Sequence[Comparison]) -> str:
    """Which noise makes models that write more tokens a forward at the same threshold."""
    if not comparisons:
        return ""
    faster = sum(each.own.tpf > each.other.tpf for each in comparisons)
    told = (
        "At the same threshold, models trained on own tokens write more tokens a forward in "
        f"{faster} of {len(comparisons)} settings."
    )
    level = [each for each in comparisons if each.verdict == WITHIN_NOISE]
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


def elsewhere(points: Points, name: str, base: str, here: Sequence[Comparison]) -> str:
    """What the study of another base has found, also where own tokens are better on this one."""
    compared = list(points.comparisons(RANDOM))
    won, lost = counted(compared)
    told = f"[{base}]({name}.md), own tokens are better in {won} of {len(compared)} settings, "
    told += f"and worse in {lost}."
    if bounds := winning(here):
        first, last = bounds
        inside = sum(first <= _distance(each) <= last for each in compared)
        told += f" By the rate times the steps, {inside} of these settings lie in the range above."
    return f"{told} {by_seed(points, compared)}".strip()


def sentence(comparisons: Sequence[Comparison], planned: int) -> str:
    """When on-policy noise matters, with counts, of so many settings that are to be compared."""
    if not comparisons:
        return "Nothing is measured yet."
    total = len(comparisons)
    settings = f"{total} settings"
    if total < planned:
        settings = f"the {total} settings measured so far ({planned} are planned)"
    won = [each for each in comparisons if each.verdict == HOLDS]
    claim = "has not been seen to help here"
    if won:
        claim = f"matters {_places([(each.rate, each.steps) for each in won])}"
    num_won, num_lost = counted(comparisons)
    told = (
        f"On-policy noise {claim}: own tokens are better than random ones beyond chance in "
        f"{num_won} of {settings} and worse in {num_lost}."
    )
    if single := sum(len(each.seeds) == 1 for each in won):
        told += f" {single} of the {num_won} rest on one seed."
    return told


def counted(comparisons: Iterable[Comparison]) -> tuple[int, int]:
    """In how many settings the first noise is better beyond chance, and in how many worse."""
    verdicts = [each.verdict for each in comparisons]
    return verdicts.count(HOLDS), verdicts.count(FAILS)


def extremes(comparisons: Sequence[Comparison]) -> str:
    """Where own tokens gain most beyond chance, and where they lose most."""
    told = []
    for name, verb in ((HOLDS, "gain"), (FAILS, "lose")):
        some = [each for each in comparisons if each.verdict == name]
        if some:
            told.append(f"The most they {verb} is after {_largest(some).figures}.")
    return " ".join(told)


def by_seed(points: Points, comparisons: Sequence[Comparison]) -> str:
    """In how many settings the seeds, each by itself, do not agree on who is better."""
    several = [each for each in comparisons if len(each.seeds) > 1]
    split = [each for each in several if _is_split(points, each)]
    if not split:
        return ""
    apart = sum(counted(split))
    counts = f"{apart} of them count" if apart > 1 else f"{apart or 'none'} of them counts"
    return (
        f"In {len(split)} of the {len(several)} settings with several seeds, the seeds disagree "
        f"about which noise is better; {counts} as better or worse above."
    )


def _is_split(points: Points, comparison: Comparison) -> bool:
    """Whether own tokens are ahead with one seed and behind with another."""
    place = (comparison.rate, comparison.steps, comparison.threshold)
    leads = []
    for seed in comparison.seeds:
        own, other = (points.pooled(noise, *place, (seed,)) for noise in PAIR)
        leads.append(own.rate - other.rate)
    return min(leads) < 0 < max(leads)


def winning(comparisons: Sequence[Comparison]) -> tuple[float, float] | None:
    """Least and largest rate times steps at which own tokens are better; None where they never are.

    It is also None where there is only one rate, which has nothing in common with others.
    """
    won = [_distance(each) for each in comparisons if each.verdict == HOLDS]
    if not won or len({each.rate for each in comparisons}) == 1:
        return None
    return min(won), max(won)


def how_far(comparisons: Sequence[Comparison]) -> str:
    """Where own tokens are better, by the rate times the steps, which all rates have in common."""
    bounds = winning(comparisons)
    if bounds is None:
        return ""
    first, last = bounds
    every = [_distance(each) for each in comparisons]
    below = sum(distance < first for distance in every)
    above = sum(distance > last for distance in every)
    within = len(every) - below - above
    num_won, _ = counted(comparisons)
    return (
        f"Own tokens are better in {num_won} of the {within} settings in which the rate times the "
        f"steps is {first:.2g} to {last:.2g}, and in none of the {below} below and the {above} "
        "above. (The range was taken from these results.)"
    )


def as_expected(comparisons: Sequence[Comparison], expected: Sequence[Place]) -> str:
    """Whether own tokens are better where the design expected it, and nowhere else."""
    there = [each.verdict for each in comparisons if (each.rate, each.steps) in expected]
    others = [each.verdict for each in comparisons if (each.rate, each.steps) not in expected]
    where = f"Own tokens were expected to lead {_places(expected)}"
    elsewhere = f"in {others.count(HOLDS)} of {len(others)} others"
    if not there:
        return f"{where}, of which nothing is measured yet. They do {elsewhere}."
    told = f"{where}: they do in {there.count(HOLDS)} of {len(there)} settings there"
    return f"{told}, and {elsewhere}." if others else f"{told}. No other setting is measured yet."


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
    look = found.get(base_label(RECIPE_RATIO))
    if look is None:
        return ""
    shares = [percent(look[noise]["plausible"], look[noise]["wrong"]) for noise in PAIR]
    return (
        f"The base gives at least 1 % of its probability to each of {shares[0]} of its own wrong "
        f"tokens, and of {shares[1]} of random ones."
    )


def reasons(points: Points, found: Record) -> list[str]:
    """What was found of each reason of the design."""
    of_a_kind = _tally(points, RANDOM, "same-kind")
    compared = list(points.comparisons(RANDOM))
    errors = ", ".join(
        f"{percent(look['wrong'], look['positions'])} at a mask ratio of {ratio:g}"
        for ratio in RATIOS
        if base_label(ratio) in found
        for look in [found[base_label(ratio)][OURS]]
    )
    regime = how_far(compared) or "No range of steps and rates has shown."
    told = f"Of masked positions the base's samples are wrong at {errors}." if errors else ""
    return [
        f"(a) Random tokens of the same kind against any random ones: {of_a_kind}. "
        f"{recognition(points, found)}".strip(),
        f"(b) {consequence(points)}",
        f"(c) {regime}",
        f"(d) {told or 'The base has not been looked at yet.'}",
    ]


def recognition(points: Points, found: Record) -> str:
    """Which wrong tokens one forward mends, and which right ones it breaks, along training."""
    base = found.get(base_label(RECIPE_RATIO))
    if base is None:
        return ""
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
            mending += [verdict(*mended)] if all(share.total for share in mended) else []
            keeping += [verdict(*kept)] if all(share.total for share in kept) else []
    more, fewer = mending.count(HOLDS), mending.count(FAILS)
    better_kept, worse_kept = keeping.count(HOLDS), keeping.count(FAILS)
    return (
        f"The untrained base mends {percent(random['mended'], random['wrong'])} of random tokens "
        f"in the place of its errors, and {percent(own['mended'], own['wrong'])} of its own. "
        "Trained models were compared by what one more forward makes of their own tokens. A model "
        "trained on own tokens mends more of its own errors than one trained on random tokens in "
        f"{more} of {len(mending)} comparisons, and fewer in {fewer}. It breaks fewer of its own "
        f"right tokens in {better_kept}, and more in {worse_kept}. All are in a table below."
    )


def controls(points: Points) -> str:
    """Own tokens against the two controls: does the number of wrong tokens matter, or which?"""
    return (
        f"Own tokens against random ones only where the model errs: {_tally(points, 'at-errors')}. "
        "Against random tokens of the same kind everywhere: "
        f"{_tally(points, 'same-kind')}. {consequence(points)}"
    )


def published(points: Points) -> str:
    """How the published noise compares, own tokens by argmax."""
    return (
        f"Own tokens by argmax, as published, against random ones: {_tally(points, RANDOM, ARGMAX)}"
        f". Against sampled ones: {_tally(points, OURS, ARGMAX)}."
    )


def consequence(points: Points) -> str:
    """What the two controls tell, as a sentence."""
    if not all(any(points.comparisons(other)) for other in ("at-errors", "same-kind")):
        return "The number of wrong tokens is told from which they are once both are measured."
    if _gain(points, "at-errors") > 0:
        return "It matters which wrong tokens stand where the model errs."
    if _gain(points, "same-kind") > 0:
        return (
            "Random tokens do as well as its own or better where they stand only in the places of "
            "the model's errors, and worse where they stand everywhere. Whether their number or "
            "their place makes the difference, these controls do not tell."
        )
    return "Neither the number nor the kind of wrong tokens has been seen to matter."


def _gain(points: Points, other: str) -> int:
    """In how many more settings own tokens are better than another kind of noise than worse."""
    won, lost = counted(points.comparisons(other))
    return won - lost


def _tally(points: Points, other: str, own: str = OURS) -> str:
    """How often a kind of noise is better than another, and worse."""
    compared = list(points.comparisons(other, own))
    if not compared:
        return "not measured yet"
    won, lost = counted(compared)
    seeds = seeds_in_words(sorted({seed for each in compared for seed in each.seeds}))
    return f"better in {won} of {len(compared)} settings, worse in {lost} ({seeds})"


def _largest(comparisons: Sequence[Comparison]) -> Comparison:
    """The one with the largest difference, whoever gains."""
    return max(comparisons, key=lambda each: abs(difference(each.own, each.other)[0]))
