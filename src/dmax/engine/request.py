"""What goes into the engine: a prompt and how to decode it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dmax.decoding import get_strategy
from dmax.decoding.strategy import Strategy
from dmax.params import DecodingParams


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete.

    Attributes:
        index: the caller's number for it; no two requests in progress have the same.
        prompt_ids: token ids of the prompt.
        params: how to decode.
        find_stop: from the tokens generated so far to how many of them to keep, if they hold a stop
            text; else to None.
        shown: the number that messages call it by; None: `index`.
        provisional: also report its open blocks after every step, at the price of copying them from
            the device.
        strategy: what `params` names.

    Raises:
        InputError: there is no such strategy, or it does not take these settings.
    """

    index: int
    prompt_ids: tuple[int, ...]
    params: DecodingParams
    find_stop: Callable[[Sequence[int]], int | None] | None = field(default=None, compare=False)
    shown: int | None = None
    provisional: bool = False
    strategy: Strategy = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", get_strategy(self.params))

    @property
    def number(self) -> int:
        """What messages call it."""
        return self.index if self.shown is None else self.shown
