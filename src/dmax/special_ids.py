"""The ids and the block length that decoding and training need, and where they come from.

They are settled here and nowhere else: an explicit argument decides, then what the checkpoint's
files say. Published files do not agree on which of them says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dmax.errors import InputError
from dmax.params import check_number

MASK_TOKEN = "<|mask|>"
# LLaDA-2.x configurations name no block length. Every published checkpoint of the family was
# trained with this one.
FAMILY_BLOCK_LENGTH = {"llada2_moe": 32}


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


def resolve_special_ids(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: GenerationConfig | None = None,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    block_length: int | None = None,
) -> SpecialIds:
    """Settle all ids of a checkpoint; an argument that is given decides over the files.

    Args:
        config: of the model.
        tokenizer: None for a checkpoint without one.
        generation_config: None for a checkpoint without one.
        mask_token_id: MASK.
        eos_token_id: one id that ends a sequence, or several.
        block_length: positions decoded together.

    Raises:
        InputError: something is neither given nor in the files, or lies outside the vocabulary.
    """
    mask = _resolve_mask(config, tokenizer, mask_token_id)
    eos = _resolve_eos(generation_config, config, tokenizer, eos_token_id)
    pad = _resolve_pad(config, tokenizer, eos)
    length = _resolve_block_length(config, block_length)
    return SpecialIds(mask, eos, pad, length)


def find_mask_token_id(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> int | None:
    """MASK's id by the config, by the tokenizer, or as the vocabulary entry `<|mask|>`."""
    found: int | None = getattr(config, "mask_token_id", None)
    if found is not None or tokenizer is None:
        return found
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    return tokenizer.get_vocab().get(MASK_TOKEN)


def _resolve_mask(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, given: int | None
) -> int:
    found = given
    if found is None:
        found = find_mask_token_id(config, tokenizer)
    if found is None:
        raise InputError(
            "the checkpoint names no mask token",
            hint="pass `mask_token_id`; an autoregressive model gets one in training, "
            "by `model.add_mask_token: true`",
        )
    return _in_vocabulary("mask_token_id", found, config)


def _resolve_eos(
    generation_config: GenerationConfig | None,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    given: int | list[int] | None,
) -> tuple[int, ...]:
    """`given`, else what the generation config, the config or the tokenizer says."""
    sources = (generation_config, config, tokenizer)
    candidates = [given, *(getattr(source, "eos_token_id", None) for source in sources)]
    named = [ids for ids in candidates if ids not in (None, [], ())]
    if not named:
        raise InputError(
            "the checkpoint names no end-of-sequence token", hint="pass `eos_token_id`"
        )
    found: Any = named[0]
    several = found if isinstance(found, (list, tuple)) else [found]
    checked = [_in_vocabulary("eos_token_id", token, config) for token in several]
    return tuple(dict.fromkeys(checked))


def _resolve_pad(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, eos: tuple[int, ...]
) -> int:
    """What the tokenizer or the config says, if it lies in the vocabulary, else the first EOS."""
    for source in (tokenizer, config):
        token = getattr(source, "pad_token_id", None)
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return token
    return eos[0]


def _resolve_block_length(config: PreTrainedConfig, given: int | None) -> int:
    """`given`, else the config's, else the family's."""
    found = given
    if found is None:
        found = getattr(config, "block_length", None)
    if found is None:
        found = FAMILY_BLOCK_LENGTH.get(config.model_type)
    if found is None:
        raise InputError("the checkpoint names no block length", hint="pass `block_length`")
    check_number("block_length", found, low=1, whole=True)
    return int(found)


def _in_vocabulary(name: str, token: Any, config: PreTrainedConfig) -> int:
    if not isinstance(token, int) or isinstance(token, bool):
        raise InputError(f"`{name}` must be a token id, got {token!r}", hint=f"pass `{name}`")
    if not 0 <= token < config.vocab_size:
        raise InputError(
            f"`{name}` {token} lies outside the vocabulary of {config.vocab_size}",
            hint=f"pass `{name}`",
        )
    return token
