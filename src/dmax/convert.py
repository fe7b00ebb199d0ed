"""Checkpoints made of others: ready to learn block diffusion, or with adapters merged in."""

from __future__ import annotations

import os
from functools import partial, reduce
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dmax.adapters import find_base
from dmax.checkpoint import ORIGIN, Checkpoint, check_target, load_checkpoint, save_checkpoint
from dmax.checkpoint_files import read_settings
from dmax.errors import InputError, shorten
from dmax.files import MAX_SETTINGS, check_ours, read_object
from dmax.hub import find_folder, is_adapter
from dmax.models.llada2_moe.files import read_headers
from dmax.special_ids import FAMILY_BLOCK_LENGTH, find_mask_token_id

BLOCK_LENGTH = 32
"""That of LLaDA-2.x and of DMax."""
FROM = "converted_from"
FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def convert_checkpoint(
    name_or_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    block_length: int = BLOCK_LENGTH,
    shift: bool = False,
) -> Checkpoint:
    """Give an autoregressive checkpoint what a block-diffusion model has, and write it.

    It gets a mask token (`dmax.models.backbone.add_mask_token`), unless its tokenizer has one, and
    a configuration that names it, the block length and where predictions are read. All other
    weights keep their values: where the files mix dtypes, or the configuration names a narrower
    one, all are written in the widest of the files. It decodes well only after training.

    Args:
        name_or_path: a folder or a hub id; adapters are merged into their base.
        output: created, or replaced if it is empty or holds an earlier result.
        block_length: positions that are decoded together.
        shift: whether the prediction for a position is read one position before it, where an
            autoregressive model has it, or at the position itself.

    Returns:
        The checkpoint as it was written.

    Raises:
        InputError: the model decodes blocks already, has no tokenizer or cannot be used; the block
            length does not fit its context; or the output cannot be written.
    """
    folder = find_folder(name_or_path)
    target = check_target(output)
    check_ours(target / ORIGIN, FROM)
    shown = shorten(str(name_or_path))
    base = find_base(folder) if is_adapter(folder) else None
    config, tokenizer, _ = read_settings(folder, base)
    _check_autoregressive(shown, config, is_adapter=base is not None)
    if tokenizer is None:
        raise InputError(f"{shown} has no tokenizer, which must know the mask token")
    load = partial(
        load_checkpoint,
        name_or_path,
        device="cpu",
        block_length=block_length,
        add_mask_token=find_mask_token_id(config, tokenizer) is None,
    )
    loaded = load(dtype="auto")
    if (exact := _exact_dtype(loaded.model, base or folder)) is not None:
        loaded = load(dtype=exact)
    loaded.model.config.shift = shift
    origin = {FROM: os.fspath(name_or_path)}
    save_checkpoint(loaded.model, loaded.tokenizer, target, loaded.special_ids, extra=origin)
    return loaded


def merge_adapters(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
) -> None:
    """Write adapters and their base as one whole checkpoint.

    Args:
        folder: of the adapters.
        output: created, or replaced if it is empty or holds nothing but a checkpoint of ours.
        dtype: of the weights; "auto" keeps the base's own.

    Raises:
        InputError: as `load_checkpoint` and `save_checkpoint`.
    """
    check_target(output)
    merged = load_checkpoint(folder, dtype=dtype, device="cpu")
    origin = Path(merged.path) / ORIGIN
    save_checkpoint(
        merged.model,
        merged.tokenizer,
        output,
        merged.special_ids,
        decoding=merged.decoding,
        extra=read_object(origin, MAX_SETTINGS) if origin.exists() else None,
    )


def _exact_dtype(model: PreTrainedModel, folder: Path) -> torch.dtype | None:
    """The dtype that rounds no weight of a folder; None if none was rounded in loading."""
    loaded = {
        name: weight.dtype
        for name, weight in model.state_dict().items()
        if weight.is_floating_point()
    }
    stored = {
        name: FLOATS[tensor.dtype]
        for name, tensor in read_headers(folder).items()
        if tensor.dtype in FLOATS
    }
    # Some files name their weights otherwise, and which is which is for transformers to know.
    narrowest = min(loaded.values(), key=lambda dtype: dtype.itemsize)
    pairs = [(loaded.get(name, narrowest), dtype) for name, dtype in stored.items()]
    is_exact = all(torch.promote_types(*pair) == pair[0] for pair in pairs)
    return None if is_exact else reduce(torch.promote_types, stored.values())


def _check_autoregressive(shown: str, config: PreTrainedConfig, *, is_adapter: bool) -> None:
    """Raise `InputError` for a model that decodes blocks already."""
    named = [
        name
        for name in ("mask_token_id", "block_length", "decoding_strategy")
        if getattr(config, name, None) is not None
    ]
    if config.model_type in FAMILY_BLOCK_LENGTH or named:
        reason = f"names `{named[0]}`" if named else f"is of the type {config.model_type}"
        raise InputError(
            f"{shown} is a diffusion model already: its config.json {reason}",
            hint="merge its adapters by `dmax.convert.merge_adapters`"
            if is_adapter
            else "train it as it is, `model.path` of a recipe",
        )
