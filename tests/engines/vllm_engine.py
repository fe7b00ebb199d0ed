"""vLLM in this process, with what `dmax.LLM` says and what vLLM says side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import reference
from reference import BLOCK, Wanted
from vllm import LLM, RequestOutput, SamplingParams

EOS = 976
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * 2**20,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 4,
    "disable_log_stats": True,
}
"""Options of an engine for tests: nothing that a checkpoint of dmax would need."""


@dataclass(frozen=True, slots=True)
class Done:
    """What vLLM made of a request.

    Attributes:
        token_ids: the completion without its EOS, as `dmax.LLM` gives it.
        num_cached: tokens of the prompt whose keys and values were there already.
        cost: forwards by kind.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    num_cached: int
    cost: dict[str, int]

    @classmethod
    def of(cls, output: RequestOutput) -> Done:
        (completion,) = output.outputs
        ids = tuple(completion.token_ids)
        is_ended = completion.finish_reason == "stop" and ids[-1:] == (EOS,)
        return cls(
            token_ids=ids[:-1] if is_ended else ids,
            text=completion.text,
            finish_reason=str(completion.finish_reason),
            num_cached=output.num_cached_tokens or 0,
            cost=completion.spec_decode_metrics.to_dict(),
        )


def start(model: str = reference.MODEL, **options: Any) -> LLM:
    """An engine over a bundled model."""
    return LLM(reference.model_path(model), **{**SMALL, **options})


def sampling_params(wanted: Wanted, **changes: Any) -> SamplingParams:
    """How a client of vLLM asks for what `dmax.LLM` was asked for."""
    params = wanted.params
    shared = ("strategy", "threshold", "stop_confidence", "top_k")
    options = {name: getattr(params, name) for name in shared} | dict(params.options)
    given = {f"dmax_{name}": value for name, value in options.items() if value is not None}
    asked = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "ignore_eos": params.ignore_eos,
        "extra_args": given,
    }
    return SamplingParams(**{**asked, **changes})


def complete(llm: LLM, wanted: Sequence[Wanted], **changes: Any) -> list[Done]:
    """Give an engine all requests at once."""
    prompts = [{"prompt_token_ids": list(each.prompt)} for each in wanted]
    asked = [sampling_params(each, **changes) for each in wanted]
    return [Done.of(output) for output in llm.generate(prompts, asked, use_tqdm=False)]


def differences(wanted: Sequence[Wanted], done: Sequence[Done]) -> list[str]:
    """Where token ids, denoising forwards or the reason to stop are not those of `dmax.LLM`."""
    found: list[str] = []
    for index, (ours, theirs) in enumerate(zip(wanted, done, strict=True)):
        words = f"request {index} ({len(ours.prompt)} tokens, {ours.params.strategy})"
        if theirs.token_ids != ours.token_ids:
            found.append(f"{words}: {ours.token_ids} became {theirs.token_ids}")
        elif theirs.cost["num_forwards"] != ours.num_forwards:
            found.append(f"{words}: {ours.num_forwards} forwards became {theirs.cost}")
        elif theirs.finish_reason != ours.finish_reason:
            found.append(f"{words}: {ours.finish_reason} became {theirs.finish_reason}")
    return found


def num_blocks(wanted: Wanted) -> int:
    """Blocks that a request decodes: those that its completion and its EOS lie in."""
    end = len(wanted.prompt) + len(wanted.token_ids) + (wanted.finish_reason == "stop")
    return -(-end // BLOCK) - len(wanted.prompt) // BLOCK
