"""The ids and the block length that decoding and training need, and where they come from.

They are settled here and nowhere else: an explicit argument decides, then what the checkpoint's
files say. Published files do not agree on which of them says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dmax.errors import InputError, show
from dmax.params import MOST, check_number

MASK_TOKEN = "<|mask|>"
NO_MASK = -1
# What published checkpoints were trained with whose files name no block length: all of LLaDA-2.x,
# and those of SDAR that do not name one themselves (`dmax.hub.named_block_length`).
FAMILY_BLOCK_LENGTH = {"llada2_moe": 32, "sdar": 4, "sdar_moe": 4}


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The special token ids of a checkpoint and its block length.

    Attributes:
        mask_token_id: MASK; it lies in the vocabulary and is never emitted.
        eos_token_ids: every id that ends a sequence; at least one.
        pad_token_id: fills up batches.
        block_length: how many positions are decoded together.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    block_length: int

    def __post_init__(self) -> None:
        """Raises `InputError` if MASK also ends a sequence: it is fed in, but never emitted."""
        if self.mask_token_id in self.eos_token_ids:
            raise InputError(
                f"`mask_token_id` {self.mask_token_id} is also an `eos_token_id`",
                hint="pass the one that is wrong",
            )


def resolve_special_ids(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: GenerationConfig | None = None,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    block_length: int | None = None,
    adds_mask: bool = False,
) -> SpecialIds:
    """Settle all ids of a checkpoint; an argument that is given decides over the files.

    Args:
        config: of the model.
        tokenizer: None for a checkpoint without one.
        generation_config: None for a checkpoint without one.
        mask_token_id: MASK.
        eos_token_id: one id that ends a sequence, or several.
        block_length: positions decoded together.
        adds_mask: a mask token is still to be added; until then its id is `NO_MASK`.

    Raises:
        InputError: something is neither given nor in the files, lies outside the vocabulary, or
            MASK is an EOS.
    """
    mask = NO_MASK if adds_mask else _first(mask_token_id, find_mask_token_id(config, tokenizer))
    if mask is None:
        raise InputError(
            "the checkpoint names no mask token",
            hint="`dmax convert`, `add_mask_token: true` in a recipe or `mask_token_id` gives one",
        )
    if not adds_mask:
        mask = _checked_token("mask_token_id", mask, config)

    sources = (generation_config, config, tokenizer)
    named = [eos_token_id, *(getattr(source, "eos_token_id", None) for source in sources)]
    listed = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named if ids is not None]
    ends: Any = next(filter(None, listed), None)
    if ends is None:
        raise InputError(
            "the checkpoint names no end-of-sequence token",
            hint="pass `eos_token_id`, or name it in config.json",
        )
    eos = [_checked_token("eos_token_id", token, config) for token in ends]

    # What lies outside the vocabulary is no padding; the first EOS serves as well.
    pads = [*(getattr(source, "pad_token_id", None) for source in (tokenizer, config)), eos[0]]
    pad = next(pad for pad in pads if type(pad) is int and 0 <= pad < config.vocab_size)

    family = FAMILY_BLOCK_LENGTH.get(config.model_type)
    length = _first(block_length, getattr(config, "block_length", None), family)
    if length is None:
        raise InputError(
            "the checkpoint names no block length",
            hint="pass `block_length`; an autoregressive model gets one by `dmax convert`, "
            "or is decoded as it is with `block_length` 1 and `shift` true",
        )
    context = getattr(config, "max_position_embeddings", None) or MOST
    check_number("block_length", length, low=1, high=context, whole=True)
    return SpecialIds(mask, tuple(dict.fromkeys(eos)), pad, int(length))


def reads_shifted(config: PreTrainedConfig) -> bool:
    """Whether a model predicts the token of a position at the position before it.

    Autoregressive models do, and those that were made of one and kept its reading: the `shift` of
    their configuration is true.

    Raises:
        InputError: `shift` is neither true nor false, nor null, which says nothing.
    """
    shift = _first(getattr(config, "shift", None), False)
    if not isinstance(shift, bool):
        raise InputError(
            f"`shift` must be true or false, got {show(shift)}",
            hint="correct it in config.json, or in `model.config` of the recipe",
        )
    return shift


def find_mask_token_id(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> int | None:
    """MASK's id by the config, by the tokenizer, or as the vocabulary entry `<|mask|>`.

    What only the tokenizer names and the model has no row for was never trained: it is none.
    """
    found: int | None = getattr(config, "mask_token_id", None)
    if found is None and tokenizer is not None:
        found = _first(tokenizer.mask_token_id, tokenizer.get_vocab().get(MASK_TOKEN))
        return None if found is None or found >= config.vocab_size else found
    return found


def _first(*values: Any) -> Any:
    """The first value that is given; None if none is."""
    return next((value for value in values if value is not None), None)


def _checked_token(name: str, token: Any, config: PreTrainedConfig) -> int:
    if isinstance(token, bool) or not isinstance(token, Integral):
        raise InputError(f"`{name}` must be a token id, got {show(token)}", hint=f"pass `{name}`")
    number = int(token)
    if not 0 <= number < config.vocab_size:
        raise InputError(
            f"`{name}` {show(number)} lies outside the vocabulary of {config.vocab_size}",
            hint=f"pass `{name}`, or correct it in the checkpoint's files",
        )
    return number
