"""Choosing experts: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmax.kernels import router
from dmax.kernels.router import Routing, route, select

ROUTINGS = {
    "one group": (8, Routing(2)),
    "as LLaDA-2.0": (256, Routing(8, 8, 4, scaling=2.5)),
    "sizes that are no powers of two": (15, Routing(3, 3, 2)),
    "groups of one": (4, Routing(2, 4, 3)),
    "weights as they are": (12, Routing(4, 2, 1, normalizes=False)),
    "one expert": (6, Routing(1, normalizes=False)),
}


def spread(found: tuple[Tensor, Tensor], num_experts: int) -> Tensor:
    """Weights by expert, [N, E]."""
    index, weights = (each.cpu() for each in found)
    assert index.dtype == torch.int64 and weights.dtype == torch.float32
    assert len({*index[0].tolist()}) == index.shape[1], "an expert was chosen twice"
    return torch.zeros(len(index), num_experts).scatter(1, index, weights)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_kernel_equals_the_twin(name: str, biased: bool, triton_device: torch.device) -> None:
    from dmax.kernels import router_triton

    num_experts, routing = ROUTINGS[name]
    logits, bias = torch.randn(33, num_experts), torch.randn(num_experts) / 4 if biased else None
    expected = spread(select(logits, bias, routing), num_experts)
    on_device = bias if bias is None else bias.to(triton_device)
    actual = router_triton.select(logits.to(triton_device), on_device, routing)
    torch.testing.assert_close(spread(actual, num_experts), expected)


def test_ties_go_to_the_lowest_index(triton_device: torch.device) -> None:
    from dmax.kernels import router_triton

    index, weights = router_triton.select(
        torch.zeros(2, 8, device=triton_device), None, Routing(2, 4, 2)
    )
    assert index.tolist() == [[0, 1]] * 2
    assert weights.tolist() == [[0.5, 0.5]] * 2


def test_a_nan_chooses_no_expert_that_is_not_there(triton_device: torch.device) -> None:
    from dmax.kernels import router_triton

    logits = torch.randn(4, 6)
    logits[0, 5], logits[1, 2] = (
        float("nan"),
        float("nan"),
    )  # the interpreter has no answer where all are
    logits[2], logits[3] = float("inf"), float("-inf")
    index, _ = router_triton.select(logits.to(triton_device), None, Routing(3, 3, 2))
    assert set(index.flatten().tolist()) <= set(range(6))


def test_the_kernel_runs_where_triton_is_chosen(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    from dmax.kernels import router_triton

    chosen = []
    monkeypatch.setattr(router, "implementation", lambda device: "triton")
    monkeypatch.setattr(
        router_triton, "select", lambda *arguments: chosen.append(arguments) or select(*arguments)
    )
    x, weight = (
        torch.randn(5, 16, device=triton_device),
        torch.randn(8, 16, device=triton_device, requires_grad=True),
    )
    route(x, weight, None, Routing(2))
    assert not chosen  # a gradient is wanted, and the kernel has none
    with torch.no_grad():
        route(x.double(), weight.double(), None, Routing(2))
        assert not chosen
        index, weights = route(x, weight, None, Routing(2))
    assert len(chosen) == 1 and index.shape == weights.shape == (5, 2)
