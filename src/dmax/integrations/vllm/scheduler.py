"""vLLM's schedulers for canvases, with whole blocks, and with counts of forwards."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from dmax.integrations.vllm.config import special_ids


class WholeBlocks(Scheduler):
    """What both schedulers do differently for blocks."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self.block_length = special_ids(vllm_config.model_config.hf_config).block_length
        self.context = self.max_model_len
        # The end of a prompt is forwarded again with its block, which the scheduler counts from
        # the end of the prompt: past the context by at most what the prompt has in that block.
        self.max_model_len += self.num_spec_tokens
        self.need_mamba_block_aligned_split = True  # asks `_mamba_block_aligned_split`

    def add_request(self, request: Any) -> None:
        """Queue a request; it ends where the context does."""
        request.max_tokens = min(request.max_tokens, self.context - request.num_prompt_tokens)
        super().add_request(request)

    def _mamba_block_aligned_split(
        self, request: Any, num_new_tokens: int, num_local: int = 0, num_external: int = 0
    ) -> int:
        """How many tokens a request takes: prompts in whole blocks, open blocks whole or not."""
        start = request.num_computed_tokens + num_local + num_external
        end = start + num_new_tokens
        if start >= request.num_tokens:  # past its prompt
            return num_new_tokens - num_new_tokens % self.block_length
        if end >= request.num_tokens:
            return num_new_tokens
        return max(end - end % self.block_length - start, 0)


class BlockScheduler(WholeBlocks, DiffusionScheduler):
    """Plans a forward when the one before it is known."""


class AsyncBlockScheduler(WholeBlocks, DiffusionAsyncScheduler):
    """Plans a forward while the one before it runs."""


def make_scheduler(*args: Any, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The one of the two that fits the configuration."""
    is_async = vllm_config.scheduler_config.async_scheduling
    kind = AsyncBlockScheduler if is_async else BlockScheduler
    return kind(*args, vllm_config=vllm_config, **kwargs)
