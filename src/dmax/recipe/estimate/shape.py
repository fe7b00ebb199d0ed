"""The model of a recipe as shapes, and the largest batch that the recipe admits.

No weight is read: a configuration is enough, and those of published models are known here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from dmax.benchmark.shapes import published_config
from dmax.checkpoint_files import read_settings, reading
from dmax.environment import DTYPES
from dmax.hub import find_folder
from dmax.kernels.moe import best_experts_implementation
from dmax.models import NATIVE, backbone
from dmax.recipe.estimate.step import without_numbers
from dmax.recipe.sections import DataSection, ModelSection, model_config
from dmax.special_ids import SpecialIds, resolve_special_ids
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.config import DMaxConfig
from dmax.training.vocabulary import IGNORE

Settings = tuple[PreTrainedConfig, PreTrainedTokenizerBase | None, GenerationConfig | None]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model whose weights have a shape and a dtype, and no numbers.

    Attributes:
        model: in training mode.
        special_ids: MASK, EOS, padding and block length.
    """

    model: Any
    special_ids: SpecialIds


def read_shape(section: ModelSection, *, on_gpu: bool) -> ModelShape:
    """The model that a recipe would train.

    Raises:
        InputError: nothing here says what the model is, or it cannot be trained.
    """
    config, tokenizer, generation_config = _settings(section)
    special_ids = resolve_special_ids(
        config,
        tokenizer,
        generation_config,
        block_length=section.block_length,
        adds_mask=section.add_mask_token,
    )
    with without_numbers(), reading("no model can be made of this configuration"):
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
    return ModelShape(model.train(), special_ids)


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
        else:
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


def largest_batch(
    data: DataSection, args: DMaxConfig, shape: ModelShape, *, longest: int | None = None
) -> dict[str, Tensor]:
    """The fields of the largest `CleanBatch` that a recipe admits: all but one block are response.

    Args:
        data: says how long an example may be.
        args: how many there are in a batch.
        shape: of the model, whose context is the limit otherwise.
        longest: positions of the longest example, if that is known.
    """
    block = shape.special_ids.block_length
    context = shape.model.config.max_position_embeddings
    positions = args.pad_to or min(longest or data.max_length or context, context)
    length = -(-positions // block) * block
    clean_ids = torch.zeros(args.per_device_train_batch_size, length, dtype=torch.int64)
    is_response = torch.arange(length).expand_as(clean_ids) >= min(block, length - block)
    return {
        "clean_ids": clean_ids,
        "labels": clean_ids.masked_fill(~is_response, IGNORE),
        "corruptible": is_response,
    }
