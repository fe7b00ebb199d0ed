"""Counts the kernels of a denoising step of LLaDA-2.0-mini on an NVIDIA GPU, with none there.

    python tools/count_kernels.py

The step runs on a device without numbers. An operation of PyTorch counts as one kernel, views as
none; what is one kernel on a GPU and several operations here (norms, attention) counts as one.
Launches of Triton kernels are counted and not made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from dmax.benchmark.shapes import llada2_mini
from dmax.checkpoint import Checkpoint
from dmax.decoding import get_strategy
from dmax.engine.batch import Batch
from dmax.engine.blocks import OpenBlocks
from dmax.engine.runner import ModelRunner
from dmax.engine.step import step
from dmax.kernels import using
from dmax.params import DecodingParams

DEVICE = torch.device("meta")
LENGTH = 32
SPAN = 1024
WITHOUT_KERNEL = """
    alias as_strided chunk detach empty empty_like empty_strided expand lift_fresh new_empty permute
    promote_types select slice split split_with_sizes squeeze t transpose unbind unsqueeze view
    _unsafe_view
""".split()


class Count(TorchDispatchMode):
    """Operations that run a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.within = 0  # operations that are one kernel on a GPU

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in WITHOUT_KERNEL and not self.within:
            self.kernels[name] += 1
        return function(*args, **(kwargs or {}))

    def as_one(self, name: str, function: Any) -> Any:
        """The function, counted as a kernel of that name whatever it does."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.kernels[name] += not self.within
            self.within += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.within -= 1

        return counted

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """In place of a launch by Triton."""
        self.kernels[kernel.fn.__name__] += 1


@contextmanager
def counting(fused: bool) -> Iterator[Count]:
    """Count within, with Triton's kernels or without."""
    count = Count()
    with ExitStack() as stack:
        for name in ("rms_norm", "scaled_dot_product_attention"):
            stack.enter_context(patch.object(F, name, count.as_one(name, getattr(F, name))))
        stack.enter_context(
            patch.object(JITFunction, "run", lambda *args, **kwargs: count.launch(*args, **kwargs))
        )
        stack.enter_context(using("triton" if fused else "torch"))
        yield count


@torch.no_grad()
def kernels_of_a_step(fused: bool, **changes: Any) -> Counter[str]:
    """Kernels of SPD's step over an open block; `changes` to the model's configuration."""
    checkpoint = llada2_mini(torch.bfloat16, DEVICE, **changes)
    checkpoint.model.set_experts_implementation("fused_moe" if fused else "batched_mm")
    step = step_of_engine(checkpoint)
    with counting(fused) as count:
        step()  # makes what later steps find in its place
        count.kernels.clear()
        with count:
            step()
    return count.kernels


def step_of_engine(checkpoint: Checkpoint) -> Callable[[], object]:
    """What runs SPD's step over an open block at the end of `SPAN` positions.

    Only this function knows the insides of the engine.
    """
    special_ids = checkpoint.special_ids
    runner = ModelRunner(checkpoint.model, special_ids, 2, SPAN)
    params = DecodingParams("spd")
    strategy = get_strategy(params)
    blocks = OpenBlocks(strategy, 2, special_ids, runner.embed, DEVICE)
    blocks.admit(0, strategy, params)
    blocks.open(0)
    start = SPAN - LENGTH
    batch = Batch.of([(0, start, start, 0, -1)], pending=[], block_length=LENGTH).to(DEVICE)
    return partial(step, runner, blocks, batch)


def main() -> None:
    """Count with and without Triton's kernels, in all and for each layer of experts."""
    for fused in (False, True):
        two = kernels_of_a_step(fused, num_hidden_layers=2)
        three = kernels_of_a_step(fused, num_hidden_layers=3)
        whole = kernels_of_a_step(fused)
        layer = three - two
        rest = two - layer - layer
        name = "with Triton" if fused else "without Triton"
        print(name, f"{whole.total()} kernels, {layer.total()} of each layer:")
        print("   ", listed(layer))
        print("    and outside the layers and the first:", listed(rest))


def listed(kernels: Counter[str]) -> str:
    """Names and numbers, the most frequent first."""
    return ", ".join(f"{name} {number}" for name, number in kernels.most_common())


if __name__ == "__main__":
    main()
