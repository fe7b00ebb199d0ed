"""The model of a recipe as shapes: a configuration is enough, and no weight is read.

Those of published models are known here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from dmax.adapters import add_adapters
from dmax.benchmark.shapes import published_config
from dmax.checkpoint_files import read_settings, reading
from dmax.checkpoint_kind import block_length_of
from dmax.environment import DTYPES
from dmax.hub import find_folder
from dmax.kernels.moe import PLAIN_EXPERTS, best_experts_implementation
from dmax.models import NATIVE, backbone
from dmax.recipe.estimate.step import as_on_cpu
from dmax.recipe.sections import ModelSection, Recipe, model_config
from dmax.special_ids import SpecialIds, resolve_special_ids
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.config import DMaxConfig

Settings = tuple[PreTrainedConfig, PreTrainedTokenizerBase | None, GenerationConfig | None]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model whose weights have a shape and a dtype, and no numbers.

    Attributes:
        model: in training mode, with adapters or not.
        special_ids: MASK, EOS, padding and block length.
        tokenizer: None where there is none.
    """

    model: Any
    special_ids: SpecialIds
    tokenizer: PreTrainedTokenizerBase | None


def read_shape(recipe: Recipe, *, on_gpu: bool) -> ModelShape:
    """The model that a recipe would train, with the adapters that it puts into it.

    Raises:
        InputError: nothing here says what the model is, or it cannot be trained.
    """
    section = recipe.model
    config, tokenizer, generation_config = _settings(section)
    if section.shift is not None:
        config.shift = section.shift
    special_ids = resolve_special_ids(
        config,
        tokenizer,
        generation_config,
        block_length=_block_length(section, config),
        adds_mask=section.add_mask_token,
    )
    with torch.device("meta"), reading("no model can be made of this configuration"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES.get(section.dtype) or config.dtype or torch.float32,
            trust_remote_code=False,
            **_implementations(section, config, on_gpu=on_gpu),
        )
        if not isinstance(model, NATIVE):
            model = backbone.as_block_diffusion(model)
        if section.add_mask_token:
            backbone.add_mask_token(model, tokenizer)
    if section.path is not None:
        _keep_in_float32(model)
    if recipe.lora is not None:
        with torch.device("meta"), recipe.file.at("lora"):
            model = add_adapters(model, recipe.lora.config(model), section.path or "")
    return ModelShape(as_on_cpu(model.train()), special_ids, tokenizer)


def _keep_in_float32(model: Any) -> None:
    """Of tensors that are read from files, some stay in float32 whatever the weights have."""
    names = set(model._keep_in_fp32_modules_strict or ())
    for name, buffer in model.named_buffers():
        if names & set(name.split(".")):
            buffer.data = buffer.data.float()


def _block_length(section: ModelSection, config: PreTrainedConfig) -> int | None:
    """What the recipe asks for, or what the name of a published model says."""
    if section.path is None:
        return section.block_length
    return block_length_of(section.block_length, config, section.path, Path(section.path))


def _settings(section: ModelSection) -> Settings:
    if section.path is None:
        tokenizer = build_tokenizer()
        return model_config(section.config or {}, tokenizer), tokenizer, None
    if not os.path.isdir(section.path) and (config := published_config(section.path)):
        return config, None, None
    return read_settings(find_folder(section.path, with_weights=False))


def _implementations(section: ModelSection, config: Any, *, on_gpu: bool) -> dict[str, str]:
    """Those that training takes, as far as they make a difference to memory."""
    attention = section.attn_implementation
    if attention == "flex_attention":
        attention = "sdpa"  # keeps the same tensors for backward, and its shapes are known here
    experts = section.experts_implementation
    if experts is None and hasattr(config, "num_experts"):
        if section.path is None:
            experts = "eager"
        elif on_gpu:
            experts = "grouped_mm"
        elif config.model_type in PLAIN_EXPERTS:
            experts = best_experts_implementation(config.num_experts, torch.device("cpu"))
    chosen = {"attn_implementation": attention, "experts_implementation": experts}
    return {name: value for name, value in chosen.items() if value is not None}


def checkpoint_layers(model: Any, args: DMaxConfig) -> None:
    """Have layers computed anew in backward, as Trainer does."""
    options = args.gradient_checkpointing_kwargs
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.24
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def gather_in(model: Any, dtype: torch.dtype | None) -> None:
    """Give weights the dtype in which FSDP2 gathers them; buffers keep theirs."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype or weight.dtype)
