"""What a CUDA graph can hold: steps of every strategy on a device that has sizes and no numbers.

A step there shows every operation it would have on a GPU without Triton, whose kernels' twins stand
in for them, and fails where a value is asked for; what else a capture refuses is watched for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import dense_decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.decoding import get_strategy, strategies
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.engine.step import step
from dmax.models import LLaDA2MoeConfig
from dmax.params import DecodingParams, EngineOptions

DEVICE = torch.device("meta")
LENGTH = 8
VOCABULARY = 40
aten = torch.ops.aten


class Refused(Exception):
    """A graph cannot hold it."""


class Capture(TorchDispatchMode):
    """Refuses copies between host and device, arrays on the host, and indices by masks."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if function.overloadpacket in (aten._to_copy, aten.copy_) and on_host:
            raise Refused(f"{function} to or from the host")
        # A single number becomes an argument of the kernel.
        if any(tensor.dim() for tensor in on_host):
            raise Refused(f"{function} with an array on the host")
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                raise Refused(f"{function} by a mask")
        return result


def mixture_of_experts() -> Checkpoint:
    config = LLaDA2MoeConfig(
        vocab_size=VOCABULARY,
        mask_token_id=VOCABULARY - 1,
        eos_token_id=0,
        block_length=LENGTH,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=4,
    )
    with DEVICE:
        return new_checkpoint(config, experts_implementation="batched_mm")


@torch.inference_mode()
def captured_step(checkpoint: Checkpoint, params: DecodingParams) -> Tensor:
    """Flags after a step as it is captured, over two sequences with as many open blocks as may be.

    A finished block of the first sequence goes into the cache with it.
    """
    options = EngineOptions(max_batch_size=4, max_length=8 * LENGTH)
    engine = Engine(checkpoint.model, checkpoint.special_ids, options)
    engine.add(Request(0, (1,) * LENGTH, params))
    engine.add(Request(1, (1,), params))
    engine.prepare()
    ((blocks, _, sequences),) = engine.batches()
    for sequence in sequences:
        for row in blocks.rows_of(sequence.slot)[1:]:
            blocks.open(row)
            sequence.rows.append(row)
        sequence.num_branches = sequence.request.strategy.num_branches
    ((blocks, batch, _),) = engine.batches()
    on_device = batch.to(DEVICE)
    # The first step makes what later ones find in its place.
    step(engine.runner, blocks, on_device)
    with Capture():
        step(engine.runner, blocks, on_device)
        return blocks.flags[on_device.rows]


@pytest.mark.parametrize("name", strategies())
def test_a_graph_can_hold_the_step_of(name: str, needed: dict[str, dict[str, str]]) -> None:
    params = DecodingParams(strategy=name, max_new_tokens=4 * LENGTH, options=needed[name])
    flags = captured_step(mixture_of_experts(), params)
    assert flags.device == DEVICE
    assert flags.shape == (2 * get_strategy(params).blocks, 6)


def test_a_graph_can_hold_dense_decoders() -> None:
    with DEVICE:
        checkpoint = dense_decoder(vocab_size=VOCABULARY)
    params = DecodingParams(strategy="spd", max_new_tokens=32)
    assert captured_step(checkpoint, params).shape == (2, 6)


def test_what_a_graph_cannot_hold_is_refused() -> None:
    numbers = torch.empty(3, device=DEVICE)
    on_host = torch.ones(3)
    one = numbers.new_ones(())
    with Capture():
        numbers + 1.0  # a single number is no array
        for wrong, reason in (
            (lambda: on_host.to(DEVICE), "_to_copy.* to or from the host"),
            (lambda: numbers.copy_(on_host), "copy_.* to or from the host"),
            (lambda: torch.tensor([1.0, 2.0, 3.0]), "with an array on the host"),
            (lambda: numbers.index_put_((numbers > 0,), one), "by a mask"),
            (lambda: numbers[numbers > 0], "nonzero"),
            (lambda: numbers.cpu(), "Cannot copy out of meta tensor"),
            (lambda: numbers.sum().item(), "item"),
        ):
            with pytest.raises((Refused, RuntimeError), match=reason):
                wrong()
