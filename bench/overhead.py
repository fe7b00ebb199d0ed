"""Where the time of the denoising loop goes on a CPU: the model's layers, its head, the rest.

And how much of it the matrix products of its forwards would take alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmax.kernels.lm_head import lm_head_top_k
from dmax.llm import LLM
from dmax.params import DecodingParams


@dataclass(slots=True)
class LoopTimes:
    """Seconds of an engine's steps, and what they were spent on.

    Attributes:
        steps: all of them.
        layers: within `base_model.forward`.
        head: within the head's product, hidden states times output embeddings.
        picking: within the rest of the head, which picks the best tokens out of the logits.
        calls: forwards of the model, prefill included.
        blocks: open blocks, counted at every step.
    """

    steps: float = 0.0
    layers: float = 0.0
    head: float = 0.0
    picking: float = 0.0
    calls: int = 0
    blocks: int = 0

    @property
    def overhead(self) -> float:
        """Share of the steps' time outside the layers and the head's product."""
        return 1 - (self.layers + self.head) / self.steps

    @property
    def picking_share(self) -> float:
        """Share of the steps' time that picked the best tokens; a part of the overhead."""
        return self.picking / self.steps


aten = torch.ops.aten
PRODUCTS = (aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm)


class Products(TorchDispatchMode):
    """Notes the matrix products that are computed; attention's own two are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call = partial(function, *args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            self.calls.append(call)
        return call()


@torch.inference_mode()
def product_seconds(
    llm: LLM, params: DecodingParams, prompts: Sequence[tuple[int, ...]]
) -> tuple[float, int]:
    """Seconds of the matrix products of all forwards of the prompts, and their number.

    Each step is taken once, while its products are noted, and then its products run again alone.
    """
    engine = llm.engine(max_length=max(map(len, prompts)) + params.max_new_tokens)
    for index, prompt in enumerate(prompts):
        engine.add(llm.request(index, prompt, params))
    total = 0.0
    num_products = 0
    while engine.is_busy():
        with Products() as products:
            engine.step()
        for call in products.calls:
            total += seconds(call)
        num_products += len(products.calls)
    return total, num_products


@torch.inference_mode()
def loop_times(llm: LLM, params: DecodingParams, prompts: Sequence[tuple[int, ...]]) -> LoopTimes:
    """Decode the prompts step by step with an engine of its own, and watch where the time goes.

    The layers are timed by hooks. The head cannot be timed within the engine. So it runs once more
    after each step over the same hidden states, first whole and then its product by itself.

    Args:
        llm: a model on a CPU whose logits are a linear head's.
        params: of a strategy that keeps one block of each sequence open and takes one candidate.
        prompts: short enough to be encoded in the forward of their first step.
    """
    engine = llm.engine(max_length=max(map(len, prompts)) + params.max_new_tokens)
    for index, prompt in enumerate(prompts):
        engine.add(llm.request(index, prompt, params))
    unfinished = len(prompts)
    times = LoopTimes()
    weight = llm.model.get_output_embeddings().weight  # [V, D]
    mask_id = llm.checkpoint.special_ids.mask_token_id
    with watched_layers(llm.model, times) as outputs:
        while engine.is_busy():
            num_open = min(unfinished, llm.options.max_batch_size)
            began = time.perf_counter()
            events = engine.step()
            times.steps += time.perf_counter() - began
            times.blocks += num_open
            unfinished -= sum(event.kind == "finished" for event in events)

            opened = outputs.pop()[-num_open:].flatten(0, 1)  # [num_open L, D]
            head = seconds(lm_head_top_k, opened, weight, 1, mask_id)
            product = seconds(F.linear, opened, weight)
            times.head += product
            times.picking += head - product
    return times


@contextmanager
def watched_layers(model: Any, times: LoopTimes) -> Iterator[list[Tensor]]:
    """Time the model's layers; gives a list of what they return, [N, L, D], open blocks last."""
    outputs: list[Tensor] = []
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(_module: nn.Module, _inputs: object, output: Any) -> None:
        times.layers += time.perf_counter() - began
        times.calls += 1
        outputs.append(output.last_hidden_state)

    hooks = (
        model.base_model.register_forward_pre_hook(before),
        model.base_model.register_forward_hook(after),
    )
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Time of one call."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began
