"""Prints which of our kernels `torch.compile` finds in a forward, as a JSON list.

    python traced.py

The tensors have sizes and no numbers, and a driver that names a GPU stands in for the real one: the
forward is traced and made free of side effects, as before code is made of it, and no code is made.
A second graph, or a part that cannot be traced, is an error.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compile_kernels import AbsentGPU

from dmax.checkpoint import new_checkpoint
from dmax.engine import runner
from dmax.engine.batch import Batch
from dmax.kernels import using
from dmax.models import LLaDA2MoeConfig
from dmax.special_ids import SpecialIds

L = 8
IDS = SpecialIds(39, (0,), 0, L)


def mixture_of_experts() -> Any:
    config = LLaDA2MoeConfig(
        vocab_size=40, mask_token_id=39, eos_token_id=0, block_length=L, hidden_size=32,
        intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=16,
    )  # fmt: skip
    return new_checkpoint(config, experts_implementation="fused_moe").model


def main() -> None:
    kernels = list[str]()

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if "kernel_idx" in node.kwargs:
                kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                kernels.append(getattr(kernel, "fn", kernel).__name__)
        return graph.forward

    compile_ = torch.compile
    backend = aot_autograd(fw_compiler=record)
    runner.torch.compile = lambda encode: compile_(encode, backend=backend, fullgraph=True)
    _triton.has_triton = lambda: True  # which asks for a GPU; without one kernels are plain objects
    driver.set_active(AbsentGPU(90))
    warnings.simplefilter("error")
    batch = Batch.of([(0, 16, 16, 0, -1), (1, 8, 8, 1, -1)], [], L)
    with FakeTensorMode(), using("triton"), torch.inference_mode():
        model = mixture_of_experts()
        made = runner.ModelRunner(model, IDS, num_slots=3, capacity=8 * L, compiled=True)
        assert made.reads_in_place
        numbers = torch.zeros(batch.numbers.shape, dtype=torch.long)
        made.forward(replace(batch, numbers=numbers), torch.zeros(batch.num_rows, L, 32))
    json.dump(kernels, sys.stdout)


if __name__ == "__main__":
    main()
