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
from dmax.decoding.block import Window
from dmax.engine.lane import Lane
from dmax.engine.rows import Row, Rows, Shape
from dmax.engine.runner import ModelRunner
from dmax.models import LLaDA2MoeConfig
from dmax.params import DecodingParams

DEVICE = torch.device("meta")
LENGTH, VOCABULARY = 8, 40
aten = torch.ops.aten


class Refused(Exception):
    """A graph cannot hold it."""


class Capture(TorchDispatchMode):
    """Refuses copies between host and device, arrays on the host, and indices whose number depends on values."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if function.overloadpacket in (aten._to_copy, aten.copy_) and on_host:
            raise Refused(f"{function} to or from the host")
        if any(
            tensor.dim() for tensor in on_host
        ):  # a single number becomes an argument of the kernel
            raise Refused(f"{function} with an array on the host")
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                raise Refused(f"{function} by a mask")
        return result


def mixture_of_experts() -> Checkpoint:
    config = LLaDA2MoeConfig(
        vocab_size=VOCABULARY, mask_token_id=VOCABULARY - 1, eos_token_id=0, block_length=LENGTH, hidden_size=4,
        intermediate_size=8, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=4,
    )  # fmt: skip
    with DEVICE:
        return new_checkpoint(config, experts_implementation="batched_mm")


def step(checkpoint: Checkpoint, params: DecodingParams, num_sequences: int = 2) -> Tensor:
    """A step as it is captured: a finished block of the first sequence, and as many open blocks as there can be."""
    runner = ModelRunner(checkpoint.model, LENGTH, 4, 8 * LENGTH, checkpoint.mask_token_id)
    lane = Lane(params, 4, LENGTH, DEVICE, (0,))
    versions, opened = lane.num_branches, []
    for slot in range(num_sequences):
        base, first = (LENGTH if slot == 0 else 0), slot * lane.width
        for place in range(lane.width):
            start = base + place * LENGTH
            lane.open(first + place, (), checkpoint.mask_token_id, runner.embed)
            opened.append(
                Row(slot, start, base, first + place)
                if versions > 1
                else Row(slot, start, start, first + place, first + place - 1 if place else -1)
            )
    rows = [Row(0, 0, 0), *opened]
    shape = Shape.of(rows, len(opened), LENGTH, versions)
    on_device = Rows.of(rows, [range(LENGTH)], LENGTH).to(DEVICE)
    lane.denoise(runner, shape, on_device)  # the first one makes what later ones find in its place
    with Capture():
        return lane.denoise(runner, shape, on_device)


@pytest.mark.parametrize("name", strategies())
def test_a_graph_can_hold_the_step_of(name: str, needed: dict[str, dict[str, str]]) -> None:
    params = DecodingParams(strategy=name, options=needed[name])
    flags, window = (
        step(mixture_of_experts(), params),
        getattr(get_strategy(params), "window", Window()),
    )
    assert flags.device == DEVICE and flags.shape == (6, 2 * window.size)


def test_a_graph_can_hold_dense_decoders() -> None:
    with DEVICE:
        checkpoint = dense_decoder(vocab_size=VOCABULARY)
    assert step(checkpoint, DecodingParams(strategy="spd")).shape == (6, 2)


def test_what_a_graph_cannot_hold_is_refused() -> None:
    numbers, on_host = torch.empty(3, device=DEVICE), torch.ones(3)
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
