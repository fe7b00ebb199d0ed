"""Experts forwards: the plain ones against `eager`, the Triton kernels against their twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products import Products
from torch import Tensor

from dmax import kernels
from dmax.errors import InputError
from dmax.kernels import implementation, moe, using, wants_gradient
from dmax.kernels.moe import best_experts_implementation, fused_moe, routed, stored
from dmax.models import LLaDA2MoeConfig
from dmax.models.llada2_moe.modeling import LLaDA2MoeExperts

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
EXPERTS = 8
TOP_K = 2


def make_experts(
    implementation: str,
    num_experts: int = 4,
    dtype: torch.dtype = torch.float32,
    width: int = 32,
) -> LLaDA2MoeExperts:
    config = LLaDA2MoeConfig(
        hidden_size=64,
        moe_intermediate_size=width,
        num_experts=num_experts,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    config._experts_implementation = implementation
    experts = LLaDA2MoeExperts(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    return experts


def make_inputs(
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
    top_k: int = TOP_K,
) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.rand(num_tokens, num_experts).topk(top_k).indices
    tokens = torch.randn(num_tokens, hidden).to(dtype)
    weights = torch.rand(num_tokens, top_k).to(dtype)
    return tokens, index, weights


def make_weights(dtype: torch.dtype, hidden: int = 64, width: int = 32) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(EXPERTS, 2 * width, hidden) * 0.2
    down = torch.randn(EXPERTS, hidden, width) * 0.2
    return gate_up.to(dtype), down.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def in_float64(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


# ---- plain forwards -----------------------------------------------------------------------------


def test_one_expert_by_hand() -> None:
    # gate 2 · 0.5 = 1, SiLU(1) = 0.731059; up 2 · 1.5 = 3; times the router's 0.5; down · 2.
    one = torch.tensor([[2.0]]), torch.tensor([[0]]), torch.tensor([[0.5]])
    gate_up = torch.tensor([[[0.5], [1.5]]])
    down = torch.tensor([[[2.0]]])
    for forward in (moe.dense, routed):
        assert forward(*one, gate_up, down, F.silu).item() == pytest.approx(2.193176, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 127, 128])
@pytest.mark.parametrize("implementation", ["dense_mm", "fused_moe"])
def test_forwards_equal_eager(implementation: str, num_tokens: int, dtype: torch.dtype) -> None:
    """For numbers of tokens on both sides of where `dense_mm` changes its way."""
    inputs = make_inputs(num_tokens, 4, dtype)
    with torch.no_grad():
        expected = make_experts("eager", dtype=torch.float64)(*in_float64(*inputs))
        actual = make_experts(implementation, dtype=dtype)(*inputs)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("num_tokens", "implementation"), [(3, "dense_mm"), (70, "dense_mm"), (70, "fused_moe")]
)
def test_gradients_equal_those_of_eager(num_tokens: int, implementation: str) -> None:
    tokens, index, weights = make_inputs(num_tokens, 3)  # the last of four experts gets no token
    found = []
    for name in ("eager", implementation):
        experts = make_experts(name)
        leaves = (tokens.clone().requires_grad_(), weights.clone().requires_grad_())
        experts(leaves[0], index, leaves[1]).square().sum().backward()
        found.append([leaf.grad for leaf in (*leaves, *experts.parameters())])
    for expected, actual in zip(*found, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [3, 200])
def test_autocast_keeps_the_dtype_of_the_tokens(num_tokens: int) -> None:
    inputs = make_inputs(num_tokens, 4)
    experts = make_experts("dense_mm")
    with torch.no_grad():
        expected = experts(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            actual = experts(*inputs)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) <= 2e-2


@pytest.mark.parametrize("num_tokens", [3, 200])
@pytest.mark.parametrize(
    "implementation", ["eager", "grouped_mm", "batched_mm", "dense_mm", "fused_moe"]
)
def test_autocast_reaches_every_product_of_the_experts(
    implementation: str, num_tokens: int
) -> None:
    """Forward and backward multiply in bfloat16; gradients arrive in float32 weights."""
    tokens, index, weights = make_inputs(num_tokens, 4)

    def gradients(dtype: torch.dtype | None) -> tuple[set[torch.dtype], list[Tensor]]:
        experts = make_experts(implementation)
        leaves = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
        with Products() as products:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                output = experts(leaves[0], index, leaves[1])
            output.square().sum().backward()
        found = [leaf.grad for leaf in (*leaves, *experts.parameters()) if leaf.grad is not None]
        assert len(found) == 4
        return products.dtypes, found

    exact_dtypes, exact = gradients(None)
    dtypes, found = gradients(torch.bfloat16)
    assert (exact_dtypes, dtypes) == ({torch.float32}, {torch.bfloat16})
    for expected, actual in zip(exact, found, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) <= 2e-2  # bfloat16 has 8 bits, 4e-3


def test_odd_sizes_of_the_grouped_product_stay_in_float32() -> None:
    """Rows of 12 numbers are multiples of 16 bytes in float32, which torch asks for, only there."""
    inputs = make_inputs(9, 4)
    experts = make_experts("grouped_mm", width=12)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        output = experts(*inputs)
    assert products.dtypes == {torch.float32}
    assert relative_error(output, make_experts("eager", width=12)(*inputs)) <= 1e-6


# ---- which forward ------------------------------------------------------------------------------


def test_the_implementation_follows_from_device_and_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert implementation(CPU) == "torch"
    assert implementation(CUDA) == "torch"
    with using("torch"):
        assert implementation(CUDA) == "torch"
    with pytest.raises(InputError, match="triton is not installed"), using("triton"):
        pass
    with (
        pytest.raises(InputError, match="unknown implementation 'tritn'") as error,
        using("tritn"),  # type: ignore[arg-type]
    ):
        pass
    assert error.value.hint == "did you mean `triton`?"
    assert best_experts_implementation(256, CUDA) is None
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    assert implementation(CPU) == "torch"
    assert implementation(CUDA) == "triton"
    with using("torch"):
        assert implementation(CUDA) == "torch"
    assert implementation(CUDA) == "triton"
    with using("triton"):
        assert implementation(CPU) == "triton"
    assert implementation(CPU) == "torch"
    assert best_experts_implementation(256, CUDA) == "fused_moe"
    on_cpu = [best_experts_implementation(num_experts, CPU) for num_experts in (4, 16, 17)]
    assert on_cpu == ["dense_mm", "dense_mm", None]


@pytest.mark.parametrize(
    ("num_tokens", "requires_grad", "is_fused"),
    [(1, False, True), (512, False, True), (513, False, False), (1, True, False)],
)
def test_shapes_and_gradients_decide_for_the_kernel(
    num_tokens: int, requires_grad: bool, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight experts take 128 pairs each: 512 tokens of two."""
    calls: list[Any] = []
    monkeypatch.setattr(moe, "can_fuse", lambda *tensors: not wants_gradient(*tensors))
    monkeypatch.setattr(moe, "fused_moe", lambda tokens, *rest: calls.append(rest) or tokens)
    experts = make_experts("fused_moe", EXPERTS).requires_grad_(requires_grad)
    experts(*make_inputs(num_tokens, EXPERTS))
    assert bool(calls) == is_fused


# ---- Triton -------------------------------------------------------------------------------------


def listed(routing: Any) -> dict[int, list[int]]:
    """The pairs of every expert that has some."""
    active = routing.active.item()
    experts = routing.experts[:active].tolist()
    assert sorted({*experts}) == sorted(experts)
    counts = {expert: int(routing.counts[expert]) for expert in experts}
    pairs = {expert: routing.pairs[expert, :count] for expert, count in counts.items()}
    return {expert: sorted(found.tolist()) for expert, found in pairs.items() if len(found)}


def test_every_expert_lists_its_pairs_in_order(triton_device: torch.device) -> None:
    from dmax.kernels import router_triton

    index = torch.tensor([[0, 2], [2, 1], [-1, -1], [0, 2]], device=triton_device)
    routing = router_triton.route(index, torch.rand(4, 2), 4, 3)  # each token has pairs 3n, 3n + 1
    assert listed(routing) == {0: [0, 9], 1: [4], 2: [1, 3, 10]}


@pytest.mark.parametrize("num_tokens", [1, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_their_twin(
    triton_device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    arguments = on(triton_device, *make_inputs(num_tokens, EXPERTS, dtype), *make_weights(dtype))
    actual = fused_moe(*arguments)
    assert actual.dtype == dtype
    expected = routed(*in_float64(*arguments), F.silu)
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(actual, expected) <= bound


@pytest.mark.parametrize("routing", ["one expert for all", "idle experts", "the same expert twice"])
def test_kernels_take_any_routing(triton_device: torch.device, routing: str) -> None:
    tokens, index, weights = make_inputs(40, EXPERTS)
    if routing == "one expert for all":
        index = torch.full((40, 1), 5)
        weights = weights[:, :1]
    elif routing == "idle experts":
        index = index % 2 * 3  # experts 0 and 3
    else:
        index = index[:, :1].expand(-1, 2)
    arguments = on(triton_device, tokens, index, weights, *make_weights(torch.float32))
    expected = routed(*arguments, F.silu)
    assert relative_error(fused_moe(*arguments), expected) <= 1e-6


@pytest.mark.parametrize("tile", [(16, 16, 32), (32, 32, 16)])
def test_tiles_need_not_divide_the_sizes(
    triton_device: torch.device, tile: tuple[int, int, int]
) -> None:
    from dmax.kernels import moe_triton, router_triton

    inputs = make_inputs(21, EXPERTS, hidden=72, top_k=3)
    weights = make_weights(torch.float32, hidden=72, width=40)
    arguments = on(triton_device, *inputs, *weights)
    tokens, index, weights, gate_up, down = arguments
    routing = router_triton.route(index, weights, EXPERTS, 3)
    weights = stored(gate_up), stored(down), None, True
    actual = moe_triton.expert_terms(tokens, routing, *weights, (moe_triton.Tile(*tile),) * 2)
    actual = actual.sum(dim=1)
    assert relative_error(actual, routed(*arguments, F.silu)) <= 1e-6


def test_a_token_does_not_depend_on_the_others_of_its_batch(triton_device: torch.device) -> None:
    from dmax.kernels import moe_triton, router_triton

    tokens, index, weights, gate_up, down = on(
        triton_device, *make_inputs(40, EXPERTS, torch.float16), *make_weights(torch.float16)
    )

    def run(tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tiles = moe_triton.Tile(16, 32, 64), moe_triton.Tile(16, 64, 32)
        routing = router_triton.route(index, weights, EXPERTS, TOP_K)
        weights = stored(gate_up), stored(down), None, True
        return moe_triton.expert_terms(tokens, routing, *weights, tiles)

    together = run(tokens, index, weights)
    assert torch.equal(together, run(tokens, index, weights))
    some = torch.tensor([33, 2, 17], device=triton_device)
    assert torch.equal(together[some], run(tokens[some], index[some], weights[some]))
