"""The files of a checkpoint folder: a stranger's, until they prove sound.

Nothing in them makes code load, and nothing is allocated for what a configuration merely claims:
its numbers are compared with the headers of the weight files first. Whatever a library raises on
such a file becomes one sentence.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from dmax.errors import InputError, did_you_mean, first_line, shorten, show
from dmax.files import MAX_SETTINGS, read_object
from dmax.models.llada2_moe.files import StoredTensor, check_dtype, read_headers
from dmax.params import MOST

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
MAX_TOKENIZER = 256 * 2**20
SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
# Keys of a configuration that name code, or files or repositories to take something from. The
# implementations of attention and experts may name kernels of the hub.
CODE = (
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "custom_pipelines",
    "configuration_files",
    "kernel_config",
    "use_kernels",
    "transformers_weights",
    "trust_remote_code",
    "name_or_path",
)
FORM = ("return_dict",)  # of what a forward gives: decoding reads it by name
LABELS = ("num_labels", "id2label", "label2id")  # of classifiers; one name is made for each
MAX_PARTS = 2**16  # of anything else that a configuration counts, such as experts


@contextmanager
def reading(message: str) -> Iterator[None]:
    """Say in one sentence that files are not usable, whatever the library that reads them raises.

    Args:
        message: the beginning of the sentence.

    Raises:
        InputError: in place of the library's error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a library may raise on a damaged file is endless
        raise InputError(f"{message}: {shorten(_reason(error))}") from error


def _reason(error: BaseException) -> str:
    """What an error says in its first line; Python's own words say nothing of a file."""
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return f"nothing takes `{unknown[1]}`"
    if isinstance(error, (TypeError, AttributeError)):
        return "one of its values is of a kind that it must not have"
    if isinstance(error, KeyError):
        return f"it names {error}, which is unknown"
    if isinstance(error, StrictDataclassError):  # its first line names the field, not the reason
        return " ".join(str(error).split())
    return first_line(error)


def read_settings(
    folder: Path, base: Path | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None, GenerationConfig | None]:
    """Configuration, tokenizer and generation config of a folder, the latter two if it has them.

    Args:
        folder: of a checkpoint or of adapters.
        base: that of the adapters' model, which has what the first folder lacks.

    Raises:
        InputError: a file is damaged or no file, the architecture is unknown, or the weights are
            quantised.
    """
    folders = [folder] if base is None else [folder, base]
    records: dict[str, dict[str, Any]] = {}
    for each in reversed(folders):
        _check_kinds(each)
        for name in SETTINGS_FILES:
            if (each / name).exists():
                records[name] = read_object(each / name, MAX_SETTINGS)
    config = _config(shorten(str(folder)), records["config.json"])
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: GenerationConfig | None = None
    for each in folders:
        if tokenizer is None and any((each / name).is_file() for name in TOKENIZER_FILES):
            with reading(f"the tokenizer of {shorten(str(each))} is not usable"):
                tokenizer = AutoTokenizer.from_pretrained(
                    each, config=config, trust_remote_code=False
                )
    if record := records.get("generation_config.json"):
        with reading(f"{shorten(str(folder))}/generation_config.json is not usable"):
            generation_config = GenerationConfig.from_dict(record)
    return config, tokenizer, generation_config


def _check_kinds(folder: Path) -> None:
    """Make sure that whatever a library may open is a file: a pipe or a device never ends."""
    shown = shorten(str(folder))
    with reading(f"{shown} is not a usable checkpoint"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIXES) and not os.path.isfile(entry.path):
                raise InputError(
                    f"{shown} is not a usable checkpoint: {shorten(entry.name)} is not a file"
                )
            is_tokenizer = entry.name.startswith("tokenizer")
            if is_tokenizer and os.path.getsize(entry.path) > MAX_TOKENIZER:
                raise InputError(
                    f"{shown} is not a usable checkpoint: {shorten(entry.name)} has more than "
                    f"{MAX_TOKENIZER} bytes"
                )


def _config(folder: str, record: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a record, without what could make code load.

    Our own way from the record to the class: that of transformers looks for code and for other
    files on the way.
    """
    kind = record.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"{folder} is not a usable checkpoint: its `model_type` is {show(kind)}, "
            "which is unknown",
            hint=did_you_mean(kind, CONFIG_MAPPING.keys()),
        )
    if record.get("quantization_config") is not None:
        raise InputError(
            f"{folder} holds quantised weights (`quantization_config`), which are not read",
            hint="take the checkpoint with its unquantised weights",
        )
    _check_numbers(record, folder)
    with reading(f"{folder} is not a usable checkpoint"):
        config = CONFIG_MAPPING[kind].from_dict(without_code(record))
        if config.get_text_config() is not config:
            raise InputError(
                f"{folder} holds a {kind}, which is more than a text decoder (images, for "
                "example); only text decoders are read"
            )
        return config


def without_code(record: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that name code or where to get it, at any depth."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in record.items()
        if key not in (*CODE, *FORM, *LABELS) and not key.startswith("_")
    }


def _check_numbers(record: Mapping[str, Any], folder: str) -> None:
    for key, value in record.items():
        if isinstance(value, Mapping):
            _check_numbers(value, folder)
        elif (isinstance(value, int) and abs(value) > MOST) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise InputError(
                f"{folder} is not a usable checkpoint: its `{shorten(key)}` is {show(value)}"
            )


def check_size(folder: Path, config: PreTrainedConfig) -> None:
    """Compare what a configuration describes with the weights that are there, before it is built.

    Raises:
        InputError: there are no weights, their files are damaged, or the model has more.
    """
    shown = shorten(str(folder))
    found = read_headers(folder)
    if not found:
        raise InputError(f"{shown} cannot be loaded: it holds no safetensors files")
    for name, stored in found.items():
        if name.endswith("weight"):
            check_dtype(name, stored)
    values = sum(math.prod(stored.shape) for stored in found.values())
    for key, count in config.to_dict().items():
        most = _most(key, found, values)
        if most is not None and isinstance(count, int) and count > most:
            raise InputError(
                f"{shown} cannot be loaded: `{key}` in its config.json is {count}, and its weights "
                f"are {values} numbers in {len(found)} tensors"
            )
    with reading(f"{shown} cannot be loaded"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    needed = sum(weight.numel() for weight in model.parameters())
    if needed > 2 * values:  # a few that are missing are named when the weights are loaded
        raise InputError(
            f"{shown} cannot be loaded: its config.json describes a model of at least {needed} "
            f"weights, its files hold {values}"
        )


def _most(key: str, found: Mapping[str, StoredTensor], values: int) -> int | None:
    """The largest value of a setting that these weights can have; None where any will do."""
    if key == "num_hidden_layers":
        return len(found)
    if key.startswith(("num_", "n_")):
        return MAX_PARTS
    return values if key.endswith(("_size", "head_dim")) else None


def write_for_earlier_releases(file: Path) -> None:
    """Rewrite a tokenizer_config.json so that transformers 4.57 reads it too.

    It does not know the class `TokenizersBackend`, and takes a list of further special tokens by
    another name. Later releases know the names of both. Code that a tokenizer came with is not
    saved, so no release shall look for it.
    """
    record = read_object(file, MAX_SETTINGS)
    record.pop("auto_map", None)
    if record.get("tokenizer_class") == "TokenizersBackend":
        record["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(record.get("extra_special_tokens"), list):
        record["additional_special_tokens"] = record.pop("extra_special_tokens")
    file.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
