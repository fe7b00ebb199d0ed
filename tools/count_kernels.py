"""Counts the kernels of a denoising step of LLaDA-2.0-mini on an NVIDIA GPU, with none there.

    python tools/count_kernels.py

The step runs on a device without numbers. An operation of PyTorch counts as one kernel, views as
none; what is one kernel on a GPU and several operations here (norms, attention) counts as one. A
product with a narrow weight counts as two: cuBLAS divides its sum, so that the whole GPU has work,
and adds the parts up. Launches of Triton kernels are counted and not made.

`predict_step.py` makes milliseconds of the same nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmax.benchmark.shapes import llada2_mini
from dmax.checkpoint import Checkpoint
from dmax.decoding import get_strategy
from dmax.engine.batch import Batch
from dmax.engine.blocks import OpenBlocks
from dmax.engine.runner import ModelRunner
from dmax.engine.step import step
from dmax.kernels import using
from dmax.kernels.quant import Format, QuantizedWeight, quantize
from dmax.models import quantization
from dmax.params import DecodingParams

DEVICE = torch.device("meta")
LENGTH = 32
SPAN = 1024
LAYERS = 19  # of experts, after a dense one
WITHOUT_KERNEL = """
    alias as_strided chunk detach empty empty_like empty_strided expand lift_fresh new_empty permute
    promote_types select slice split split_with_sizes squeeze t transpose unbind unsqueeze view
    _unsafe_view
""".split()


NARROW = 512  # rows or columns of a weight up to which its product is divided
FEW = 128  # rows on its left up to which it is
PRODUCTS = ("mm", "addmm", "bmm")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the step's graph, which is one kernel or the two of a divided product.

    Attributes:
        name: of the kernel, or of the operation.
        kernels: 1 or 2.
        weights: bytes of dense weights that it reads.
        experts: bytes of the stacked weights of all experts, of which it reads some.
        num_experts: in that stack.
        cache: bytes of keys and values that it reads, for each position of a sequence.
        share: bytes of the results of a share of the keys.
        most_shares: that the keys of a row are divided into.
        keys_of_share: that a share has at least.
        programs: that each share has.
        queries: that a program of a share holds.
        keys: that it reads in a turn of its loop.
        activations: bytes of everything else that it reads and writes.
        is_early: its launch overlaps with the end of the node before it.
    """

    name: str
    kernels: int = 1
    weights: int = 0
    experts: int = 0
    num_experts: int = 0
    cache: int = 0
    share: int = 0
    most_shares: int = 1
    keys_of_share: int = 1
    programs: int = 0
    queries: int = 0
    keys: int = 0
    activations: int = 0
    is_early: bool = False


class Count(TorchDispatchMode):
    """Operations that run a kernel, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.within = 0  # operations that are one kernel on a GPU

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function._overloadname == "dtype" and name in PRODUCTS:
            name += " to float32"
        if name not in WITHOUT_KERNEL and not self.within:
            self.nodes.append(node_of(name, [*args, result]))
        return result

    def as_one(self, name: str, function: Any) -> Any:
        """The function, counted as a kernel of that name whatever it does."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.within:
                self.nodes.append(node_of(name, args))
            self.within += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.within -= 1

        return counted

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """In place of a launch by Triton."""
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.nodes.append(node_of_launch(kernel.fn.__name__, given))


def node_of(name: str, values: Iterable[Any]) -> Node:
    """The node of an operation of PyTorch."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    total = sum(map(num_bytes, tensors))
    if not name.startswith(PRODUCTS):
        return Node(name, activations=total)
    *_, left, weight, _ = tensors
    is_divided = min(weight.shape[-2:]) <= NARROW and left.shape[-2] <= FEW
    if is_divided and name == "mm":
        name += ", divided"
    kernels = 2 if is_divided else 1
    return Node(name, kernels, num_bytes(weight), activations=total - num_bytes(weight))


def node_of_launch(name: str, given: Mapping[str, Any]) -> Node:
    """The node of a Triton kernel; names of its parameters say what a tensor is."""
    sizes: Counter[str] = Counter()
    num_experts = 0
    for parameter, value in given.items():
        if not isinstance(value, Tensor):
            continue
        if any(word in parameter for word in ("weight", "scale", "shared")):
            is_stack = value.dim() == 3
            sizes["experts" if is_stack else "weights"] += num_bytes(value)
            num_experts = len(value) if is_stack else num_experts
        elif parameter in ("keys", "values"):  # [slots, positions, heads, size], one is read
            reads = name == "_attend_kernel"
            sizes["cache"] += num_bytes(value[0, 0]) if reads else 0
        elif parameter in ("parts", "peak", "mass") and "LEAST" in given:  # [shares, ...]
            sizes["share"] += num_bytes(value[:1])
            sizes["most_shares"] = len(value)
            sizes["keys_of_share"] = given["LEAST"]
        elif parameter != "table":  # of which a few rows are read
            sizes["activations"] += num_bytes(value)
    if name == "_attend_kernel":
        rows, heads, _ = given["grid"]
        sizes.update(programs=rows * heads, queries=given["BLOCK_Q"], keys=given["BLOCK_S"])
    is_early = bool(given.get("launch_pdl"))
    return Node(name, num_experts=num_experts, is_early=is_early, **sizes)


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def counting(fused: bool) -> Iterator[Count]:
    """Count within, with Triton's kernels or without."""
    from triton.runtime.jit import JITFunction

    count = Count()
    with ExitStack() as stack:
        for name in ("rms_norm", "scaled_dot_product_attention"):
            stack.enter_context(patch.object(F, name, count.as_one(name, getattr(F, name))))
        # A GPU with every format, if anybody asks.
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(
            patch.object(JITFunction, "run", lambda *args, **kwargs: count.launch(*args, **kwargs))
        )
        stack.enter_context(using("triton" if fused else "torch"))
        yield count


@dataclass(frozen=True, slots=True)
class Setting:
    """What a step is of.

    Attributes:
        batch: sequences, each with an open block.
        commits: whether each also has a pending block, which the first step of a block has.
        span: positions of a sequence in the cache.
        form: of the quantised experts; None for bfloat16.
        fused: with Triton's kernels, or without.
    """

    batch: int = 1
    commits: bool = False
    span: int = SPAN
    form: Format | None = None
    fused: bool = True


@torch.no_grad()
def nodes_of_a_step(setting: Setting, **changes: Any) -> list[Node]:
    """Nodes of SPD's step; `changes` to the model's configuration."""
    checkpoint = llada2_mini(torch.bfloat16, DEVICE, **changes)
    checkpoint.model.set_experts_implementation("fused_moe" if setting.fused else "batched_mm")
    if setting.form is not None:
        quantize_without_numbers(checkpoint.model, setting.form)
    step = step_of_engine(checkpoint, setting)
    with counting(setting.fused) as count:
        step()  # makes what later steps find in its place
        count.nodes.clear()
        with count:
            step()
    return count.nodes


def step_of_engine(checkpoint: Checkpoint, setting: Setting) -> Callable[[], object]:
    """What runs SPD's step over open blocks at the end of their sequences.

    Only this function knows the insides of the engine.
    """
    special_ids = checkpoint.special_ids
    size = setting.batch
    runner = ModelRunner(checkpoint.model, special_ids, size + 1, setting.span)
    params = DecodingParams("spd")
    strategy = get_strategy(params)
    blocks = OpenBlocks(strategy, size + 1, special_ids, runner.embed, DEVICE)
    for row in range(size):
        blocks.admit(row, strategy, params)
        blocks.open(row)
    start = setting.span - LENGTH
    opened = [(row, start, start, row, -1) for row in range(size)]
    before = [(row, start - LENGTH, start - LENGTH, -1, -1) for row in range(size)]
    pending = before if setting.commits else []
    tokens = [(0,) * LENGTH for _ in pending]
    batch = Batch.of(pending + opened, pending=tokens, block_length=LENGTH).to(DEVICE)
    return partial(step, runner, blocks, batch)


def quantize_without_numbers(model: Any, form: Format) -> None:
    """What `quantize_experts` does to a model's shapes."""

    def shaped(weight: Tensor, form: Format) -> QuantizedWeight:
        one = quantize(torch.ones(1, 1, weight.shape[-1]), form)
        parts = one.values, one.scale
        return QuantizedWeight(
            *(part.to(DEVICE).expand(*weight.shape[:2], -1).contiguous() for part in parts)
        )

    with patch.object(quantization, "quantize", shaped):
        quantization.quantize_experts(model, form)


def main() -> None:
    """Count with and without Triton's kernels, in all and for each layer of experts."""
    for fused in (False, True):
        layer, rest = map(kernels, layer_and_rest(Setting(fused=fused)))
        total = rest.total() + LAYERS * layer.total()
        name = "with Triton" if fused else "without Triton"
        print(name, f"{total} kernels, {layer.total()} of each layer:")
        print("   ", listed(layer))
        print("    and outside of these layers:", listed(rest))


def layer_and_rest(setting: Setting) -> tuple[Counter[Node], Counter[Node]]:
    """Nodes of a layer of experts, and of all else, the dense first layer among it."""
    two, three = (Counter(nodes_of_a_step(setting, num_hidden_layers=n)) for n in (2, 3))
    layer = three - two
    return layer, two - layer


def kernels(nodes: Counter[Node]) -> Counter[str]:
    """Kernels by name."""
    found: Counter[str] = Counter()
    for node, number in nodes.items():
        found[node.name] += number * node.kernels
    return found


def listed(kernels: Counter[str]) -> str:
    """Names and numbers, the most frequent first."""
    return ", ".join(f"{name} {number}" for name, number in kernels.most_common())


if __name__ == "__main__":
    main()
