"""Model architectures, registered with transformers' Auto classes: no remote code is needed."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from dmax.kernels import moe
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig
from dmax.models.llada2_moe.conversion import CONVERSIONS
from dmax.models.llada2_moe.modeling import LLaDA2MoeModel, LLaDA2MoeModelLM

NATIVE = (LLaDA2MoeModelLM,)  # all other architectures go through `models.backbone`


def register() -> None:
    """Make `Auto*.from_pretrained` return our classes; calling it again changes nothing."""
    moe.register()
    AutoConfig.register(LLaDA2MoeConfig.model_type, LLaDA2MoeConfig, exist_ok=True)
    # Merged training checkpoints name another type; the model and all that it saves have our own.
    CONFIG_MAPPING.register("llada2_moe_veomni", LLaDA2MoeConfig, exist_ok=True)
    AutoModel.register(LLaDA2MoeConfig, LLaDA2MoeModel, exist_ok=True)
    AutoModelForCausalLM.register(LLaDA2MoeConfig, LLaDA2MoeModelLM, exist_ok=True)
    register_checkpoint_conversion_mapping(LLaDA2MoeConfig.model_type, CONVERSIONS, overwrite=True)


__all__ = [
    "NATIVE",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModel",
    "LLaDA2MoeModelLM",
    "register",
]
