"""What a checkpoint makes of vLLM's configuration, so that no flags are needed."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from dmax.errors import InputError, one_line
from dmax.integrations.options import check_reading, check_request, strategies_of
from dmax.integrations.options import server_params as options_of_server
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds, find_mask_token_id, resolve_special_ids

ENGINE = "vLLM"
PUBLISHED_MASK = 156_895
"""MASK of the published checkpoints, where neither files nor tokenizer name it."""
NO_FOLDER = Path("/")  # of a hub id
MAX_SEQUENCES = 64
"""Requests at once, unless somebody asks for a number; each has logits for a block."""

SMALLEST_DEFAULT = 512
"""Tokens in the largest graph that vLLM captures by itself, on the GPUs where they are fewest."""


class BlockDiffusionConfig(VerifyAndUpdateConfig):
    """Hooks that vLLM calls for models of this architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Add what the files of a checkpoint leave out."""
        hf = model_config.hf_config
        ids = _resolve_ids(model_config)
        hf.mask_token_id = ids.mask_token_id
        hf.eos_token_id = list(ids.eos_token_ids)
        hf.block_length = ids.block_length
        hf.canvas_length = ids.block_length  # `ModelConfig.is_diffusion` looks for this name
        hf.use_qk_norm = hf.use_rmsnorm = True  # what BailingMoeV2's layers ask for
        hf.embedding_dropout = 0.0
        hf.router_dtype = "fp32"

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Fit sizes to whole blocks; refuse what does not go with them.

        Raises:
            ValueError: an argument that block diffusion cannot do, in one line.
        """
        try:
            cls._fit(vllm_config)
        except InputError as error:
            raise ValueError(one_line(error)) from None

    @staticmethod
    def _fit(vllm_config: Any) -> None:
        model = vllm_config.model_config
        check_reading(model.hf_config, ENGINE)
        length = special_ids(model.hf_config).block_length
        model.max_model_len -= model.max_model_len % length
        _check(vllm_config, length)
        _set_sizes(vllm_config, length)
        _set_defaults(model)
        # A wrong option of the operator ends the start, not the first request.
        check_request(None, server_params(vllm_config), ENGINE)


def special_ids(hf_config: Any) -> SpecialIds:
    """Ids and block length of a configuration that the hooks have completed."""
    return resolve_special_ids(hf_config, None)


def _resolve_ids(model_config: Any) -> SpecialIds:
    hf = model_config.hf_config
    mask = hf.mask_token_id
    if mask is None:
        mask = find_mask_token_id(hf, _tokenizer(model_config))
    if mask is None:
        mask = PUBLISHED_MASK
    return resolve_special_ids(hf, None, mask_token_id=mask)


def _tokenizer(model_config: Any) -> Any:
    """The tokenizer of a checkpoint; None if there is none, or none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(
            model_config.tokenizer, revision=model_config.tokenizer_revision
        )
    except (OSError, ValueError):  # vLLM says what is wrong when it reads it
        return None


def _check(vllm_config: Any, length: int) -> None:
    """Raise `InputError` for arguments that do not go together with blocks of a length."""
    for is_refused, said, hint in (*_other_ways(vllm_config), *_sizes(vllm_config, length)):
        if is_refused:
            raise InputError(said, hint=hint)


def _other_ways(vllm_config: Any) -> Iterator[tuple[bool, str, str]]:
    """Ways of running a model that blocks do not go with: is it asked for, what to say, a hint."""
    parallel = vllm_config.parallel_config
    yield (
        parallel.pipeline_parallel_size > 1,
        f"`--pipeline-parallel-size` must be 1, got {parallel.pipeline_parallel_size}",
        "blocks are fed on the first device and decided on the last; use `--tensor-parallel-size`",
    )
    yield (
        max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        "context parallelism does not go with blocks",
        "use `--tensor-parallel-size`",
    )
    yield (
        parallel.use_ubatching,
        "microbatches (`--enable-dbo`, `--ubatch-size`) do not go with blocks",
        "leave them out",
    )
    yield (
        vllm_config.speculative_config is not None,
        "speculative decoding does not go with blocks, which take the place of drafts",
        "leave out `--speculative-config`",
    )
    yield (
        getattr(vllm_config.attention_config.backend, "name", None) == "FLASHINFER",
        "blocks need attention in both directions, which FlashInfer does not have here",
        "leave out `--attention-backend`",
    )


def _sizes(vllm_config: Any, length: int) -> Iterator[tuple[bool, str, str]]:
    """Sizes that hold no whole block: is it so, what to say, a hint."""
    scheduler = vllm_config.scheduler_config
    cache = vllm_config.cache_config
    canvas = getattr(vllm_config.diffusion_config, "canvas_length", None)
    yield (
        vllm_config.model_config.max_model_len < length,
        f"`--max-model-len` must hold at least a block of {length} tokens",
        "raise it",
    )
    yield (
        scheduler.max_num_batched_tokens < length,
        f"`--max-num-batched-tokens` must be at least {length}, a block, "
        f"got {scheduler.max_num_batched_tokens}",
        "leave it out",
    )
    yield (
        0 < scheduler.long_prefill_token_threshold < length,
        f"`--long-prefill-token-threshold` must be at least {length}, a block, "
        f"got {scheduler.long_prefill_token_threshold}",
        "leave it out",
    )
    yield (
        cache.user_specified_block_size
        and cache.enable_prefix_caching
        and cache.block_size % length > 0,
        f"prefixes cannot be shared with `--block-size` {cache.block_size}, which does not hold "
        f"whole blocks of {length}",
        "leave it out, or add `--no-enable-prefix-caching`",
    )
    yield (
        canvas not in (None, length, 2 * length),
        f"`canvas_length` {canvas} contradicts the block length {length} of the checkpoint",
        "leave out `--diffusion-config`",
    )


def _set_sizes(vllm_config: Any, length: int) -> None:
    """Fit sizes to blocks of a length."""
    scheduler = vllm_config.scheduler_config
    cache = vllm_config.cache_config
    # Async scheduling is settled after this hook. Without it, blocks are committed along with the
    # next ones: some forwards take two blocks of a request, and captured graphs take one.
    is_synchronous = scheduler.async_scheduling is False or current_platform.is_cpu()
    width = 2 * length if is_synchronous else length
    if is_synchronous:
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    vllm_config.diffusion_config = DiffusionConfig(canvas_length=width)
    scheduler.scheduler_cls = "dmax.integrations.vllm.scheduler.make_scheduler"
    if scheduler.max_num_seqs >= scheduler.DEFAULT_MAX_NUM_SEQS:  # what nobody chose
        scheduler.max_num_seqs = MAX_SEQUENCES
    if not is_synchronous and not vllm_config.model_config.enforce_eager:
        most = most_tokens(vllm_config.compilation_config, scheduler.max_num_seqs, length)
        scheduler.max_num_batched_tokens = min(scheduler.max_num_batched_tokens, most)
    # Prefixes may be shared only if what a page holds depends on nothing after it. 16 is what
    # kernels ask for.
    if not cache.user_specified_block_size:
        cache.block_size = math.lcm(length, 16)
        cache.user_specified_block_size = True  # or a backend would choose another
    vllm_config.attention_config.use_non_causal = True


def most_tokens(compilation: Any, max_num_seqs: int, length: int) -> int:
    """Tokens of a forward whose blocks always fit into FlashAttention 3 under full graphs.

    There it has a fixed number of rows: as many as requests, or as tokens in the largest graph.
    Here every block of a prompt is a row, and of each request one more may not be full.

    Raises:
        InputError: the operator's graphs are so small that requests may not fit.
    """
    largest = compilation.max_cudagraph_capture_size
    if largest is None:
        sizes = compilation.cudagraph_capture_sizes
        largest = max(sizes) if sizes else min(2 * max_num_seqs * length, SMALLEST_DEFAULT)
    num_rows = max(largest, max_num_seqs)
    if num_rows < 2 * max_num_seqs:
        raise InputError(
            f"the largest CUDA graph must hold at least {2 * max_num_seqs} tokens for "
            f"{max_num_seqs} requests at once, got {largest}",
            hint="leave out the sizes, lower `--max-num-seqs`, or add `--no-async-scheduling`",
        )
    return length * (num_rows - max_num_seqs)


def server_params(vllm_config: Any) -> DecodingParams:
    """How requests are decoded that ask for nothing else.

    The operator's options are those of `--additional-config`, over those of `--hf-overrides`.

    Raises:
        InputError: an option that there is not, or a value that it cannot have.
    """
    model = vllm_config.model_config
    folder = Path(model.model)
    folder = folder if folder.is_dir() else NO_FOLDER
    named, auto = strategies_of(model.hf_config, model.model, folder)
    sources = (vllm_config.additional_config, model.hf_overrides)
    given = ChainMap(*(each for each in sources if isinstance(each, dict)))
    params = options_of_server(given, named, auto)
    return replace(params, block_length=model.hf_config.block_length)


def _set_defaults(model_config: Any) -> None:
    """What requests have that do not say it: temperature 0, as in `dmax.LLM`, and nothing else.

    The `generation_config.json` of a checkpoint may name a top_p or a temperature for ordinary
    sampling, which no client has asked for. Ids that end a sequence are still read from it.
    """
    if model_config.generation_config == "auto":
        model_config.generation_config = "vllm"
    model_config.override_generation_config.setdefault("temperature", 0.0)
