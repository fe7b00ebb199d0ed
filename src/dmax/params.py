"""Every option of decoding and of the engine, with its default, which stands nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmax.errors import InputError

AUTO = "auto"
"""The strategy that a model was trained for, as its checkpoint says."""


@dataclass(frozen=True, slots=True)
class DecodingParams:
    """How a request is decoded.

    Attributes:
        strategy: name of a decoding strategy (`dmax.strategies()` lists them), or "auto": the one
            that the checkpoint names, else threshold decoding.
        threshold: confidence from which a masked position is decoded, in [0, 1]. None: the
            strategy's own default, which is 0.5 for `spd` and 0.95 for `threshold`.
        stop_confidence: a block is finished when the confidence of every position is at least this,
            in (0, 1].
        top_k: candidates blended into a soft input.
        block_length: positions decoded together. None: the checkpoint's own.
        max_new_tokens: longest completion. The last block is still decoded whole.
        temperature: 0 decodes greedily. Above 0, tokens are sampled.
        seed: of the sampling, below 2^63. None draws a fresh one.
        stop: texts that end the completion where they first appear. The text is cut before the stop
            text, the token ids after it.
        ignore_eos: go on after an EOS, up to `max_new_tokens`; for measuring speed.
        deadline: seconds after its submission at which a request ends with what it has by then.
            None: no limit.
        max_steps_per_block: cap on forwards per block. None: the block length, times the blocks
            that are open at once.
        options: settings that only the chosen strategy has, by name: `{"alpha": 0.7}` for `credit`,
            `{"soft_inputs": False}` for `spd`. They are kept as sorted pairs.

    Raises:
        InputError: a value out of range or of the wrong type. That a strategy exists is checked
            when it is made.
    """

    strategy: str = AUTO
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
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"`ignore_eos` must be true or false, got {self.ignore_eos!r}")
        try:
            options = dict(self.options)
        except (TypeError, ValueError):
            raise InputError(f"`options` must map names to values, got {self.options!r}") from None
        object.__setattr__(self, "options", tuple(sorted(options.items())))  # hashable, as the rest


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much an engine decodes at once, and how it runs the model.

    Attributes:
        max_batch_size: sequences decoded together. Further ones wait for their turn.
        max_length: positions that a sequence may take. With it, memory for the keys and values of
            `max_batch_size` sequences is reserved once, at the start. None: as much as the requests
            need.
        prefill_tokens: prompt tokens that are encoded between two steps. Running sequences
            therefore never wait long for the prompts of others.
        prefix_cache_mib: memory in MiB for the first blocks of prompts, which are then encoded once
            for all requests that begin alike. 0: none, so that the last bits of a result do not
            depend on what was decoded before.
        cuda_graphs: whether steps are captured as CUDA graphs. None: on a CUDA device.
        compile_model: have `torch.compile` fuse the small operations of a forward. The first two
            forwards take half a minute longer, which pays in long runs (docs/performance.md). On a
            CPU it needs a C++ compiler.

    Raises:
        InputError: a value out of range or of the wrong type.
    """

    max_batch_size: int = 16
    max_length: int | None = None
    prefill_tokens: int = 512
    prefix_cache_mib: int = 0
    cuda_graphs: bool | None = None
    compile_model: bool = False

    def __post_init__(self) -> None:
        check_number("max_batch_size", self.max_batch_size, low=1, whole=True)
        check_number("max_length", self.max_length, low=1, whole=True, optional=True)
        check_number("prefill_tokens", self.prefill_tokens, low=1, whole=True)
        check_number("prefix_cache_mib", self.prefix_cache_mib, low=0, whole=True)


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
    """Raise `InputError` unless `value` is a number in [low, high].

    Args:
        name: what the error calls it.
        value: what is checked.
        low: smallest value allowed.
        high: largest value allowed.
        above_low: whether `low` itself is too small.
        whole: whether it must be a whole number.
        optional: whether None is allowed.
    """
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
