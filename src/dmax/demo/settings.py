"""The three ways to decode that the demo compares."""

from __future__ import annotations

from dataclasses import dataclass

from dmax.params import DecodingParams


@dataclass(frozen=True, slots=True)
class Setting:
    """A bundled model with a way to decode it.

    Attributes:
        label: its name on the screen.
        model: bundled model.
        strategy: how it is decoded.
        threshold: of the strategy.
    """

    label: str
    model: str
    strategy: str
    threshold: float

    @property
    def params(self) -> DecodingParams:
        """Decoding parameters; the task says how long an answer may be."""
        return DecodingParams(self.strategy, self.threshold)


CAREFUL = Setting("base, careful", "tiny-base", "threshold", 0.95)
PUSHED = Setting("base, pushed", "tiny-base", "threshold", 0.25)  # as many tokens a forward as DMax
DMAX = Setting("DMax", "tiny-dmax", "spd", 0.5)
SETTINGS = (CAREFUL, PUSHED, DMAX)
