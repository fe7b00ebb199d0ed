"""LLaDA-2.x in the layers that vLLM has for Ling 2.0, which it was made from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.bailing_moe import BailingMoE, BailingMoeV2ForCausalLM


class LLaDA2MoeForBlockDiffusion(BailingMoeV2ForCausalLM):
    """The network; weights go by the names of the published checkpoints."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if type(module) is BailingMoE:  # vLLM's layers name their class, and take no other
                module.__class__ = Float32RoutedMoE

    @staticmethod
    def get_model_state_cls() -> type:
        """What vLLM's runner prepares inputs and attention with, and samples by."""
        from dmax.integrations.vllm.state import BlockDiffusionState

        return BlockDiffusionState

    def compute_logits(self, hidden_states: Tensor) -> Any:
        """Logits [N, V] of hidden states [N, D].

        While prompts are read N is 0, and vLLM's gather over CPU ranks divides by it.
        """
        if not len(hidden_states):
            return hidden_states.new_empty(0, self.config.vocab_size)
        return super().compute_logits(hidden_states)


class Float32RoutedMoE(BailingMoE):
    """Experts that are chosen in float32, as in the published code; vLLM rounds the logits."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Outputs [N, D] of hidden states [N, D]."""
        router_logits, _ = self.gate(hidden_states)  # float32 by `router_dtype` of the config
        return self.experts(hidden_states=hidden_states, router_logits=router_logits)
