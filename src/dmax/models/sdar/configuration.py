"""Configurations of SDAR, with the attribute names of the published `config.json`.

A prediction is read at the position itself, as in the published training and generation code: what
comes from a model that predicts the next token are the weights alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Self

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

MASK = 151_669  # `<|MASK|>` of the published tokenizers


class SDARBase(PreTrainedConfig):
    """What both configurations of the family add to Qwen3's.

    Published files call the block length `block_size`, or leave it out, and MASK with it.
    """

    mask_token_id: int | None = None
    block_length: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A configuration; Auto classes know its model from then on, as of `LLaDA2MoeConfig`."""
        import_module("dmax.models.auto")
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        """Read the published names."""
        block_size = kwargs.pop("block_size", None)
        if self.block_length is None:
            self.block_length = block_size
        if self.mask_token_id is None and self.vocab_size > MASK:
            self.mask_token_id = MASK
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Published keys beside transformers' own, so that other engines read what we write."""
        record = super().to_dict()
        rope = record["rope_parameters"]
        record["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            record["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
        if self.block_length is not None:
            record["block_size"] = self.block_length
        return record


class SDARConfig(SDARBase, Qwen3Config):
    """A dense SDAR: Qwen3's network."""

    model_type = "sdar"


class SDARMoeConfig(SDARBase, Qwen3MoeConfig):
    """An SDAR with experts: Qwen3-MoE's network."""

    model_type = "sdar_moe"


def register_configurations(_: Any = None) -> None:
    """Make `AutoConfig` know the family; a hook hands over the module that has been imported."""
    for kind in (SDARConfig, SDARMoeConfig):
        AutoConfig.register(kind.model_type, kind, exist_ok=True)
