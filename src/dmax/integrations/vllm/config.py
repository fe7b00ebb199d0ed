"""What a checkpoint makes of vLLM's configuration, so that no flags are needed."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import Any

from vllm.config.diffusion import DiffusionConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dmax.checkpoint import named_decoding
from dmax.decoding import FALLBACK
from dmax.integrations.options import check_request
from dmax.integrations.options import server_params as options_of_server
from dmax.params import DecodingParams
from dmax.special_ids import FAMILY_BLOCK_LENGTH, SpecialIds

ENGINE = "vLLM"
MASK_TOKEN_ID = 156_895  # of published checkpoints, which do not name it
NO_FOLDER = Path("/")  # of a hub id


class BlockDiffusionConfig(VerifyAndUpdateConfig):
    """Hooks that vLLM calls for models of this architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Add what the files of a checkpoint leave out."""
        hf = model_config.hf_config
        hf.block_length = hf.block_length or FAMILY_BLOCK_LENGTH["llada2_moe"]
        hf.canvas_length = 2 * hf.block_length  # `ModelConfig.is_diffusion` looks for this name
        if hf.mask_token_id is None:
            hf.mask_token_id = MASK_TOKEN_ID
        hf.use_qk_norm = hf.use_rmsnorm = True  # what BailingMoeV2's layers ask for
        hf.embedding_dropout = 0.0
        hf.router_dtype = "fp32"

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Fit sizes to whole blocks."""
        length = vllm_config.model_config.hf_config.block_length
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=2 * length)
        model = vllm_config.model_config
        model.max_model_len -= model.max_model_len % length
        vllm_config.cache_config.block_size = length
        scheduler = vllm_config.scheduler_config
        scheduler.max_num_batched_tokens -= scheduler.max_num_batched_tokens % length
        # Async scheduling is settled later than this hook; the function asks when it is called.
        scheduler.scheduler_cls = "dmax.integrations.vllm.scheduler.make_scheduler"
        vllm_config.attention_config.use_non_causal = True
        _set_defaults(model)
        # A wrong option of the operator ends the start, not the first request.
        check_request(None, server_params(vllm_config), ENGINE)


def special_ids(hf_config: Any) -> SpecialIds:
    """Ids and block length of a configuration that the hooks have completed."""
    eos = hf_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return SpecialIds(hf_config.mask_token_id, ends, ends[0], hf_config.block_length)


def server_params(vllm_config: Any) -> DecodingParams:
    """How requests are decoded that ask for nothing else.

    The operator's options are those of `--additional-config`, over those of `--hf-overrides`.

    Raises:
        InputError: an option that there is not, or a value that it cannot have.
    """
    model = vllm_config.model_config
    folder = Path(model.model)
    named = getattr(model.hf_config, "decoding_strategy", None)
    auto = named_decoding(model.hf_config, model.model, folder if folder.is_dir() else NO_FOLDER)
    sources = (vllm_config.additional_config, model.hf_overrides)
    given = ChainMap(*(each for each in sources if isinstance(each, dict)))
    return options_of_server(given, named, auto or FALLBACK)


def _set_defaults(model_config: Any) -> None:
    """What requests have that do not say it: temperature 0, as in `dmax.LLM`, and nothing else.

    The `generation_config.json` of a checkpoint may name a top_p or a temperature for ordinary
    sampling, which no client has asked for. Ids that end a sequence are still read from it.
    """
    if model_config.generation_config == "auto":
        model_config.generation_config = "vllm"
    model_config.override_generation_config.setdefault("temperature", 0.0)
