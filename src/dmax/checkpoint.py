"""From a name to a model that is ready to decode, and back to files."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dmax.adapters import find_base, merge_into, named_base
from dmax.checkpoint_files import (
    SETTINGS_FILES,
    TOKENIZER_FILES,
    check_size,
    read_settings,
    reading,
    write_for_earlier_releases,
)
from dmax.checkpoint_kind import (
    AUTOREGRESSIVE,
    block_length_of,
    check_decoding,
    is_silent,
    named_decoding,
    set_shift,
)
from dmax.errors import InputError, shorten, show
from dmax.files import check_new_folder, new_folder, writing
from dmax.hub import find_folder, is_adapter
from dmax.kernels.moe import PLAIN_EXPERTS, best_experts_implementation
from dmax.kernels.quant import Format, check_format
from dmax.models import NATIVE, backbone
from dmax.models.quantization import quantize_experts
from dmax.special_ids import SpecialIds, find_mask_token_id, reads_shifted, resolve_special_ids

# Says where weights come from, and that a folder is ours.
ORIGIN = "dmax.json"
# All that a checkpoint written by `save_checkpoint` can consist of, with a picture of its training.
OWN_FILES = (
    *TOKENIZER_FILES,
    *SETTINGS_FILES,
    "added_tokens.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.jinja",
    "adapter_config.json",
    ORIGIN,
    "curves.png",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model, its tokenizer and what decoding needs to know about it.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: None for a checkpoint without one, which then takes and gives token ids.
        special_ids: MASK, EOS, pad and the block length.
        path: the folder it was read from; empty for a new model.
        decoding: name of the strategy that the model was trained for; None where nobody says.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    special_ids: SpecialIds
    path: str
    decoding: str | None = None


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    mask_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    block_length: int | None = None,
    shift: bool | None = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    add_mask_token: bool = False,
    autoregressive: bool = False,
    quantization: Format | None = None,
) -> Checkpoint:
    """Read a bundled checkpoint, a local folder or a hub repository; no remote code is ever run.

    Args:
        name_or_path: a bundled name (`dmax.tiny.BUNDLED`), a folder, or a hub id; of a model of
            ours, of a dense decoder of transformers, or of adapters, which are merged into it.
        dtype: of the weights; "auto" keeps the files' own.
        device: where the model goes; on "meta" it has no weights, and none are read.
        mask_token_id: overrides the checkpoint's.
        eos_token_id: overrides the checkpoint's; one id or several.
        block_length: overrides the checkpoint's.
        shift: overrides the checkpoint's: whether a token is predicted by the position before it.
        attn_implementation: of transformers' attention interface; None lets transformers choose.
        experts_implementation: of transformers' experts interface; None chooses the fastest here.
        add_mask_token: give an autoregressive model the mask token it lacks; takes a tokenizer.
        autoregressive: take one that names nothing of diffusion as such: a token a forward.
        quantization: of the experts, for decoding only: "int8", "fp8" or "int4".

    Raises:
        InputError: the name leads nowhere, what is there is not usable, or an id is missing.
    """
    folder = find_folder(name_or_path)
    base = find_base(folder) if is_adapter(folder) else None
    settings = read_settings(folder, base)
    config, tokenizer, _ = settings
    stored, words, _ = settings if base is None else read_settings(base)  # ids are the adapters'
    lacks_mask = add_mask_token if base is None else find_mask_token_id(stored, words) is None
    named_after = (name_or_path, folder) if base is None else (named_base(folder), base)
    # All settings first: a wrong one should not cost the loading of the weights.
    _check_wishes(folder, config, tokenizer, add_mask_token, quantization)
    decoding = named_decoding(config, *named_after)
    said = (mask_token_id, block_length, shift, decoding)
    is_plain = autoregressive and said == (None,) * 4 and is_silent(folder, config, tokenizer)
    if is_plain:
        block_length, shift, decoding = 1, True, AUTOREGRESSIVE
    special_ids = resolve_special_ids(
        *settings,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        block_length=block_length_of(block_length, config, *named_after),
        adds_mask=add_mask_token or is_plain,
    )
    set_shift(stored, reads_shifted(config) if shift is None else shift)
    if experts_implementation is None and stored.model_type in PLAIN_EXPERTS:
        experts_implementation = best_experts_implementation(stored.num_experts, device)
    options = _chosen(attn_implementation, experts_implementation)
    place = device if base is None and not lacks_mask else "cpu"  # where there is more to compute
    model = _load_model(base or folder, stored, dtype, place, options)
    if lacks_mask or is_plain:
        added = backbone.add_mask_token(model, None if is_plain else tokenizer)
        special_ids = replace(special_ids, mask_token_id=added)
    if base is not None and model.device.type != "meta":
        merge_into(model, folder)
    if quantization is not None:  # before the move: the device never holds the unquantised experts
        quantize_experts(model, quantization)
    return Checkpoint(model.to(device), tokenizer, special_ids, str(folder), decoding)


def new_checkpoint(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
) -> Checkpoint:
    """A new model with random weights: our own architectures, or a dense decoder of transformers.

    Args:
        config: says the shape and `block_length`; `mask_token_id` and `eos_token_id` too, unless
            the tokenizer does.
        tokenizer: None for a model that takes and gives token ids.
        dtype: of the weights.
        attn_implementation: of transformers' attention interface; None lets transformers choose.
        experts_implementation: of transformers' experts interface; None lets transformers choose.

    Raises:
        InputError: an id or the block length is missing, or the architecture cannot be used.
    """
    special_ids = resolve_special_ids(config, tokenizer)
    options = _chosen(attn_implementation, experts_implementation)
    return Checkpoint(_new_model(config, dtype, options).eval(), tokenizer, special_ids, path="")


def as_diffusion_model(model: PreTrainedModel) -> PreTrainedModel:
    """One of our own architectures as it is, another made into a block-diffusion model, once.

    Raises:
        InputError: the architecture cannot be used.
    """
    is_ready = isinstance(model, NATIVE) or hasattr(model, "has_linear_head")
    return model if is_ready else backbone.as_block_diffusion(model)


def save_checkpoint(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    special_ids: SpecialIds,
    *,
    decoding: str | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint that names its own ids and decoding, whole or not at all.

    An interrupted save leaves the checkpoint that was there.

    Args:
        model: the model, saved in its published layout; of a `peft.PeftModel` its adapters.
        tokenizer: saved beside it, if any.
        folder: created, or replaced if it is empty or holds nothing but a checkpoint of ours.
        special_ids: written to the config; EOS and pad to the generation config too.
        decoding: name of the strategy that the model was trained for; None keeps what its config
            says.
        extra: a JSON record of where the weights come from, written as `dmax.json`; without one
            it only says whose the folder is.

    Raises:
        InputError: the folder holds something else or cannot be written, the disk is full, or the
            strategy is unknown.
    """
    folder = check_target(folder)
    check_decoding(decoding, "the checkpoint")
    with writing(f"the checkpoint {folder}"), new_folder(folder) as partial:
        model.save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # a form of peft's that nobody filled in
        config: Any = copy.deepcopy(model.config)  # the caller's stays as it is
        write_ids(config, special_ids, decoding)
        config.save_pretrained(partial)
        known = getattr(model, "generation_config", None)  # our own architectures have none
        generation = copy.deepcopy(known or GenerationConfig())
        generation.eos_token_id = config.eos_token_id
        generation.pad_token_id = special_ids.pad_token_id
        generation.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
            write_for_earlier_releases(partial / "tokenizer_config.json")
        (partial / ORIGIN).write_text(json.dumps(extra or {}, indent=2) + "\n")
        # safetensors makes files that only their owner can read
        readable = (partial / "config.json").stat().st_mode
        for file in partial.iterdir():
            file.chmod(readable)


def write_ids(config: Any, special_ids: SpecialIds, decoding: str | None = None) -> None:
    """Write into a configuration what decoding asks of it; None keeps the decoding it names."""
    first, *more = special_ids.eos_token_ids
    config.eos_token_id = [first, *more] if more else first
    config.mask_token_id = special_ids.mask_token_id
    config.block_length = special_ids.block_length
    if decoding is not None:
        config.decoding_strategy = decoding


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that `save_checkpoint` could write; asked before training.

    A link is followed, so that it stays and the folder behind it is written.

    Raises:
        InputError: the folder holds something that is not part of a checkpoint of ours, or cannot
            be written.
    """
    folder = Path(os.path.expanduser(folder))
    with writing(f"the checkpoint {folder}"):
        folder = folder.resolve()
        if folder.exists() and not _is_replaceable(folder):
            raise InputError(
                f"{folder} exists and was not written by dmax", hint="choose another output folder"
            )
        if os.path.ismount(folder) or (os.path.exists(".") and folder == Path.cwd()):
            raise InputError(
                f"{folder} cannot be replaced: it is the current folder or a mount point",
                hint="name a folder inside it",
            )
        check_new_folder(folder)
    return folder


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty, or a checkpoint of ours and nothing besides."""
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    is_known = all(entry.is_file() and any(map(entry.match, OWN_FILES)) for entry in entries)
    return not entries or (is_known and (folder / ORIGIN).is_file())


def _new_model(
    config: PreTrainedConfig, dtype: torch.dtype | str, options: dict[str, str]
) -> PreTrainedModel:
    with reading("no model can be made from this configuration"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=config.dtype if dtype == "auto" else dtype,
            trust_remote_code=False,
            **options,
        )
    return as_diffusion_model(model)


def _load_model(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device: torch.device | str,
    options: dict[str, str],
) -> PreTrainedModel:
    check_size(folder, config)
    if torch.device(device).type == "meta":
        with torch.device(device):
            return _new_model(config, dtype, options)
    with reading(f"{shorten(str(folder))} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,  # others may hold code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in own words
            **options,
        )
    model, report = loaded
    # Our own classes have checked their files. For others transformers would fill gaps with random
    # weights.
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} weights of the model, the first is `{missing[0]}`"
        )
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{folder} does not fit its config.json: `{name}` has the shape {list(stored)}, "
            f"and the model needs {list(expected)}"
        )
    return as_diffusion_model(model)


def _chosen(attention: str | None, experts: str | None) -> dict[str, str]:
    """The implementations that are chosen here; transformers chooses the others."""
    named = {"attn_implementation": attention, "experts_implementation": experts}
    for name, value in named.items():
        if value is not None and not (isinstance(value, str) and value):
            raise InputError(f"`{name}` must be a name, got {show(value)}")
    return {name: value for name, value in named.items() if value}


def _check_wishes(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    add_mask_token: bool,
    quantization: str | None,
) -> None:
    """Raise `InputError` for what a caller wants of a checkpoint and cannot have."""
    if quantization is not None:
        check_format(quantization)
    if not add_mask_token:
        return
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer that a mask token could be added to")
    if find_mask_token_id(config, tokenizer) is not None:
        raise InputError(f"{folder} has a mask token already", hint="leave out `add_mask_token`")
