"""LLaDA-2.x in the layers that vLLM has for Ling 2.0, which it was made from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.bailing_moe import BailingMoeV2ForCausalLM


class LLaDA2MoeForBlockDiffusion(BailingMoeV2ForCausalLM):
    """The network; weights go by the names of the published checkpoints."""

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
