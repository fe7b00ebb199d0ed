"""How a recipe spreads a model over GPUs, and what that takes beside weights and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmax.attention import FLEX
from dmax.models.backbone import decoder_layers
from dmax.recipe.estimate.cluster import Traffic
from dmax.training.sharding import DTYPES, Sharding

if TYPE_CHECKING:
    from dmax.recipe.sections import Recipe
    from dmax.training.config import DMaxConfig

ON_THE_WAY = 2
"""Layers that are gathered at a time: one that computes, and one that arrives meanwhile."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How GPUs share the work.

    Attributes:
        num_gpus: each runs one process.
        on_gpu: whether the recipe wants GPUs; with `use_cpu` it runs the same on CPUs.
        sharding: what the section `fsdp` says; None if every GPU has the whole model.
        compute: dtype of the products under autocast; None is that of the weights.
    """

    num_gpus: int
    on_gpu: bool
    sharding: Sharding | None
    compute: torch.dtype | None

    @classmethod
    def of(cls, recipe: Recipe, args: DMaxConfig, num_gpus: int) -> Plan:
        """The plan of a recipe; GPUs compute in bfloat16 unless it says otherwise."""
        asked = recipe.file.content["training"]  # what dmax has not filled in
        on_gpu = not asked.get("use_cpu", False)
        in_bfloat16 = asked.get("bf16")
        if in_bfloat16 in (None, "auto"):
            in_bfloat16 = not args.fp16 if on_gpu else args.bf16
        compute = torch.bfloat16 if in_bfloat16 else torch.float16 if args.fp16 else None
        return cls(num_gpus, on_gpu, recipe.fsdp, compute)

    @property
    def shares(self) -> Sharding | None:
        """How the weights are shared, if there is another GPU to share them with."""
        return self.sharding if self.num_gpus > 1 else None

    @property
    def is_sharded(self) -> bool:
        """Whether each GPU holds a part of the weights."""
        return self.shares is not None

    @property
    def num_shards(self) -> int:
        """Into how many parts the weights are cut."""
        return self.num_gpus if self.is_sharded else 1

    @property
    def frees_layers(self) -> bool:
        """Whether a layer is gathered once more for its backward."""
        return self.shares is not None and self.shares.reshard_after_forward

    @property
    def is_on_host(self) -> bool:
        """Whether what stays from step to step lies in the memory of the CPU."""
        return self.shares is not None and self.shares.cpu_offload

    @property
    def master(self) -> torch.dtype | None:
        """The dtype that sharded weights learn in, under mixed precision; None: their own."""
        return torch.float32 if self.is_sharded and self.compute is not None else None

    def in_words(self, args: DMaxConfig, model: Any, attention: str | None) -> str:
        """What decides about memory; `attention` is what the recipe asks for.

        `flex_attention`, which trains on GPUs, keeps the tensors that are counted with `sdpa`.
        """
        if attention is None:
            attention = FLEX if self.on_gpu else model.config._attn_implementation
        ways = {True: "FSDP2", False: "a whole model on each GPU"}
        precision = self.compute or model.dtype
        words = [
            ways[self.is_sharded] if self.num_gpus > 1 else "one process",
            f"products in {str(precision).removeprefix('torch.')}",
            f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}",
            f"{attention} attention",
        ]
        if hasattr(model.config, "num_experts"):
            words.append(f"{model.config._experts_implementation} experts")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the model that is gathered as a whole.

    Attributes:
        weights: bytes, in the dtype of the products.
        gradients: bytes, in the same dtype, of the weights that learn.
        reduced: bytes of the same gradients as they travel.
    """

    weights: int
    gradients: int
    reduced: int


def units(model: Any, sharding: Sharding, compute: torch.dtype | None) -> tuple[list[Unit], Unit]:
    """The layers of a model, and all the rest of it, which is gathered for the whole step."""
    layers = decoder_layers(model)
    inside = {weight for layer in layers for weight in layer.parameters()}
    others = [weight for weight in model.parameters() if weight not in inside]
    parts = [_unit(part, sharding, compute) for part in (*map(_weights, layers), others)]
    return parts[:-1], parts[-1]


def _weights(layer: nn.Module) -> list[Tensor]:
    return list(layer.parameters())


def _unit(weights: list[Tensor], sharding: Sharding, compute: torch.dtype | None) -> Unit:
    learning = [weight for weight in weights if weight.requires_grad]
    return Unit(
        weights=_num_bytes(weights, compute),
        gradients=_num_bytes(learning, compute),
        reduced=_num_bytes(learning, DTYPES[sharding.reduce_dtype]),
    )


def _num_bytes(weights: list[Tensor], dtype: torch.dtype | None) -> int:
    return sum(weight.numel() * (dtype or weight.dtype).itemsize for weight in weights)


def gathered_bytes(layers: list[Unit], others: Unit, *, frees_layers: bool) -> int:
    """Weights that are whole at a time: all that are in no layer, and two layers or all."""
    largest = sorted((layer.weights for layer in layers), reverse=True)
    return others.weights + sum(largest[:ON_THE_WAY] if frees_layers else largest)


def unreduced_bytes(layers: list[Unit], others: Unit, calls: int) -> int:
    """Whole gradients that wait to be reduced, and those of a layer in the form they travel in.

    Autograd hands a gradient on when all uses of a weight have added to it. So where layers run
    several times before a backward, those of all layers wait for the last of its passes.
    """
    gradients = [layer.gradients for layer in layers]
    waiting = sum(gradients) if calls > 1 else max(gradients)
    return others.gradients + waiting + max(layer.reduced for layer in layers)


def sharded_traffic(
    num_gpus: int, layers: Sequence[Unit], others: Unit, calls: int, *, frees_layers: bool
) -> Traffic:
    """Of a micro-batch with FSDP2: a layer is gathered whenever it runs, and reduced once.

    Args:
        num_gpus: that share the weights.
        layers: of the model.
        others: what is in no layer, and runs once.
        calls: how often forward and backward run through the layers.
        frees_layers: whether they are freed after their forward.
    """
    passing = (num_gpus - 1) / num_gpus
    times = calls if frees_layers else 1
    return Traffic(
        gathered=passing * (times * sum(layer.weights for layer in layers) + others.weights),
        reduced=passing * (sum(layer.reduced for layer in layers) + others.reduced),
    )


def replicated_traffic(num_gpus: int, gradients: int) -> Traffic:
    """Of a step in which every GPU has the whole model: gradients are added up once, in a ring."""
    return Traffic(gathered=0, reduced=2 * (num_gpus - 1) / num_gpus * gradients)
