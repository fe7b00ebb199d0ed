"""What kind of model a checkpoint is: how it is decoded, and where its predictions are read."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dmax.decoding import strategies
from dmax.errors import InputError, did_you_mean, shorten, show
from dmax.hub import is_published_dmax, named_block_length
from dmax.models import LLaDA2MoeConfig
from dmax.special_ids import FAMILY_BLOCK_LENGTH, find_mask_token_id, reads_shifted

logger = logging.getLogger(__name__)

AUTOREGRESSIVE = "autoregressive"
LLADA21_CONTEXT = 32_768  # positions; LLaDA-2.0 has half as many, and LLaDA-2.2 more


def block_length_of(
    asked: int | None, config: PreTrainedConfig, name_or_path: str | os.PathLike[str], folder: Path
) -> int | None:
    """What is asked for, or else what the name says of files that are silent."""
    if asked is None and getattr(config, "block_length", None) is None:
        return named_block_length(name_or_path, folder)
    return asked


def named_decoding(
    config: PreTrainedConfig, name_or_path: str | os.PathLike[str], folder: Path
) -> str | None:
    """The strategy that a model was trained for; None where nobody says."""
    named: str | None = getattr(config, "decoding_strategy", None)
    check_decoding(named, folder)
    if named is not None:
        return named
    if is_published_dmax(name_or_path, folder):
        return "spd"
    return "joint_threshold" if _is_llada21(config) else None


def _is_llada21(config: PreTrainedConfig) -> bool:
    """Whether a model is a LLaDA-2.1, which was trained to edit what it wrote.

    Of the keys in its published configuration only the context differs from LLaDA-2.0's (16,384).
    """
    is_llada = config.model_type == LLaDA2MoeConfig.model_type
    return is_llada and config.max_position_embeddings == LLADA21_CONTEXT


def check_decoding(name: object, place: object) -> None:
    """Raises `InputError` for a strategy that does not exist; None is none."""
    known = strategies()
    if name is not None and name not in known:
        raise InputError(
            f"{place} names the decoding strategy {show(name)}, which is unknown",
            hint=did_you_mean(name, known) or "correct `decoding_strategy` in its config.json",
        )


def is_silent(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether nothing says that a checkpoint was trained to fill in masks; tells it in the log."""
    named = (getattr(config, "block_length", None), find_mask_token_id(config, tokenizer))
    names_nothing = config.model_type not in FAMILY_BLOCK_LENGTH and named == (None, None)
    if names_nothing:
        logger.warning(
            "%s has no mask token: it writes one token a forward, as an autoregressive model "
            "(`dmax convert` makes it a diffusion model)",
            shorten(str(folder)),
        )
    return names_nothing


def set_shift(config: Any, shift: bool) -> None:
    """Have a configuration say where predictions are read, unless it says so already."""
    if shift != reads_shifted(config):
        config.shift = shift
