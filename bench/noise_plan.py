"""What `bench/noise.py` trains, in which order, and why: written before any result."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

DESIGN = """
The paper finds random-token training far worse than on-policy training: 68.7 % against 91 to 92 %
on GSM8K (claim 23 of [the paper's experiments in miniature](README.md)). On the bundled base they
came out alike, after 300 steps at a learning rate of 8e-4 with cosine decay. The paper's rate is
2e-6, with which a model changes little. So the noise is varied with the number of steps and the
rate.

- **Noise** in the second stream of training, all else equal: the model's own tokens, sampled;
  random tokens, as the paper's baseline has them; own tokens by argmax, as published; and two
  controls. *Random tokens of the same kind* are a number for a number: wrong tokens that are not
  on-policy, and that their kind does not give away. *Random tokens where its own are wrong* leave
  own tokens that are right: as many wrong tokens as on-policy, at the same positions, but others.
- **Steps:** 25, 50, 100, 200, 400, 1,200. One run gives all: the rate is constant after ten steps
  of warm-up, and the run is decoded on its way. A point of such a run is not a cosine run of so
  many steps, which is what the paper has.
- **Learning rates:** 8e-4, that of the bundled models, 8e-5 and 8e-6. Three seeds.
- **Decoding:** SPD with its defaults at thresholds 0 and 0.5, on 200 unseen problems. The paper
  decodes its baseline by another rule, which predicts all tokens anew until nothing changes.
- **What is compared:** the accuracy of own tokens, sampled, and of random tokens, after the same
  steps, at the same rate and threshold, over the seeds that both have. A difference counts if its
  95 % interval (Newcombe's) leaves out zero. By chance alone, one comparison in 40 counts for
  either side.
- **A wrong token is plausible** if the base, shown the masked stream, gives it a probability of at
  least 1 % at its position. Also counted is a rank of 10 or better. It is measured on the last 128
  examples of the data, which no run learns from.

Why the small setting may show no difference:

- (a) Random tokens are always recognised. Then training on them mends random tokens and not the
  model's own errors, and those of the same kind come between the two.
- (b) It is the amount. Random noise makes three quarters of the positions wrong, on-policy noise as
  many as the model has errors. Then random tokens where its own are wrong do as well as its own.
- (c) It is the regime. Then the differences depend on steps and rate.
- (d) The base errs too little or too much for its errors to teach anything: its error is measured
  at mask ratios of 0.25, 0.5, 0.75 and 1.
"""
STEPS = (25, 50, 100, 200, 400, 1200)
RATES = (8e-4, 8e-5, 8e-6)
SEEDS = (1, 2, 3)
THRESHOLDS = (0.0, 0.5)
RATIOS = (0.25, 0.5, 0.75, 1.0)
LIMIT = 200
HELD_OUT = 128
LOOKED_AT = (25, 100, 400, 1200)  # steps after which the first seed's models are looked at
LONG = 400  # steps; longer runs come after all others
SCHEDULE = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "save_steps": 100,
    "save_total_limit": 1,
    "logging_steps": 25,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        noise: a name of `noise_kinds.NOISES`.
        rate: learning rate.
        seed: of data order and noise.
    """

    noise: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.noise}-{self.rate:g}-{self.seed}"

    def label(self, steps: int) -> str:
        """Of its points after so many steps."""
        return f"{self.noise}, rate {self.rate:g}, {steps} steps, seed {self.seed}"


Stage = tuple[Run, int]
"""A run, and the number of steps after which it is decoded."""


def stage_of(label: str) -> Stage:
    """The stage that a label names."""
    noise, rate, steps, seed = re.findall(r"^(\S+), rate (\S+), (\d+) steps, seed (\d+)$", label)[0]
    return Run(noise, float(rate), int(seed)), int(steps)


def plan(
    noises: Sequence[str],
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    steps: Sequence[int] = STEPS,
) -> Iterator[Stage]:
    """All stages in an order in which comparisons between kinds of noise are complete early."""
    for is_long in (False, True):
        for seed in seeds:
            for rate in rates:
                for number in sorted(steps):
                    if (number > LONG) == is_long:
                        yield from ((Run(noise, rate, seed), number) for noise in noises)


def looked_at(found: Container[str], noise: str, rate: float, steps: int) -> str | None:
    """The label of the first seed whose model was looked at after so many steps, if any."""
    labels = [Run(noise, rate, seed).label(steps) for seed in SEEDS]
    return next((label for label in labels if label in found), None)


def base_label(ratio: float) -> str:
    """Of what the base's noise is like at a mask ratio."""
    return f"base, mask ratio {ratio:g}"
