"""What stands in for vLLM's sampler: it hands logits to the strategies, and their blocks to vLLM.

vLLM counts computed tokens twice. Its scheduler counts what a request has been given: prompt and
emitted tokens. The worker counts what stands in the cache for good: whole blocks, without the last
final one as long as it is not committed, and without the prompt's end, which is forwarded again
with the open block. `num_sampled` moves the scheduler's count, `num_rejected` the worker's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from dmax.decoding import get_strategy
from dmax.integrations.vllm.progress import Progress, on_device
from dmax.integrations.vllm.requests import decoding_params
from dmax.params import DecodingParams


class BlockSampler:
    """Decides about open blocks.

    Args:
        sampler: vLLM's own, for what it keeps of requests.
        progress: the requests.
        server: how requests are decoded that ask for nothing else.
    """

    penalties_state = SimpleNamespace(output_bin_counts=None)  # read by the runner

    def __init__(self, sampler: Any, progress: Progress, server: DecodingParams) -> None:
        self.sampling_states = sampler.sampling_states
        self.progress = progress
        self.server = server

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """A request has a slot; `Progress.add` was called before."""
        self.sampling_states.add_request(req_idx, sampling_params)
        # vLLM draws missing seeds from a source that is alike in all tensor-parallel processes.
        seed = int(self.sampling_states.seeds.np[req_idx])
        params = decoding_params(sampling_params, self.server, seed)
        self.progress.admit(req_idx, get_strategy(params), params, sampling_params.logprobs)

    def apply_staged_writes(self) -> None:
        """Send what was kept of new requests to the device."""
        self.sampling_states.apply_staged_writes()

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Any = None) -> SamplerOutput:
        """Decide, and say what leaves and what was computed for good.

        Args:
            logits: [logits of decoding requests, V].
            input_batch: the forward.
            draft_logits: there is no draft model.
        """
        progress = self.progress
        num_reqs = input_batch.num_reqs
        with progress.device:
            sampled = torch.zeros(num_reqs, progress.block_length, dtype=torch.int32)
            num_sampled = torch.zeros(num_reqs, dtype=torch.int32)
            num_rejected = torch.zeros(num_reqs, dtype=torch.int32)
            num_nans = torch.zeros(num_reqs, dtype=torch.int32)
            order = torch.zeros(num_reqs, progress.block_length, dtype=torch.long)
        self._open_first(input_batch, num_rejected)
        for group in progress.decoding(input_batch):
            at = on_device(group.at, progress.device)
            emitted = group.advance(logits)
            sampled[at] = emitted.tokens.int()
            num_sampled[at] = emitted.num_tokens.int()
            num_rejected[at] = emitted.num_repeated.int()
            num_nans[at] = emitted.is_broken.int()
            order[at] = emitted.order
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=self._logprobs(input_batch, order),
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _logprobs(self, input_batch: Any, order: Tensor) -> LogprobsTensors | None:
        """Log-probabilities of the blocks in slots, for the requests that ask for them.

        Whether a block leaves is known on the device only, so every request has a whole block here;
        vLLM takes as much of it as has left.
        """
        slots = input_batch.idx_mapping_np[: input_batch.num_reqs]
        num_top = self.progress.logprobs.most(slots.tolist())
        if num_top is None:
            return None
        rows = on_device(slots.astype(np.int64), self.progress.device)
        ids, values, ranks = self.progress.logprobs.of(rows, order, num_top)
        return LogprobsTensors(
            logprob_token_ids=ids.flatten(0, 1).int(),
            logprobs=values.flatten(0, 1),
            selected_token_ranks=ranks.flatten(),
            cu_num_generated_tokens=[at * order.shape[1] for at in range(len(slots) + 1)],
        )

    def _open_first(self, input_batch: Any, num_rejected: Tensor) -> None:
        """Open a block for every request whose prompt has just been read to its end."""
        num_read = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        is_read = num_read >= input_batch.prefill_len_np
        is_prompt = np.diff(input_batch.cu_num_logits_np[: input_batch.num_reqs + 1]) == 0
        for row in np.flatnonzero(is_read & is_prompt).tolist():
            slot = int(input_batch.idx_mapping_np[row])
            if slot in self.progress.slots:  # else it is a run without requests, to measure memory
                num_rejected[row] = self.progress.open_first(slot)
