"""The inputs of a forward inside SGLang, eager and under CUDA graphs.

SGLang's graphs read token ids. An algorithm may have a static function compute other inputs inside
the graph, from the ids and a buffer that is copied in before each replay. SGLang uses it only for
algorithms that encode their context separately, which would be wrong for LLaDA-2.x;
`open_runner` lifts that. The values are tested, the capture has never been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def static_inputs(embeds: Tensor, state: Tensor) -> Tensor:
    """What the model reads under a graph.

    Args:
        embeds: [N, D], embeddings of the token ids.
        state: [N, D], what open blocks read; zeros where the ids are all there is to read.

    Returns:
        [N, D] in the dtype of `embeds`.
    """
    is_given = (state != 0).any(dim=-1, keepdim=True)
    return torch.where(is_given, state.to(embeds.dtype), embeds)


def static_state(embeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """The buffer of `static_inputs`: `embeds` [P, D] at `positions` [P], zeros elsewhere [N, D]."""
    state = embeds.new_zeros(num_tokens, embeds.shape[-1])
    state[positions] = embeds
    return state


def give(model_runner: Any, forward_batch: Any, embeds: Tensor, positions: Tensor) -> None:
    """Have the next forward read `embeds` at `positions`, and token ids elsewhere.

    SGLang's other way, `input_embeds`, goes through bfloat16; this one keeps the model's dtype.

    Args:
        model_runner: SGLang's `ModelRunner`.
        forward_batch: SGLang's `ForwardBatch`.
        embeds: [P, D].
        positions: [P] int64, among the N tokens of the forward.
    """
    forward_batch.replace_embeds = None
    forward_batch.replace_positions = None
    if _replays(model_runner, forward_batch):
        num_tokens = len(forward_batch.input_ids)
        forward_batch.dllm_input_preparation_state = static_state(embeds, positions, num_tokens)
    elif len(positions):
        forward_batch.replace_embeds = embeds
        forward_batch.replace_positions = positions


def _replays(model_runner: Any, forward_batch: Any) -> bool:
    """Whether the next forward replays a graph that reads the buffer; ask before it is given."""
    runner = model_runner.decode_cuda_graph_runner
    if getattr(runner, "dllm_input_preparation", None) is None:
        return False
    return bool(forward_batch.forward_mode.is_cuda_graph() and runner.can_run_graph(forward_batch))


class _UsesInputEmbeds:
    """Whether graphs read prepared inputs: if SGLang says so, or if there is a function for it.

    Stands on the class of the graph runner in place of a plain attribute.
    """

    def __set__(self, runner: Any, value: bool) -> None:
        vars(runner)["dllm_uses_input_embeds"] = value

    def __get__(self, runner: Any, owner: type | None = None) -> Any:
        if runner is None:
            return self
        is_set = vars(runner).get("dllm_uses_input_embeds", False)
        return is_set or runner.dllm_input_preparation is not None


def open_runner(module: Any) -> None:
    """Let graphs of all diffusion algorithms read prepared inputs, once SGLang's module is there.

    Args:
        module: `sglang.srt.model_executor.runner.decode_cuda_graph_runner`.
    """
    module.DecodeCudaGraphRunner.dllm_uses_input_embeds = _UsesInputEmbeds()
