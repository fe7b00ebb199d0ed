"""What `beyond.py` trains and decodes: objectives, their controls, and how each is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmax.evaluation.sweep import Curve

RECIPES = Path(__file__).parents[1] / "recipes"
SEEDS = (1, 2, 3)
REVISING = (0.9, 0.7, 0.5, 0.3, 0.0)  # thresholds, from careful to bold
DECODINGS = {
    "spd": ("SPD", REVISING),
    "mbd": ("MBD", REVISING),
    "threshold": ("threshold", (0.95, 0.9, 0.7, 0.5, 0.3)),
}


@dataclass(frozen=True)
class Run:
    """A model, or what an objective makes of one.

    Attributes:
        name: in options and names of folders.
        label: in tables and plots.
        start: the model it goes on from, or is.
        recipe: name of its recipe; None: the model itself.
        control: name of the run that goes on with OPUT from the same model; None: it is one.
        overrides: of the recipe's `training`.
        decodings: names of `DECODINGS`.
    """

    name: str
    label: str
    start: str
    recipe: str | None = None
    control: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)
    decodings: tuple[str, ...] = ("spd", "mbd")

    @property
    def path(self) -> Path:
        """The file of its recipe."""
        return RECIPES / f"{self.recipe}.yaml"

    def folder(self, seed: int) -> Path:
        """Where its checkpoint lies, under the folder of all runs."""
        return Path("beyond") / f"{self.name}-{seed}"

    def curve(self, decoding: str, seed: int | None = None) -> Curve:
        """What is measured of it in one way of decoding."""
        name, thresholds = DECODINGS[decoding]
        parts = (self.label, name) if seed is None else (self.label, name, f"seed {seed}")
        model = self.start if seed is None else str(self.folder(seed))
        return Curve(", ".join(parts), model, decoding, thresholds)


ALL = tuple(DECODINGS)
BASE = Run("tiny-base", "tiny-base", "tiny-base", decodings=("threshold",))
DMAX = Run("tiny-dmax", "tiny-dmax", "tiny-dmax")
TRAINED = (
    Run("oput", "OPUT goes on", "tiny-dmax", "tiny_oput_more"),
    Run("mmd", "MMD", "tiny-dmax", "tiny_mmd", "oput"),
    Run("cforce", "CForce", "tiny-dmax", "tiny_cforce", "oput"),
    Run("mbd", "two-block OPUT", "tiny-dmax", "tiny_mbd", "oput"),
    Run(
        *("oput-base", "OPUT from base", "tiny-base", "tiny_oput_sample"),
        overrides={"max_steps": 600, "warmup_steps": 50},
        decodings=ALL,
    ),
    Run(
        *("cforce-base", "CForce from base", "tiny-base", "tiny_cforce_base", "oput-base"),
        decodings=ALL,
    ),
)


def chosen(only: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Run, int]]:
    """Runs to train, seed by seed, so that comparisons are complete early."""
    for seed in seeds:
        for run in TRAINED:
            if not only or run.name in only:
                yield run, seed
