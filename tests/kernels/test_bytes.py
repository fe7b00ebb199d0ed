"""Bytes that kernels ask for, counted by the sanitizer, and a layer at its real size."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interpreted import is_interpreted
from torch import Tensor, nn

from dmax.kernels import using
from dmax.kernels.moe import routed
from dmax.kernels.quant import Format
from dmax.models import LLaDA2MoeConfig
from dmax.models.llada2_moe.modeling import LLaDA2MoeSparseBlock
from dmax.models.quantization import quantize_experts

if TYPE_CHECKING:
    from sanitizer import Launch, Watch

if not is_interpreted():
    pytest.skip("kernels are not interpreted here", allow_module_level=True)

BF16 = torch.bfloat16
MOST = 0.15  # activations that a kernel may ask for, as a share of its weights


def block_of(used: Tensor, *, hidden: int, inner: int, num_experts: int) -> LLaDA2MoeSparseBlock:
    """A block in bfloat16 whose tokens go to the experts in `used`; the others are zeros."""
    config = LLaDA2MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=num_experts
    )
    config._experts_implementation = "fused_moe"
    with torch.device("meta"):
        block = LLaDA2MoeSparseBlock(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(block.named_parameters()):
        # NumPy's zeros take no memory until somebody writes them.
        weight = torch.from_numpy(np.zeros(parameter.shape, np.int16)).view(BF16)
        rows = used if parameter.dim() == 3 else torch.arange(len(weight))
        numbers = torch.randn(len(rows), *parameter.shape[1:], generator=generator)
        weight[rows] = (numbers * parameter.shape[-1] ** -0.5).to(BF16)
        module, _, leaf = name.rpartition(".")
        frozen = nn.Parameter(weight, requires_grad=False)
        setattr(block.get_submodule(module), leaf, frozen)
    block.gate.expert_bias = torch.zeros(num_experts).index_fill(0, used, 100.0)
    return block


def run(block: LLaDA2MoeSparseBlock, tokens: Tensor) -> Tensor:
    """The block's output [1, N, D] for tokens [N, D], by its kernels."""
    with torch.no_grad(), using("triton"):
        output: Tensor = block(tokens[None])
    return output.sum(dim=2) if output.dim() == 4 else output  # terms that are still to be summed


def launch_of(watched: Watch, kernel: str) -> Launch:
    (launch,) = [each for each in watched.launches if each.kernel == kernel]
    return launch


@pytest.mark.parametrize("form", ["bf16", *get_args(Format)])
def test_weights_are_read_once_and_little_else(
    watched: Watch, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tokens share eight experts: 3.7 have an expert in common where a block hits 69.5."""
    used = torch.tensor([0, 3, 8, 11, 16, 19, 30, 31])  # in four groups of eight
    block = block_of(used, hidden=256, inner=128, num_experts=64)
    if form != "bf16":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        quantize_experts(block, form)  # type: ignore[arg-type]
    watched.launches.clear()
    watched.counts_reads = True
    run(block, torch.randn(4, 256).to(BF16))
    for kernel, activations in (("_gate_up_kernel", "tokens"), ("_down_kernel", "inner")):
        arguments = launch_of(watched, kernel).arguments
        weight = arguments["weight"]
        assert weight.times_read is not None
        by_expert = weight.times_read.reshape(64, -1)
        assert (by_expert[used] == 1).all()
        assert by_expert.sum() == by_expert[used].sum()
        shared = sum(each.read for name, each in arguments.items() if name.startswith("shared"))
        assert arguments[activations].read <= MOST * (weight.read + shared)


def test_a_layer_of_the_real_size(watched: Watch) -> None:
    """E 256, D 2,048, I 512 and 32 tokens against float64; the index arithmetic is the real one."""
    used = torch.tensor([0, 1, 31, 64, 95, 223, 254, 255])  # in four groups
    block = block_of(used, hidden=2048, inner=512, num_experts=256)
    tokens = torch.randn(32, 2048, generator=torch.Generator().manual_seed(1)).to(BF16)
    found = run(block, tokens)[0]

    with torch.no_grad(), using("torch"):
        index, weights = block.gate(tokens)
        place = torch.zeros(256, dtype=torch.long).index_copy(0, used, torch.arange(len(used)))
        gate_up = block.experts.gate_up_proj[used].double()
        down = block.experts.down_proj[used].double()
        wide = tokens.double()
        expected = routed(wide, place[index], weights.double(), gate_up, down, F.silu)
        expected += block.shared_experts.double()(wide)
    assert set(index.unique().tolist()) <= set(used.tolist())
    assert {0, 255} <= set(index.unique().tolist())
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= 1e-2  # of bfloat16, which has eight bits


def test_partial_sums_are_no_larger_than_what_they_summarise(watched: Watch) -> None:
    from dmax.kernels import block_attention_triton

    positions = 1024
    heads = torch.randn(1, 32, 24, 128).to(BF16)
    norm = torch.ones(128, dtype=BF16)
    turn = torch.ones(positions, 64, dtype=BF16)
    keys = torch.randn(1, positions, 4, 128).to(BF16)
    values = torch.randn(1, positions, 4, 128).to(BF16)
    start = torch.tensor([positions - 32])
    zero = torch.tensor([0])
    block_attention_triton.block_attention(
        heads, (norm, norm), 1e-6, (turn, turn), keys, values, zero, start, start, 128**-0.5
    )
    arguments = launch_of(watched, "_attend_kernel").arguments
    read = arguments["keys"].read + arguments["values"].read
    summarised = 2 * keys.numel() * 2
    partial = sum(arguments[name].stored for name in ("parts", "peak", "mass"))
    assert read == 2 * summarised  # by each half of the queries
    assert 0 < partial <= summarised
