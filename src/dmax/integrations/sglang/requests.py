"""What a client of SGLang may ask of DMax, and where its answer stands in the meantime.

Nothing of SGLang is imported: its requests and sampling parameters are read by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from dmax.decoding import get_strategy
from dmax.decoding.strategy import Strategy
from dmax.errors import InputError
from dmax.integrations.options import check_runs_here, request_params
from dmax.integrations.sglang.checkpoint import ARCHITECTURE, ENGINE, NAME
from dmax.outputs import Cost
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

COSTS = ("num_forwards", "num_prefill_forwards", "num_commit_forwards")
"""Fields of `Cost` that a response tells, each as `dmax_` and its name in `meta_info`."""

# What decoding by blocks has no place for: the names of attributes, and the values that mean
# nothing is asked. The first table is of `sampling_params`, the last one of the request.
PENALTIES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "min_new_tokens": (0,),
    "logit_bias": (None, {}),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "beam_width": (None, 1),
    "watermark": (None,),
}
TRUNCATIONS: dict[str, tuple[Any, ...]] = {"top_p": (1.0,), "top_k": (1 << 30, -1), "min_p": (0.0,)}
"""Only of requests that are sampled: without a temperature they change nothing."""
EXTRAS: dict[str, tuple[Any, ...]] = {
    "return_logprob": (False, None),
    "return_hidden_states": (False, None),
    "custom_logit_processor": (None,),
    "input_embeds": (None,),
}


@dataclass(slots=True)
class Asked:
    """What a request asks for, and what it has cost so far.

    Attributes:
        params: how it is decoded.
        strategy: what `params` names.
        slot: its place among the open blocks; None: it has none yet.
        cost: forwards so far.
    """

    params: DecodingParams
    strategy: Strategy
    slot: int | None = None
    cost: Cost = field(default_factory=Cost)


def read_request(request: Any, server: DecodingParams, special_ids: SpecialIds) -> Asked:
    """What a request asks for, over the settings of its server.

    Args:
        request: a `Req` of SGLang.
        server: how the server decodes.
        special_ids: of the checkpoint.

    Raises:
        InputError: something that DMax or SGLang's blocks cannot do.
    """
    sampling = request.sampling_params
    is_greedy = sampling.top_k == 1 or sampling.temperature == 0  # SGLang's way to write it
    unknown = [*_given(sampling, PENALTIES), *_given(request, EXTRAS)]
    if not is_greedy:
        unknown += _given(sampling, TRUNCATIONS)
    if unknown:
        raise InputError(
            f"a block is decoded as a whole, which has no place for {' and '.join(unknown)}",
            hint=f"leave {'it' if len(unknown) == 1 else 'them'} out",
        )
    if special_ids.mask_token_id in request.origin_input_ids:
        raise InputError(f"the prompt holds the mask token {special_ids.mask_token_id}")
    params = request_params(sampling.custom_params, server)
    strategy = _strategy(params)
    if not is_greedy:
        seed = sampling.sampling_seed
        seed = _own_seed(request.rid) if seed is None else seed
        params = replace(params, temperature=sampling.temperature, seed=seed)
    return Asked(params, strategy)


def report(request: Any, cost: Cost, num_tokens: int) -> None:
    """Say in `meta_info` what a request has cost when its next tokens come.

    SGLang has a list there with an entry for each token; the last one counts.
    """
    told = request.customized_info or {}
    for name in COSTS:
        so_far = told.setdefault(f"dmax_{name}", [])
        so_far.extend([getattr(cost, name)] * num_tokens)
    request.customized_info = told


def greedy_by_default(defaults: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """A hook: chats that name no temperature are greedy, as with `dmax.LLM`.

    Args:
        defaults: what the checkpoint's generation_config.json names.
        model_config: SGLang's `ModelConfig`.
    """
    from sglang.srt.runtime_context import get_exec

    if ARCHITECTURE not in (model_config.hf_config.architectures or ()):
        return defaults
    is_ours = get_exec().dllm.dllm_algorithm == NAME
    if not is_ours or model_config.sampling_defaults != "model":
        return defaults
    return {"temperature": 0.0, **defaults}


def _given(holder: Any, neutral: dict[str, tuple[Any, ...]]) -> Iterator[str]:
    """The attributes that ask for something."""
    for name, values in neutral.items():
        if getattr(holder, name, None) not in (None, *values):
            yield f"`{name}`"


@lru_cache
def _strategy(params: DecodingParams) -> Strategy:
    """The strategy of a request; one with a trained head reads it only once."""
    strategy = get_strategy(params)
    check_runs_here(strategy, ENGINE)
    return strategy


def _own_seed(request_id: str) -> int:
    """A seed that differs from request to request, but not between the ranks of a server."""
    digest = blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
