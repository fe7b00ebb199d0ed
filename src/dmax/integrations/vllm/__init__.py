"""DMax's strategies inside vLLM: LLaDA-2.x checkpoints decode there without flags."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.dmax")

ARCHITECTURE = "LLaDA2MoeModelLM"


def register() -> None:
    """Entry point of vLLM's plugins; called in every process of it, maybe more than once."""
    try:
        _register()
    except Exception as error:  # any at all would end vLLM, for other models too
        logger.warning("dmax cannot serve LLaDA-2.x in this vLLM: %s", error)


def _register() -> None:
    from dmax.integrations.vllm.versions import complaint

    if said := complaint():
        logger.warning(said)
        return

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import dmax.models.auto  # noqa: F401  # transformers' Auto classes learn the family
    from dmax.integrations.vllm import metrics, requests
    from dmax.integrations.vllm.config import BlockDiffusionConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        path = "dmax.integrations.vllm.model:LLaDA2MoeForBlockDiffusion"
        ModelRegistry.register_model(ARCHITECTURE, path)
    MODELS_CONFIG_MAP[ARCHITECTURE] = BlockDiffusionConfig
    requests.install()
    metrics.install()
