"""Our models among transformers' Auto classes; importing this module registers them."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import configuration_auto

from dmax.kernels import moe
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig, register_configuration
from dmax.models.llada2_moe.conversion import CONVERSIONS
from dmax.models.llada2_moe.modeling import LLaDA2MoeModel, LLaDA2MoeModelLM
from dmax.models.sdar.configuration import SDARConfig, SDARMoeConfig, register_configurations
from dmax.models.sdar.modeling import SDARForCausalLM, SDARMoeForCausalLM

NATIVE = (LLaDA2MoeModelLM,)  # all other architectures go through `models.backbone`


def register() -> None:
    """Make `Auto*.from_pretrained` return our classes; calling it again changes nothing."""
    moe.register()
    register_configuration(configuration_auto)
    register_configurations()
    AutoModel.register(LLaDA2MoeConfig, LLaDA2MoeModel, exist_ok=True)
    AutoModelForCausalLM.register(LLaDA2MoeConfig, LLaDA2MoeModelLM, exist_ok=True)
    register_checkpoint_conversion_mapping(LLaDA2MoeConfig.model_type, CONVERSIONS, overwrite=True)
    AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(SDARMoeConfig, SDARMoeForCausalLM, exist_ok=True)
    stacked = get_checkpoint_conversion_mapping("qwen3_moe")  # files hold one expert after another
    register_checkpoint_conversion_mapping(SDARMoeConfig.model_type, stacked, overwrite=True)


register()
