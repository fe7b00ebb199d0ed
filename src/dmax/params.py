"""Every option of decoding and of the engine, with its default, which stands nowhere else."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from dmax.errors import InputError, shorten, show

AUTO = "auto"
"""The strategy that a model was trained for, as its checkpoint says."""
MOST = 2**31 - 1
"""The upper bound of every whole number that has no other."""
LARGEST_SEED = 2**63 - 1
MOST_PROBLEMS = 1_000_000
"""The most problems that a command or a recipe draws."""
MAX_TEXTS = 256
MAX_CHARACTERS = 10_000  # of one text


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
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    most = high if whole else min(high, sys.float_info.max)
    in_range = is_number and low <= value <= most and value != math.inf  # type: ignore[operator]
    if in_range and not (above_low and value == low):
        return
    if above_low:
        limits = f"above {low} and at most {high}"
    elif high not in (MOST, math.inf):
        limits = f"between {low} and {high}"
    elif is_number and high == MOST and value > MOST:  # type: ignore[operator]
        limits = f"of at most {MOST}"
    else:
        limits = f"of at least {low}"
    raise InputError(f"`{name}` must be {kind} {limits}, got {show(value)}")


def number(default: Any = MISSING, **bounds: Any) -> Any:
    """A field for a number of at least 0, with the bounds of `check_number`."""
    return field(default=default, metadata={"low": 0, **bounds})


def whole(default: int | None, **bounds: Any) -> Any:
    """A field for a whole number in [0, `MOST`], with the bounds of `check_number`."""
    return number(default, **{"whole": True, "high": MOST, **bounds})


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass that `number` or `whole` made, and those that are on or off.

    Numbers of numpy and of others become Python's own.

    Raises:
        InputError: naming the first one that is wrong.
    """
    for entry in fields(settings):
        value = getattr(settings, entry.name, None)
        if entry.metadata:
            check_number(entry.name, value, **entry.metadata)
            if value is not None and type(value) not in (int, float):
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(settings, entry.name, plain)
        if isinstance(entry.default, bool) and not isinstance(value, bool):
            raise InputError(f"`{entry.name}` must be true or false, got {show(value)}")


def _stop_texts(value: object) -> tuple[str, ...]:
    """The texts of `DecodingParams.stop`."""
    texts: Any = (value,) if isinstance(value, str) else value
    is_list = isinstance(texts, Sequence) and not isinstance(texts, (bytes, bytearray))
    if not is_list or not all(isinstance(each, str) and each for each in [*texts][: MAX_TEXTS + 1]):
        raise InputError(
            f"`stop` must be a text or a list of texts, none of them empty, got {show(value)}"
        )
    if len(texts) > MAX_TEXTS or max(map(len, texts), default=0) > MAX_CHARACTERS:
        raise InputError(
            f"`stop` takes at most {MAX_TEXTS} texts of at most {MAX_CHARACTERS} characters"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise InputError("`stop` holds half of a surrogate pair, which no text does") from None
    return tuple(texts)


def _option_pairs(value: object) -> tuple[tuple[str, Any], ...]:
    """The sorted pairs of `DecodingParams.options`; hashable, as the other fields are."""
    pairs: dict[Any, Any] | None = None
    if isinstance(value, (Mapping, Sequence)):
        with suppress(TypeError, ValueError):
            pairs = dict(value)
    if pairs is None or not all(isinstance(name, str) for name in pairs):
        raise InputError(f"`options` must map names to values, got {show(value)}")
    for name, option in pairs.items():
        if not (option is None or isinstance(option, (str, int, float))):
            raise InputError(
                f"option `{shorten(name)}` must be a number, a text, true or false, "
                f"got {show(option)}"
            )
    return tuple(sorted(pairs.items()))


@dataclass(frozen=True, slots=True)
class DecodingParams:
    """How a request is decoded.

    Attributes:
        strategy: name of a decoding strategy (`dmax.strategies()` lists them), or "auto": the one
            that the checkpoint names, else threshold decoding.
        threshold: confidence from which a masked position is decoded, in [0, 1]; None: the
            strategy's own default (0.5 for `spd`, 0.95 for `threshold`).
        stop_confidence: a block whose every position is at least this sure is finished, in (0, 1].
        top_k: candidates mixed into a soft input, at most 1024.
        block_length: positions decoded together; None: the checkpoint's own.
        max_new_tokens: longest completion; the last block is still decoded whole.
        temperature: 0 decodes greedily; above 0, up to 1000, tokens are sampled.
        seed: of the sampling, below 2^63; None draws a fresh one.
        stop: texts that end the completion where they first appear. The text is cut before the stop
            text, the token ids after it.
        ignore_eos: go on after an EOS, up to `max_new_tokens`; for measuring speed.
        deadline: seconds after its submission at which a request ends with what it has by then;
            None: no limit.
        max_steps_per_block: cap on forwards per block; None: the block length, times the blocks
            that are open at once.
        options: what only the chosen strategy knows, by name (`{"alpha": 0.7}` for `credit`,
            `{"soft_inputs": False}` for `spd`); kept as sorted pairs.

    Raises:
        InputError: a value out of range or of the wrong type. Whether the strategy exists is known
            when it is made.
    """

    strategy: str = AUTO
    threshold: float | None = number(None, high=1, optional=True)
    stop_confidence: float = number(0.9, high=1, above_low=True)
    top_k: int = whole(1, low=1, high=1024)
    block_length: int | None = whole(None, low=1, optional=True)
    max_new_tokens: int = whole(256, low=1)
    temperature: float = number(0.0, high=1000)
    seed: int | None = whole(None, high=LARGEST_SEED, optional=True)
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    deadline: float | None = number(None, optional=True)
    max_steps_per_block: int | None = whole(None, low=1, optional=True)
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            raise InputError(f"`strategy` must be a name, got {show(self.strategy)}")
        check_fields(self)
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "options", _option_pairs(self.options))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much an engine decodes at once, and how it runs the model.

    Attributes:
        max_batch_size: sequences decoded together; more wait their turn.
        max_length: positions that a sequence may take. With it the memory of keys and values is
            reserved once, at the start, for `max_batch_size` sequences. None: as much as the
            requests need.
        prefill_tokens: prompt tokens encoded between two steps, so that running sequences do not
            wait long for the prompts of others.
        prefix_cache_mib: memory for the leading blocks of prompts, which are then encoded once for
            all requests that begin alike. 0: none, so that the last bits of a result do not depend
            on what was decoded before.
        cuda_graphs: whether steps are captured; None: on a CUDA device.
        compile_model: have `torch.compile` fuse the small operations of a forward. The first two
            forwards take half a minute longer, which long jobs earn back (docs/performance.md). On
            a CPU it takes a C++ compiler.
        warm_up: have a model get ready when it is loaded: steps of its own strategy are captured
            for all numbers of rows up to `max_batch_size`, and a first request is decoded. On a GPU
            that takes some ten seconds, which the first requests would wait otherwise. Say
            `max_length`, too: a request of more positions than 4,096 would have it done anew.

    Raises:
        InputError: a value out of range or of the wrong type.
    """

    max_batch_size: int = whole(16, low=1, high=2**16)
    max_length: int | None = whole(None, low=1, optional=True)
    prefill_tokens: int = whole(512, low=1)
    prefix_cache_mib: int = whole(0, high=2**24)
    cuda_graphs: bool | None = None
    compile_model: bool = False
    warm_up: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.cuda_graphs is None or isinstance(self.cuda_graphs, bool)):
            raise InputError(
                f"`cuda_graphs` must be true, false or None, got {show(self.cuda_graphs)}"
            )
