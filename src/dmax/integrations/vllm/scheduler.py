"""vLLM's schedulers for canvases, with whole blocks and counts of forwards.

To vLLM the open block of a request is "draft tokens". It plans them for the next forward, and when
a block has converged it takes its tokens as accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.request import RequestStatus

from dmax.integrations.vllm.config import special_ids
from dmax.integrations.vllm.forwards import Forwards
from dmax.integrations.vllm.metrics import snapshot

logger = init_logger("vllm.dmax")


class WholeBlocks(Scheduler):
    """What both schedulers do differently for blocks."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self.block_length = special_ids(vllm_config.model_config.hf_config).block_length
        self.context = self.max_model_len - self.max_model_len % self.block_length
        # `--max-model-len auto` is settled after the hooks of the configuration, and from here the
        # process that answers learns what a prompt may have.
        vllm_config.model_config.max_model_len = self.context
        # vLLM counts an open block from the last emitted token on, and several if it plans ahead.
        # Such a count may pass the context although no block does, and must not be cut there.
        self.max_model_len += 4 * self.block_length
        self.need_mamba_block_aligned_split = True  # asks `_mamba_block_aligned_split`
        self._forwards: dict[str, Forwards] = {}
        self._broken: set[str] = set()
        self._idle: set[str] = set()  # requests that this forward only commits

    # --- who is here ---

    def add_request(self, request: Any) -> None:
        """Queue a request; it ends where the context does."""
        request.max_tokens = min(request.max_tokens, self.context - request.num_prompt_tokens)
        self._forwards.setdefault(request.request_id, Forwards(self.block_length))
        super().add_request(request)
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.num_spec_tokens)

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        """Forget a request."""
        self._broken.discard(request.request_id)
        self._forwards.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)

    # --- what is planned ---

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

    # --- what came out ---

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take what was emitted; count forwards, and end requests that cannot go on."""
        self._idle = set()
        nans: Mapping[str, int] = model_runner_output.num_nans_in_logits or {}
        running = {}
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            forwards = self._forwards[req_id]
            running[req_id] = request, forwards
            width = len(scheduler_output.scheduled_spec_decode_tokens.get(req_id, ()))
            index = model_runner_output.req_id_to_index[req_id]
            has_emitted = bool(model_runner_output.sampled_token_ids[index])
            if not forwards.count(width, has_emitted):
                self._idle.add(req_id)
            if nans.get(req_id):
                self._broken.add(req_id)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for output in (each for client in outputs.values() for each in client.outputs):
            if output.request_id in running:
                request, forwards = running[output.request_id]
                output.spec_decode_metrics = snapshot(request, output, forwards.cost)
        return outputs

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Append emitted tokens; whether the request has ended."""
        if request.request_id not in self._broken:
            return super()._update_request_with_output(request, new_token_ids, is_stale)
        logger.error(
            "request %s ends: the model gave NaN logits for it, or its strategy failed; check the "
            "checkpoint, or serve it with --dtype float32",
            request.request_id,
        )
        request.status = RequestStatus.FINISHED_ERROR
        request.resumable = False
        return [], True

    def make_spec_decoding_stats(self, stats: Any, **counts: Any) -> Any:
        """Count for metrics of vLLM: a denoising step is a forward over an open block."""
        if counts["request_id"] in self._idle:
            return stats
        width = min(counts["num_draft_tokens"], self.block_length)
        return super().make_spec_decoding_stats(stats, **{**counts, "num_draft_tokens": width})


class BlockScheduler(WholeBlocks, DiffusionScheduler):
    """Plans a forward when the one before it is known, so that commits cost no forward."""

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Plan the next forward: the open block, after the last one if that is to be committed."""
        widths = [
            self._forwards[req_id].next_width if req_id in self._forwards else 0
            for req_id in draft_token_ids.req_ids
        ]
        for ids, width in zip(draft_token_ids.draft_token_ids, widths, strict=True):
            del ids[width:]
        super().update_draft_token_ids(draft_token_ids)


class AsyncBlockScheduler(WholeBlocks, DiffusionAsyncScheduler):
    """Plans a forward while the one before it runs, so that commits take forwards of their own."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self.num_spec_tokens = self.block_length

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """As in vLLM, but for pages of the cache.

        vLLM shares them from here on. The clean keys and values of the block are still to be
        written; pages are shared when the forward that writes them is planned.
        """
        if request.request_id in self._broken:
            return super()._update_request_with_output(request, new_token_ids, is_stale)
        new_token_ids, stopped = Scheduler._update_request_with_output(self, request, new_token_ids)
        if not is_stale:
            request.num_output_placeholders -= len(new_token_ids)
        return new_token_ids, stopped


def make_scheduler(*args: Any, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The one of the two that fits the configuration."""
    is_async = vllm_config.scheduler_config.async_scheduling
    kind = AsyncBlockScheduler if is_async else BlockScheduler
    return kind(*args, vllm_config=vllm_config, **kwargs)
