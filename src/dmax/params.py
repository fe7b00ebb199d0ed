"""Every decoding option with its default, checked where it is made; nothing else writes these numbers down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmax.errors import InputError

SWITCHES = (
    "ignore_eos",
    "prefix_only",
    "soft_inputs",
    "renormalize",
    "stop_on_confidence",
    "stop_on_consistency",
)


@dataclass(frozen=True, slots=True)
class DecodingParams:
    """How a request is decoded.

    Attributes:
        strategy: name of a decoding strategy (`dmax.strategies()` lists them).
        threshold: confidence from which a masked position is decoded, in [0, 1]; None: the
            strategy's own default (0.5 for `spd`, 0.95 for `threshold`).
        stop_confidence: a block whose every position is at least this sure is finished, in (0, 1].
        top_k: candidates mixed into a soft input.
        block_length: positions decoded together; None: the checkpoint's own.
        max_new_tokens: longest completion; the last block is still decoded whole.
        temperature: 0 decodes greedily; above, tokens are sampled.
        seed: of the sampling, below 2^63; None draws a fresh one.
        stop: texts that end the completion where they first appear; the text is cut before, the
            token ids behind them.
        ignore_eos: go on behind an EOS, to `max_new_tokens`; for measuring speed.
        deadline: seconds after its submission at which a request ends with what it has by then;
            None: no limit.
        max_steps_per_block: cap on forwards per block; None: the block length, times the blocks
            open at once.
        prefix_only: SPD decodes the confident prefix of the masks only; off: any confident
            position.
        soft_inputs: SPD feeds decoded positions back as blends; off: as hard tokens.
        renormalize: blends keep their length (eq. 10).
        stop_on_confidence: SPD may stop when every position is sure.
        stop_on_consistency: SPD may stop when nothing changed.
        options: what only the chosen strategy knows, by name (`{"alpha": 0.7}` for `credit`); kept
            as sorted pairs.

    Raises:
        InputError: a value out of range or of the wrong type. Whether the strategy exists is known
            when it is made.
    """

    strategy: str = "spd"
    threshold: float | None = None
    stop_confidence: float = 0.9
    top_k: int = 1
    block_length: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    deadline: float | None = None
    max_steps_per_block: int | None = None
    prefix_only: bool = True
    soft_inputs: bool = True
    renormalize: bool = True
    stop_on_confidence: bool = True
    stop_on_consistency: bool = True
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            raise InputError(f"`strategy` must be a name, got {self.strategy!r}")
        check_number("threshold", self.threshold, low=0, high=1, optional=True)
        check_number("stop_confidence", self.stop_confidence, low=0, high=1, above_low=True)
        check_number("temperature", self.temperature, low=0)
        for name in ("top_k", "max_new_tokens"):
            check_number(name, getattr(self, name), low=1, whole=True)
        for name in ("block_length", "max_steps_per_block"):
            check_number(name, getattr(self, name), low=1, whole=True, optional=True)
        check_number("seed", self.seed, low=0, high=2**63 - 1, whole=True, optional=True)
        check_number("deadline", self.deadline, low=0, optional=True)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(
            isinstance(text, str) and text for text in stop
        ):
            raise InputError(
                f"`stop` must be a text or a list of texts, none of them empty, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(stop))
        for name in SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(f"`{name}` must be true or false, got {value!r}")
        try:
            options = dict(self.options)
        except (TypeError, ValueError):
            raise InputError(f"`options` must map names to values, got {self.options!r}") from None
        object.__setattr__(self, "options", tuple(sorted(options.items())))  # hashable, as the rest


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    above_low: bool = False,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Raise `InputError` unless `value` is a number in [low, high]; with `above_low` not `low` itself."""
    if value is None and optional:
        return
    kind = "a whole number" if whole else "a number"
    limits = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
    if above_low:
        limits = f"above {low} and at most {high}"
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    in_range = is_number and low <= value <= high and value != math.inf  # type: ignore[operator]
    if not in_range or (above_low and value == low):
        raise InputError(f"`{name}` must be {kind} {limits}, got {value!r}")
