"""A strategy with a fault, which a package registers (`serving/faults.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding.block import Decision, Output, State, View
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class Raises(Strategy):
    """Raises what no strategy should, in its first step."""

    name: ClassVar[str] = "bench_raises"
    default_threshold: ClassVar[float] = 0.5

    threshold: Number = number(high=1)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """Fail."""
        raise ZeroDivisionError("a fault of the strategy")
