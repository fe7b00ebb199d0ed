"""What the checkpoint of a server says: mask, block length, and how it is decoded.

SGLang assumes the same of every LLaDA-2.x model. The hooks here put what the files say in its
place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dmax.decoding import FALLBACK, get_strategy
from dmax.errors import InputError
from dmax.hub import is_published_dmax
from dmax.integrations.options import (
    PREFIX,
    check_reading,
    check_runs_here,
    server_params,
    strategies_of,
)
from dmax.params import DecodingParams
from dmax.special_ids import find_mask_token_id, resolve_special_ids

logger = logging.getLogger(__name__)

ARCHITECTURE = "LLaDA2MoeModelLM"
NAME = "DMax"
"""What `--dllm-algorithm` calls us."""
ENGINE = "SGLang"
THEIRS = ("block_size", "capture_input_preparation")
"""Keys of `--dllm-algorithm-config` that SGLang reads itself."""


# --- hooks ---


def choose_algorithm(server_args: Any, previous: Callable[[Any], None]) -> None:
    """A step of SGLang's settings: `DMax` for checkpoints that name a strategy of ours.

    Without an algorithm SGLang decodes from left to right, which they were not trained for.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    previous(server_args)
    settings = resolving_view(server_args)
    if settings.dllm_algorithm is None and is_ours(settings.model_path):
        logger.info("decoding %s with --dllm-algorithm %s", settings.model_path, NAME)
        declare_resolution(server_args, "dmax", dllm_algorithm=NAME)


def read_checkpoint(config: Any, server_args: Any) -> Any:
    """A hook behind SGLang's `DllmConfig.from_server_args`: what the files of a LLaDA-2.x say.

    Args:
        config: what SGLang has made; None: the model is not decoded by diffusion.
        server_args: SGLang's settings.

    Returns:
        `config` with the checkpoint's `mask_id` and `block_size`, and with `special_ids` and
        `decoding` for our algorithm.

    Raises:
        InputError: the files contradict each other or say `shift`, or the YAML file asks for what
            there is not.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    if config is None:
        return None
    model = model_config_of(server_args)
    if ARCHITECTURE not in (model.hf_config.architectures or ()):
        return config
    check_reading(model.hf_config, ENGINE)
    settings = resolving_view(server_args)
    options = config.algorithm_config
    lacks_mask = getattr(model.hf_config, "mask_token_id", None) is None
    tokenizer = _tokenizer(settings.tokenizer_path, settings.revision) if lacks_mask else None
    found = find_mask_token_id(model.hf_config, tokenizer)
    special_ids = resolve_special_ids(
        model.hf_config,
        tokenizer,
        model.hf_generation_config,
        mask_token_id=config.mask_id if found is None else found,
        block_length=options.get("block_size"),
    )
    config.mask_id = special_ids.mask_token_id
    config.block_size = special_ids.block_length
    if config.algorithm == NAME:
        path = settings.model_path
        named, auto = strategies_of(model.hf_config, path, Path(path))
        config.special_ids = special_ids
        config.decoding = server_decoding(options, named, auto)
    return config


# --- what they ask ---


def is_ours(model_path: str) -> bool:
    """Whether this is a published DMax model, or a folder that dmax wrote; asks no network.

    Whatever else the path leads to is SGLang's affair.
    """
    folder = Path(model_path)
    if is_published_dmax(model_path, folder):
        return True
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or "decoding_strategy" not in config:
        return False
    return ARCHITECTURE in (config.get("architectures") or ())


def server_decoding(
    options: Mapping[Any, Any], named: str | None, auto: str = FALLBACK
) -> DecodingParams:
    """How a server decodes requests that ask for nothing else.

    Args:
        options: the YAML file of `--dllm-algorithm-config`: `strategy`, `threshold` and every
            other option, by their names in `DecodingParams` and in the strategy.
        named: the strategy that the checkpoint's config names; None: it names none.
        auto: what "auto" stands for then.

    Raises:
        InputError: an option that there is not, a value that it cannot have, or a strategy that
            SGLang cannot run.
    """
    ours = {f"{PREFIX}{name}": value for name, value in options.items() if name not in THEIRS}
    try:
        params = server_params(ours, named, auto)
        check_runs_here(get_strategy(params), ENGINE)
    except InputError as error:
        hint = error.hint and error.hint.replace(PREFIX, "")
        message = error.message.replace(PREFIX, "")
        raise InputError(f"--dllm-algorithm-config: {message}", hint) from None
    return params


@lru_cache
def _tokenizer(path: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision)
