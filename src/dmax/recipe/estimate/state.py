"""Bytes of weights, gradients and optimiser states on each GPU: exact, from shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from dmax.training.config import DMaxConfig

PLAIN = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""PyTorch's own optimisers, whose states have the shape of their weight. Of others nothing is said:
some pack their states, and some share them among weights."""


@dataclass(frozen=True, slots=True)
class Weight:
    """What one GPU holds of a parameter.

    Attributes:
        shape: of its share.
        dtype: of the weights, their gradients and their optimiser states.
        learns: whether it has gradient and states.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    learns: bool

    @property
    def num_bytes(self) -> int:
        """Of the weights alone."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What stays in a GPU from step to step.

    Attributes:
        weights: by dtype, buffers included, which every GPU has whole.
        gradients: of the weights that learn.
        optimizer: its states after a step; None of an optimiser that is not PyTorch's.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int | None


def held_weights(model: nn.Module, num_shards: int, master: torch.dtype | None) -> list[Weight]:
    """What the GPU that holds the most has of every parameter.

    FSDP2 cuts a parameter along its first dimension, as `torch.chunk` does. The first GPU gets a
    chunk of full size, and the others take as much memory: theirs are padded to it.

    Args:
        model: its tensors need no numbers.
        num_shards: GPUs that share the weights; 1 if each has all of them.
        master: dtype in which sharded weights learn whatever theirs is; None: their own.
    """
    return [
        Weight(
            _share(weight.shape, num_shards),
            master if master is not None and weight.requires_grad else weight.dtype,
            weight.requires_grad,
        )
        for weight in model.parameters()
    ]


def _share(shape: torch.Size, num_shards: int) -> tuple[int, ...]:
    if not shape:
        return ()
    rows, *others = shape
    return (-(-rows // num_shards), *others)


def state_bytes(
    weights: Iterable[Weight], buffers: Iterable[Tensor], args: DMaxConfig
) -> StateBytes:
    """The bytes of weights, of their gradients and of the states of the optimiser in `args`."""
    by_dtype: dict[str, int] = {}
    weights = list(weights)
    for dtype, num_bytes in (
        *((weight.dtype, weight.num_bytes) for weight in weights),
        *((buffer.dtype, buffer.nbytes) for buffer in buffers),
    ):
        name = str(dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + num_bytes
    learning = [weight for weight in weights if weight.learns]
    gradients = sum(weight.num_bytes for weight in learning)
    return StateBytes(by_dtype, gradients, _optimizer_bytes(learning, args))


def _optimizer_bytes(weights: list[Weight], args: DMaxConfig) -> int | None:
    """The states that the optimiser makes in its first step, taken on tensors without numbers."""
    if OptimizerNames(args.optim).value not in PLAIN:
        return None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    options.pop("fused", None)  # the same states, and it refuses tensors without numbers
    parameters = [
        nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
        for weight in weights
    ]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = kind(parameters, **options)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
