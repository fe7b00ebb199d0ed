"""What `bench/noise.py` has measured: points pooled over seeds, and comparisons of noises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from noise_kinds import PAIR
from noise_plan import BASE, THRESHOLDS, Run, Stage, stage_of
from shares import Share, gap, pooled, verdict

Record = dict[str, Any]
OURS, RANDOM = PAIR


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
        """Whether it holds that own tokens are better."""
        return verdict(self.own, self.other)

    @property
    def setting(self) -> str:
        """The setting in words."""
        where = f"{self.steps:,} steps at {scientific(self.rate)}, threshold {self.threshold:g}"
        return f"{where}, {seeds_in_words(self.seeds)}"

    @property
    def figures(self) -> str:
        """Setting, counts and difference."""
        return f"{self.setting}: {self.own} against {self.other}, {gap(self.own, self.other)}"


class Points:
    """The measured points, by what was trained and how it was decoded.

    Args:
        record: of a sweep.
        planned: stages that the page lists, measured or not, beside those of the record.

    Attributes:
        rates: of all these stages, rising.
        steps: likewise.
        all_seeds: likewise.
    """

    def __init__(self, record: Record, planned: Sequence[Stage]) -> None:
        base = [p for p in record["points"] if p["label"] == BASE]
        self._base = {(p["strategy"], p["value"]): p for p in base}
        others = [p for p in record["points"] if p["label"] != BASE]
        self._by_place = {(p["label"], p["value"]): p for p in others}
        stages = [*planned, *(stage_of(label) for label, _ in self._by_place)]
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
        return pooled([point for point in found if point is not None])

    def base(self, strategy: str, threshold: float) -> Share | None:
        """The base before any step; None if that is not measured."""
        point = self._base.get((strategy, threshold))
        return None if point is None else pooled([point])

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

    def pairs(self, other: str, own: str = OURS) -> Iterator[tuple[Record, Record]]:
        """The points of each seed by which `comparisons` compares."""
        for each in self.comparisons(other, own):
            place = (each.rate, each.steps, each.threshold)
            for seed in each.seeds:
                ours, theirs = (self.at(noise, *place, seed) for noise in (own, other))
                if ours is not None and theirs is not None:
                    yield ours, theirs


def scientific(rate: float) -> str:
    """A learning rate as 8e-4."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Seeds as "seeds 1, 2"."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
