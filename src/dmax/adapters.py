"""Low-rank adapters: beside a model's weights while they learn, within them for decoding.

peft does the work. What is settled here is which of its methods serve a block-diffusion model,
which layers they adapt unless they are told, and what a stranger's files may hold.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dmax import extras
from dmax.checkpoint_files import reading
from dmax.errors import InputError, did_you_mean, shorten, show
from dmax.files import MAX_SETTINGS, read_object
from dmax.hub import find_folder, is_adapter
from dmax.models.llada2_moe.files import read_header
from dmax.tiny import bundled

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Methods that act within the layers, so that they can be merged into the weights.
METHODS = ("LORA", "LOHA", "LOKR", "OFT")
LINEAR = (nn.Linear, Conv1D)  # the second one, with its weight turned, is that of GPT-2
ALL_LINEAR = "all-linear"
EXPERTS = "experts"
# Fields of an adapter's configuration that name modules to import, or files and repositories.
CODE = ("auto_mapping", "megatron_config", "megatron_core", "revision")


def add_adapters(model: PreTrainedModel, config: Any, base: str) -> Any:
    """Put adapters beside the weights of a model, which no longer learn.

    The layers are replaced in place, so the model itself has the adapters, too.

    Args:
        model: a block-diffusion model.
        config: a `peft.LoraConfig`, or that of another method in `METHODS`. All linear layers are
            adapted if it names none.
        base: how files shall name the model without its adapters (`base_name`).

    Returns:
        The `peft.PeftModel` around the model.

    Raises:
        InputError: peft is missing, the method does not act within layers, its layers are not
            those of the model, or the embedding or the output layer is among them.
    """
    extras.require("peft", "train", "training adapters")
    from peft import PeftConfig, get_peft_model

    if not isinstance(config, PeftConfig):
        raise InputError(
            f"adapters are described by a configuration of peft, got {show(config)}",
            hint="pass a peft.LoraConfig",
        )
    _check_method(getattr(config.peft_type, "value", config.peft_type), "`peft_config`")
    config = _prepared(copy.deepcopy(config), model)
    with reading("these adapters do not go with the model"), _without_warning():
        adapted = get_peft_model(model, config)
    adapted.active_peft_config.base_model_name_or_path = base
    check_adapted(adapted)
    # Otherwise peft asks the hub whether the vocabulary has grown, at every checkpoint.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def check_adapted(adapted: Any) -> None:
    """Make sure that a `peft.PeftModel` can be trained and merged.

    Raises:
        InputError: its method does not act within layers, it has several adapters, or the embedding
            or the output layer is adapted: decoding reads their weights without their layers.
    """
    if len(adapted.peft_config) != 1:
        raise InputError(f"one adapter is trained at a time, got {', '.join(adapted.peft_config)}")
    _check_method(adapted.active_peft_config.peft_type.value, "the adapter")
    for layer in (adapted.get_input_embeddings(), adapted.get_output_embeddings()):
        if type(layer) not in (nn.Embedding, nn.Linear):
            raise InputError(
                "the embedding and the output layer cannot be adapted",
                hint="leave them out of `target_modules` and `modules_to_save`",
            )


def has_adapters(model: Any) -> bool:
    """Whether a model is a `peft.PeftModel`; peft need not be there to ask."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def without_adapters(model: Any) -> Any:
    """The network that adapters of peft stand in; a model without them is its own."""
    return model.get_base_model() if has_adapters(model) else model


def find_targets(model: nn.Module, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What adapters shall adapt, in the words of peft.

    Args:
        model: a block-diffusion model.
        names: `attention`; `shared_experts`, all linear layers that every token passes besides;
            `experts`, the routed ones, which are stacked in parameters; `all-linear`, the first
            two; and any names of modules.

    Returns:
        `target_modules` and `target_parameters` of a `LoraConfig`.

    Raises:
        InputError: the model has no layers of a kind.
    """
    layers = dict(model.named_modules())
    linear = {name for name, layer in layers.items() if type(layer) in LINEAR}
    linear -= {name for name in linear if layers[name] is _output_layer(model)}
    attention = {name for name in linear if _attends(layers[name.rpartition(".")[0]])}
    stacked = {
        f"{name}.{weight}"
        for name, layer in layers.items()
        for weight in ("gate_up_proj", "down_proj")
        if isinstance(getattr(layer, weight, None), nn.Parameter)
    }
    groups = {
        "attention": attention,
        "shared_experts": linear - attention,
        ALL_LINEAR: linear,
        EXPERTS: stacked,
    }
    for name in names:
        if not groups.get(name, {name}):
            raise InputError(f"{type(model).__name__} has no `{name}` that adapters could adapt")
    modules = {layer for name in names if name != EXPERTS for layer in groups.get(name, {name})}
    return sorted(modules), sorted(stacked) if EXPERTS in names else []


def lora_config(
    model: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    targets: Sequence[str] = (ALL_LINEAR,),
    use_rslora: bool = False,
) -> Any:
    """The `peft.LoraConfig` of adapters over the layers that `find_targets` finds.

    Raises:
        InputError: peft is missing, the model has no such layers, or there is a dropout before
            stacked experts, which take their inputs by themselves.
    """
    extras.require("peft", "train", "training adapters")
    from peft import LoraConfig

    modules, parameters = find_targets(model, targets)
    if parameters and dropout:
        raise InputError(f"adapters of stacked experts take no `dropout`, got {dropout}")
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_rslora=use_rslora,
    )


def base_name(name_or_path: str | os.PathLike[str]) -> str:
    """How an adapter names its base: a bundled name or a hub id as it is, a folder from the root.

    Raises:
        InputError: adapters without a whole model.
    """
    name = os.fspath(name_or_path)
    folder = os.path.abspath(os.path.expanduser(name))
    if bundled(name) is not None or not os.path.isdir(folder):
        return name
    if is_adapter(Path(folder)):
        raise InputError(
            f"{shorten(folder)} holds adapters, which cannot be the base of others",
            hint="merge them into their base first, `dmax.convert.merge_adapters`",
        )
    return folder


def named_base(folder: Path) -> str:
    """What an adapter names as its base: a folder or a hub id.

    Raises:
        InputError: it names none.
    """
    named = read_object(folder / CONFIG, MAX_SETTINGS).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        shown = shorten(str(folder))
        raise InputError(f"{shown}/{CONFIG} names no base model (`base_model_name_or_path`)")
    return named


def find_base(folder: Path) -> Path:
    """The folder of the model that an adapter was trained for, downloaded if need be.

    Raises:
        InputError: the adapter names no model, or one that is not there or no whole model.
    """
    named = named_base(folder)
    shown = shorten(str(folder))
    try:
        base = find_folder(named)
    except InputError as error:
        raise InputError(
            f"the base model of the adapters in {shown} is missing: {error.message}",
            hint=f"correct `base_model_name_or_path` in its {CONFIG}",
        ) from None
    if is_adapter(base):
        raise InputError(f"the base model of the adapters in {shown} holds adapters itself")
    return base


def merge_into(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add the adapters of a folder to the weights of their base; the same model is returned.

    Raises:
        InputError: peft is missing, the files are damaged or not those of adapters that can be
            merged, or they do not fit the model.
    """
    shown = shorten(str(folder))
    extras.require("peft", "train", f"loading the adapters in {shown}")
    from peft import PeftModel

    config = _stored_config(folder)
    with reading(f"the adapters in {shown} do not go with their base model"), _without_warning():
        adapted = PeftModel(model, config)
    load_adapters(adapted, folder)
    with reading(f"the adapters in {shown} cannot be merged"):
        return merged(adapted)


def merged(adapted: Any) -> PreTrainedModel:
    """The model in a `peft.PeftModel`, its adapters added to its weights; the same object."""
    model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return model.requires_grad_(True)  # peft has frozen it


@torch.no_grad()
def load_adapters(adapted: Any, folder: Path) -> None:
    """Give a `peft.PeftModel` the values of the adapters in a folder.

    Raises:
        InputError: the file is damaged, or its weights are not those of the model.
    """
    from peft import get_peft_model_state_dict

    # Filled in place: peft's own way converts names as those of a whole checkpoint.
    weights: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check_fit(weights, folder / WEIGHTS)
    for name, value in load_file(folder / WEIGHTS).items():
        weights[name].copy_(value)


def _stored_config(folder: Path) -> Any:
    """The configuration of a stranger's adapters, without what could make code load."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    shown = shorten(str(folder / CONFIG))
    record = read_object(folder / CONFIG, MAX_SETTINGS)
    _check_method(record.get("peft_type"), shown)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[record["peft_type"]]
    known = {entry.name for entry in fields(kind) if entry.init} - {*CODE, "task_type"}
    with reading(f"{shown} is not usable"):
        return kind(**{name: value for name, value in record.items() if name in known})


def _check_method(name: Any, where: str) -> None:
    if name not in METHODS:
        raise InputError(
            f"{where} is of the method {show(name)}, which adds to a model's input or cannot be "
            f"merged into its weights; adapters may be {', '.join(METHODS)}",
            hint=did_you_mean(str(name), METHODS),
        )


def _prepared(config: Any, model: PreTrainedModel) -> Any:
    """A configuration with the layers that it leaves out, for a model that may not `generate`."""
    if not (config.target_modules or getattr(config, "target_parameters", None)):
        config.target_modules = ALL_LINEAR
    if not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = None
    return config


def _check_fit(weights: Mapping[str, Tensor], file: Path) -> None:
    """Compare the names and shapes in a file with those of a model's adapters."""
    stored = read_header(file)
    hint = "is its `base_model_name_or_path` the model that it was trained for?"
    for names, verb in (
        (weights.keys() - stored.keys(), "lacks"),
        (stored.keys() - weights.keys(), "has, besides those of its configuration,"),
    ):
        if names:
            first = shorten(min(names))
            raise InputError(f"{file} {verb} {len(names)} weights, the first is `{first}`", hint)
    for name, entry in sorted(stored.items()):
        if entry.shape != weights[name].shape:
            raise InputError(
                f"{file} does not fit its base model: `{name}` has the shape {list(entry.shape)}, "
                f"and the model needs {list(weights[name].shape)}",
                hint,
            )


@contextmanager
def _without_warning() -> Iterator[None]:
    """Without those of transformers' old name for checkpointing, and of layers with turned weights.

    Peft asks for the one, and sees to the others by itself.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but")
        yield


def _attends(layer: nn.Module) -> bool:
    return hasattr(layer, "is_causal")


def _output_layer(model: Any) -> nn.Module | None:
    layer: nn.Module | None = model.get_output_embeddings()
    return layer
