"""What vLLM's runner asks of a model about its requests: inputs, attention, and a sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState

from dmax.integrations.vllm.config import server_params, special_ids
from dmax.integrations.vllm.progress import Progress, block_rows, on_device
from dmax.integrations.vllm.sampler import BlockSampler


class BlockDiffusionState(ModelState):
    """Requests of a block-diffusion model in vLLM's runner. N tokens of a forward, D hidden size.

    Prompts are read as by any model, but each block of a prompt sees itself whole.

    Attributes:
        progress: the requests past their prompts.
        embeds: [most tokens, D], inputs of every forward, so that captured graphs find them.
    """

    num_new_sampled_tokens_per_step = 0  # beside the "draft" tokens, which are the blocks

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        ids = special_ids(self.model_config.hf_config)
        self.progress = Progress(ids, self.max_num_reqs, model.embed_input_ids, device)
        shape = (self.max_num_tokens, self.inputs_embeds_size)
        self.embeds = torch.zeros(shape, dtype=self.dtype, device=device)
        self._slot_of: dict[str, int] = {}

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        """Text out."""
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[BlockSampler, None]:
        """What decides about open blocks, in place of vLLM's sampler."""
        return BlockSampler(sampler, self.progress, server_params(self.vllm_config)), None

    # --- who is here ---

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request, new or preempted before, has a slot now."""
        self._slot_of[new_req_data.req_id] = req_index
        self.progress.add(req_index, new_req_data.prefill_token_ids)

    def remove_request(self, req_id: str) -> None:
        """A request is finished or preempted; vLLM also asks for unknown ones."""
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self.progress.remove(slot)

    # --- inputs of a forward ---

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any
    ) -> None:
        """Nothing comes from an encoder."""
        return

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Tensor]:
        """Embeddings of the tokens of the next forward, [N, D]."""
        num_tokens = input_batch.num_tokens
        embeds = self.embeds[: input_batch.num_tokens_after_padding]
        embeds[:num_tokens] = self.progress.embed(input_batch.input_ids[:num_tokens])
        for group in self.progress.decoding(input_batch):
            group.write_inputs(embeds)
        return {"inputs_embeds": embeds}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Tensor]:
        """What a graph is captured with."""
        return {"inputs_embeds": self.embeds[:num_tokens]}

    # --- attention: every block is a row of its own, which sees all up to its own end ---

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention metadata by layer.

        Keys and values of all tokens are written before any row reads. So one forward does any
        number of blocks of a request, without a mask.
        """
        length = self.progress.block_length
        num_rows = input_batch.num_reqs_after_padding
        num_tokens = input_batch.num_tokens_after_padding
        starts_np = input_batch.query_start_loc_np
        starts = input_batch.query_start_loc
        seq_lens = input_batch.seq_lens
        if cudagraph_mode != CUDAGraphMode.FULL:  # there every request has one block already
            num_tokens = input_batch.num_tokens
            bounds = starts_np[: input_batch.num_reqs + 1]
            starts_np, owners_np, behind = block_rows(bounds, length)
            num_rows = len(owners_np)
            starts = on_device(starts_np, self.device)
            owners = on_device(owners_np, self.device)
            seq_lens = seq_lens[owners] - on_device(behind, self.device)
            block_tables = tuple(table[owners] for table in block_tables)
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_rows,
            num_tokens=num_tokens,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=torch.from_numpy(starts_np),
            max_query_len=length,
            seq_lens=seq_lens,
            max_seq_len=self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            causal=False,
        )
