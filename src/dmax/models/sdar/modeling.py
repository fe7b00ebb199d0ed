"""SDAR's networks: Qwen3's, under the names that its checkpoints have."""

from __future__ import annotations

from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from dmax.models.sdar.configuration import SDARConfig, SDARMoeConfig


class SDARForCausalLM(Qwen3ForCausalLM):
    """A dense SDAR, before `dmax.models.backbone.as_block_diffusion` frees its attention."""

    config_class = SDARConfig
    config: SDARConfig


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    """An SDAR with experts."""

    config_class = SDARMoeConfig
    config: SDARMoeConfig
