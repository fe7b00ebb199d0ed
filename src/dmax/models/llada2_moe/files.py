"""Checkpoint files against the model they should fill, from their headers alone: no weight is read.

A damaged or foreign file becomes one sentence that names file and tensor, before minutes of
loading.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size
from transformers import PreTrainedModel

from dmax.errors import InputError
from dmax.models.llada2_moe.conversion import merged_layout, per_expert

HINT = "copy or download the checkpoint again, or check that its config.json belongs to these files"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, its shape and dtype (such as BF16), as its file's header says."""

    file: Path
    shape: Size
    dtype: str


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file; raises `InputError` if it is missing, unreadable or not as long as it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # A length past the end of the file is damage, not a reason to allocate it.
            entries = json.loads(stream.read(length)) if 8 + length <= size else None
        if not isinstance(entries, dict):
            raise ValueError("no header")
        entries.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(file, Size(entry["shape"]), str(entry["dtype"]))
            for name, entry in entries.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except FileNotFoundError:
        raise InputError(f"{file} is missing", hint=HINT) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{file} is not a readable safetensors file ({error})", hint=HINT
        ) from None
    if size != end:
        raise InputError(
            f"{file} is truncated or damaged: {size} bytes, its header promises {end}", hint=HINT
        )
    return tensors


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a folder's weight files: `model.safetensors`, else the shards its index names; empty if neither is."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_header(single) if single.exists() else {}
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not a readable index of safetensors files ({error!r})", hint=HINT
        ) from None
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        found |= read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(
                f"{folder / shard} lacks tensor `{name}`, which the index promises", hint=HINT
            )
    return found


def check_files(folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Raise `InputError` unless the safetensors files of `folder` hold exactly what `model` needs.

    Experts may be stored one by one or merged. A folder without safetensors files is left to
    transformers.

    Args:
        folder: a checkpoint folder.
        model: the model to fill, on any device; only names and shapes are looked at.
    """
    folder = Path(folder)
    found = read_headers(folder)
    if not found:
        return
    expected: dict[str, Size] = {}
    for name, shape in merged_layout(model).items():
        expected |= {name: shape} if name in found else per_expert(name, shape)
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in found and name not in optional]
    if missing:
        where = _common_file(found, folder)
        raise InputError(
            f"{where} lacks {_listed(missing)}, expected with shape {list(expected[missing[0]])}",
            hint=HINT,
        )
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise InputError(
                f"{found[name].file}: tensor `{name}` has shape {list(found[name].shape)}, expected {list(shape)}",
                hint=HINT,
            )
        if name in found and found[name].dtype.startswith(
            ("I", "U", "BOOL")
        ):  # would be cast, codes taken for weights
            raise InputError(
                f"{found[name].file}: tensor `{name}` holds integers ({found[name].dtype}), expected floating point",
                hint="take the checkpoint with its unquantised weights",
            )
    # Old releases stored the rotary frequencies, which follow from the config.
    unexpected = [
        name for name in found if name not in expected and not name.endswith("rotary_emb.inv_freq")
    ]
    if unexpected:
        raise InputError(
            f"{found[unexpected[0]].file} holds {_listed(unexpected)}, unknown to the model",
            hint=HINT,
        )


def check_before_loading(
    model_class: Any, source: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """`check_files` for a plain `from_pretrained(folder)`; anything unusual (a hub id, a variant, …) is left alone."""
    if (
        args
        or not set(kwargs) <= _ORDINARY
        or not isinstance(source, (str, os.PathLike))
        or not os.path.isdir(source)
    ):
        return
    config = kwargs.get("config")
    if config is None:
        config = model_class.config_class.from_pretrained(source)
    if not isinstance(config, model_class.config_class) or getattr(
        config, "quantization_config", None
    ):
        return
    with torch.device("meta"):
        model = model_class(
            copy.deepcopy(config)
        )  # the constructor may settle fields of its config
    check_files(source, model)


# What changes neither which files are read nor what they should hold.
_ORDINARY = {
    *("config", "dtype", "torch_dtype", "device_map", "max_memory", "low_cpu_mem_usage"),
    *(
        "attn_implementation",
        "experts_implementation",
        "trust_remote_code",
        "output_loading_info",
        "weights_only",
    ),
    *("local_files_only", "cache_dir", "force_download", "token", "revision", "code_revision"),
    *("adapter_kwargs", "_from_auto", "_commit_hash"),
}


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return (
        f"tensor {shown}"
        if len(names) == 1
        else f"{len(names)} tensors ({shown}{', …' if len(names) > 3 else ''})"
    )


def _common_file(found: dict[str, StoredTensor], folder: Path) -> Path:
    """The one file everything lies in, else the folder."""
    files = {tensor.file for tensor in found.values()}
    return files.pop() if len(files) == 1 else folder
