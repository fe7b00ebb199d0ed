"""Checkpoint files against the model that they should fill, from their headers: no weight is read.

A damaged or foreign file becomes one sentence that names file and tensor, before minutes of
loading.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Size
from transformers import PreTrainedModel

from dmax.errors import InputError, shorten
from dmax.files import read_object
from dmax.models.llada2_moe.conversion import merged_layout, per_expert

HINT = "copy or download the checkpoint again, or check that its config.json belongs to these files"
FLOATS = ("BF16", "F16", "F32", "F64")
MAX_INDEX = 64 * 2**20  # bytes; published ones have up to 3 MiB
HARMLESS = "rotary_emb.inv_freq"  # in files of old releases; it follows from the configuration


class StoredTensor(NamedTuple):
    """Where a tensor is stored, with its shape and dtype (such as BF16) from the file's header."""

    file: Path
    shape: Size
    dtype: str


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        InputError: it is missing, unreadable, or not as long as its header says.
    """
    tensors = {}
    try:
        with safe_open(file, "pt") as stored:
            names = stored.keys()
            for name in names:
                header = stored.get_slice(name)
                shape = Size(header.get_shape())
                tensors[name] = StoredTensor(file, shape, header.get_dtype())
    except FileNotFoundError:
        reason = "cannot be read" if file.exists() else "is missing"  # for both the same error
        raise InputError(f"{file} {reason}", hint=HINT) from None
    except (OSError, SafetensorError) as error:
        message = f"{file} is not a readable safetensors file, or is truncated ({error})"
        raise InputError(message, hint=HINT) from None
    return tensors


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's weight files; empty without any.

    They are in `model.safetensors`, or else in the shards that the index names.

    Raises:
        InputError: as `read_header`, an unreadable index, or a tensor that its shard lacks.
    """
    single = folder / "model.safetensors"
    if single.exists():
        return read_header(single)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {}
    try:
        weight_map = _weight_map(read_object(index, MAX_INDEX))
    except InputError as error:
        message = f"{index} is not a readable index of safetensors files ({error.message})"
        raise InputError(message, hint=HINT) from None
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        found |= read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in found:
            message = f"{folder / shard} lacks tensor `{shorten(name)}`, which the index promises"
            raise InputError(message, hint=HINT)
    return found


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    """The file of every tensor; raises `InputError` if that is not what an index says."""
    found = index.get("weight_map")
    if not isinstance(found, dict):
        raise InputError("it has no mapping `weight_map`")
    if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
        raise InputError("it names something else than files of its folder")
    return found


def check_files(folder: Path, model: PreTrainedModel) -> None:
    """Raise `InputError` unless the safetensors files of `folder` hold exactly what `model` needs.

    Experts may be stored one by one or merged. A folder without safetensors files is left to
    transformers.

    Args:
        folder: a checkpoint folder.
        model: the model to fill, on any device; only names and shapes are read.
    """
    found = read_headers(folder)
    if not found:
        return
    expected: dict[str, Size] = {}
    for name, shape in merged_layout(model).items():
        expected |= {name: shape} if name in found else per_expert(name, shape)
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in found and name not in optional]
    if missing:
        files = {tensor.file for tensor in found.values()}
        where = files.pop() if len(files) == 1 else folder
        wanted = list(expected[missing[0]])
        message = f"{where} lacks {_listed(missing)}, expected with shape {wanted}"
        raise InputError(message, hint=HINT)
    for name, shape in expected.items():
        if name in found:
            _check_tensor(name, found[name], shape)
    unexpected = [name for name in found if name not in expected and not name.endswith(HARMLESS)]
    if unexpected:
        file = found[unexpected[0]].file
        message = f"{file} holds {_listed(unexpected)}, unknown to the model"
        raise InputError(message, hint=HINT)


def _check_tensor(name: str, stored: StoredTensor, expected: Size) -> None:
    if stored.shape != expected:
        shape = f"shape {list(stored.shape)}, expected {list(expected)}"
        raise InputError(f"{stored.file}: tensor `{name}` has {shape}", hint=HINT)
    check_dtype(name, stored)


def check_dtype(name: str, stored: StoredTensor) -> None:
    """Raise `InputError` if a tensor holds something else than plain floating-point numbers."""
    if stored.dtype not in FLOATS:  # transformers would take codes for weights
        raise InputError(
            f"{stored.file}: tensor `{name}` holds {stored.dtype}, "
            f"expected floating point ({', '.join(FLOATS)})",
            hint="take the checkpoint with its unquantised weights",
        )


def check_before_loading(
    model_class: Any, source: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """`check_files` for a plain `from_pretrained(folder)`; anything unusual is not checked.

    Unusual are a hub id, a variant, weights given by hand, and the like.
    """
    if args or not set(kwargs) <= ORDINARY:
        return
    if not os.path.isdir(source or ""):
        return
    config_class = model_class.config_class
    config = kwargs.get("config") or config_class.from_pretrained(source)
    if not isinstance(config, config_class) or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))  # the constructor may settle fields of it
    check_files(Path(source), model)


ORDINARY = set(
    """
    config dtype torch_dtype device_map max_memory low_cpu_mem_usage
    attn_implementation experts_implementation trust_remote_code output_loading_info weights_only
    local_files_only cache_dir force_download token revision code_revision
    adapter_kwargs _from_auto _commit_hash
    """.split()
)
"""Arguments that change neither which files are read nor what they should hold."""


def _listed(names: list[str]) -> str:
    """Up to three of the names, after their number."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    if len(names) == 1:
        return f"tensor {shown}"
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} tensors ({shown}{more})"
