"""What `bench/noise.py` trains, in which order, and why: written before any result."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smollm.size import GPU, Size

from dmax.recipe.sections import Recipe, load_recipe

BUNDLED_TEXT = """
The paper finds random-token training far worse than on-policy training: 68.7 % against 91 to 92 %
on GSM8K (claim 23 of [the paper's experiments in miniature](README.md)). On the bundled base they
came out alike, after 300 steps at a learning rate of 8e-4 with cosine decay. The paper's rate is
2e-6, with which a model changes little. So the noise is varied with the number of steps and the
rate.

- **Noise** in the second stream of training, all else equal: the model's own tokens, sampled;
  random tokens, as the paper's baseline has them; own tokens by argmax, as published; and two
  controls. *Random tokens of the same kind*: a number replaces a number, so the kind of a token
  does not give it away as wrong. *Random tokens where its own are wrong*: the model's own tokens
  stay where they are right, so as many tokens are wrong as on-policy, at the same positions.
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
PRETRAINED_TEXT = """
[The bundled base](noise.md) has learnt a language of 981 tokens from nothing. Here the base is that
of [a real pretrained model](pretrained.md), SmolLM2-135M-Instruct as a block-diffusion model of
short word problems. Its stages were run anew in float32, so its weights are not those of that page.

- **Noise:** the model's own tokens, sampled, and random tokens. The controls are not planned.
- **Steps:** 25, 50, 100, of one run with a constant rate. 256 of the base's own answers are learnt,
  8 a step, and 64 are looked at, so 100 steps are three epochs.
- **Learning rates:** 3e-4, that of `recipes/pretrained_oput.yaml`, and 3e-5. Three seeds.
- **Decoding, what is compared, and what is plausible:** as on the bundled base.
- **Known before:** after 80 steps at 3e-4 with cosine decay and mask ratios of 0.6 to 1, OPUT
  solved 167/200 and random tokens 139/200 at threshold 0.5, but 138/200 and 149/200 at 0.3. And
  without OPUT, SPD does not collapse on this base, as it does on the bundled one.
- **Expected:** on the bundled base, own tokens lead where the rate times the steps is 0.0032 to
  0.02. If this holds here too, they lead after 25 and 50 steps at 3e-4 (0.0075 and 0.015), and
  neither after 100 (0.03) nor at 3e-5 (0.003 after 100 steps). (Since this was written, the range
  has become 0.0016 to 0.02.)
"""
PRETRAINED_SLOW_TEXT = """
At 3e-4 the first 25 steps cost [the pretrained base](noise_pretrained.md) accuracy with either
noise, and at 3e-5 its 100 steps end where own tokens begin to lead on [the bundled base](noise.md).
Here are a smaller rate and more steps. The base is that of
[the pretrained model's page](pretrained.md). The first study's, of the same stages in float32, is
not kept.

- **Noise:** the model's own tokens, sampled, and random tokens. The controls are not planned.
- **Steps:** 25, 50, 100, 200, 400, of one run with a constant rate. 576 of the base's own answers
  are learnt, 8 a step, and 64 are looked at, so 400 steps are five and a half epochs.
- **Learning rates:** 3e-5, and 3e-6, near the paper's 2e-6. Three seeds.
- **Decoding, what is compared, and what is plausible:** as on the bundled base.
- **Known before:** at 3e-5 random tokens are better after 25 and 50 steps on the other base, where
  seeds often disagree. On the bundled base own tokens lead where the rate times the steps is 0.0016
  to 0.02.
- **Expected:** if that holds here, they lead after 100, 200 and 400 steps at 3e-5, and nowhere at
  3e-6, where 400 steps make 0.0012.
"""
PRETRAINED_GPU_TEXT = """
The base is that of [the pretrained model on a GPU](pretrained_gpu.md), which has its whole
vocabulary of 49,153 tokens, blocks of 32, and has learnt from 32,000 problems, twice. It should
know its task far better than the base that [two cores have trained](noise_pretrained.md). There is
room for more steps and another rate.

- **Noise:** the model's own tokens, sampled, and random tokens. The controls are not planned.
- **Steps:** 25, 50, 100, 200, 400, 1,200, of one run with a constant rate. 4,032 of the base's own
  answers are learnt, 8 a step, and 64 are looked at, so 400 steps are less than an epoch.
- **Learning rates:** 3e-4, 3e-5 and 3e-6, near the paper's 2e-6. Three seeds.
- **Decoding, what is compared, and what is plausible:** as on the bundled base.
- **Known before:** on the bundled base own tokens lead where the rate times the steps is 0.0016 to
  0.02. On the base of two cores, seeds differed more than noises after 25 and 50 steps at 3e-4.
- **Expected:** own tokens lead where the rate times the steps is 0.0016 to 0.02: after 25 and 50
  steps at 3e-4, 100 to 400 at 3e-5, and 1,200 at 3e-6.
"""
THRESHOLDS = (0.0, 0.5)
CAREFUL = 0.95  # threshold at which a base without OPUT is decoded as it is best
RATIOS = (0.25, 0.5, 0.75, 1.0)
RECIPE_RATIO = 0.75  # of both recipes
LIMIT = 200
SEEDS = (1, 2, 3)
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
class Design:
    """What a study trains from one base, and how it is measured.

    Attributes:
        recipe: trains the base with OPUT.
        task: what is decoded.
        rates: learning rates.
        steps: numbers of training steps after which a run is decoded.
        noises: names of `noise_kinds.NOISES`.
        held_out: how many examples at the end of the data are not learnt but looked at.
        num_examples: of the data, from its start; None: all.
        title: of the page.
        command: that goes on with the study.
        before: the command that makes what the recipe needs.
        text: why, written before any result.
        note: what was added later.
        expected: rates and steps at which own tokens were expected to lead, before any result.
        seeds: of data order and noise.
        size: of the pretrained model whose base and data the recipe takes; None: as it says.
    """

    recipe: Path
    task: str
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    noises: tuple[str, ...]
    held_out: int
    title: str
    command: str
    before: str
    text: str
    note: str = ""
    num_examples: int | None = None
    expected: tuple[tuple[float, int], ...] = ()
    seeds: tuple[int, ...] = SEEDS
    size: Size | None = None

    def read(self, path: Path) -> Recipe:
        """The recipe, or another one in its place, with the base and the data of the design."""
        recipe = load_recipe(path)
        return recipe if self.size is None else self.size.fitted(recipe)

    @property
    def stages(self) -> list[Stage]:
        """All that is trained and decoded, in the order of `plan`."""
        return list(plan(self.noises, self.rates, self.seeds, self.steps))

    def at_toy_length(self) -> Design:
        """The same study with one rate, one seed and one step."""
        return replace(self, rates=self.rates[:1], seeds=self.seeds[:1], steps=(1,), held_out=4)


BUNDLED = "noise"
PRETRAINED = "noise_pretrained"
PRETRAINED_SLOW = "noise_pretrained_slow"
PRETRAINED_GPU = "noise_pretrained_gpu"
DESIGNS = {  # by the name of the page and its records
    BUNDLED: Design(
        recipe=Path("recipes/tiny_ablation.yaml"),
        task="word_problems",
        rates=(8e-4, 8e-5, 8e-6),
        steps=(25, 50, 100, 200, 400, 1200),
        noises=("sampled", "random", "argmax", "same-kind", "at-errors"),
        held_out=128,
        title="When on-policy noise matters",
        command="python bench/noise.py",
        before="python bench/ablation_training.py",
        text=BUNDLED_TEXT,
        note="(The look after 25 steps was added when the accuracy after 25 steps was known.)",
    ),
    PRETRAINED: Design(
        recipe=Path("recipes/pretrained_noise.yaml"),
        task="short_word_problems",
        rates=(3e-4, 3e-5),
        steps=(25, 50, 100),
        noises=("sampled", "random"),
        num_examples=320,  # what there was when the design was written
        held_out=64,
        title="When on-policy noise matters on a pretrained model",
        command="python bench/noise.py --study noise_pretrained",
        before="python bench/pretrained.py convert problems ar base responses",
        text=PRETRAINED_TEXT,
        expected=((3e-4, 25), (3e-4, 50)),
    ),
    PRETRAINED_SLOW: Design(
        recipe=Path("recipes/pretrained_noise.yaml"),
        task="short_word_problems",
        rates=(3e-5, 3e-6),
        steps=(25, 50, 100, 200, 400),
        noises=("sampled", "random"),
        held_out=64,
        title="When on-policy noise matters on a pretrained model, at small rates",
        command="python bench/noise.py --study noise_pretrained_slow",
        before="python bench/pretrained.py convert problems ar base responses",
        text=PRETRAINED_SLOW_TEXT,
        note="(1,200 steps, as on the bundled base, would take two cores half a day a rate.\n"
        "They are planned for a GPU, as `noise_pretrained_gpu`, and are not measured.)",
        expected=((3e-5, 100), (3e-5, 200), (3e-5, 400)),
    ),
    PRETRAINED_GPU: Design(
        recipe=Path("recipes/pretrained_noise.yaml"),
        size=GPU,
        task="short_word_problems",
        rates=(3e-4, 3e-5, 3e-6),
        steps=(25, 50, 100, 200, 400, 1200),
        noises=("sampled", "random"),
        held_out=64,
        title="When on-policy noise matters on a pretrained model, on a GPU",
        command="python bench/noise.py --study noise_pretrained_gpu --gpu",
        before="python bench/pretrained.py --gpu convert problems ar base responses",
        text=PRETRAINED_GPU_TEXT,
        expected=(
            (3e-4, 25),
            (3e-4, 50),
            (3e-5, 100),
            (3e-5, 200),
            (3e-5, 400),
            (3e-6, 1200),
        ),
    ),
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
    noises: Sequence[str], rates: Sequence[float], seeds: Sequence[int], steps: Sequence[int]
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


BASE = "base"
"""Label of the base's own points, before any step."""
