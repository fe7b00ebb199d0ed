"""Choosing experts: the kernel against its twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmax.kernels.router import router_logits, select_experts

ROUTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "one group": (8, dict(top_k=2)),
    "as LLaDA-2.0": (256, dict(top_k=8, num_groups=8, num_kept_groups=4, scaling=2.5)),
    "sizes that are no powers of two": (15, dict(top_k=3, num_groups=3, num_kept_groups=2)),
    "groups of one": (4, dict(top_k=2, num_groups=4, num_kept_groups=3)),
    "weights as they are": (
        12,
        dict(top_k=4, num_groups=2, num_kept_groups=1, normalizes=False),
    ),
    "one expert": (6, dict(top_k=1, normalizes=False)),
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
    logits = torch.randn(33, num_experts)
    bias = torch.randn(num_experts) / 4 if biased else None
    expected = spread(select_experts(logits, bias, **routing), num_experts)
    on_device = None if bias is None else bias.to(triton_device)
    actual = router_triton.select_experts(logits.to(triton_device), on_device, **routing)
    torch.testing.assert_close(spread(actual, num_experts), expected)


def test_ties_go_to_the_lowest_index(triton_device: torch.device) -> None:
    from dmax.kernels import router_triton

    logits = torch.zeros(2, 8, device=triton_device)
    index, weights = router_triton.select_experts(logits, None, 2, 4, 2)
    assert index.tolist() == [[0, 1]] * 2
    assert weights.tolist() == [[0.5, 0.5]] * 2


def test_a_nan_chooses_no_expert_that_is_not_there(triton_device: torch.device) -> None:
    from dmax.kernels import router_triton

    logits = torch.randn(4, 6)
    logits[0, 5] = float("nan")  # not a whole row: the interpreter has no answer where all are
    logits[1, 2] = float("nan")
    logits[2] = float("inf")
    logits[3] = float("-inf")
    index, _ = router_triton.select_experts(logits.to(triton_device), None, 3, 3, 2)
    assert set(index.flatten().tolist()) <= set(range(6))


def test_the_kernel_runs_where_triton_is_chosen(
    monkeypatch: pytest.MonkeyPatch, kernels: torch.device
) -> None:
    from dmax.kernels import router_triton

    calls = []
    run = router_triton.select_experts

    def spy(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(router_triton, "select_experts", spy)
    x = torch.randn(5, 16, device=kernels)
    weight = torch.randn(8, 16, device=kernels, requires_grad=True)
    select_experts(router_logits(x, weight), None, 2)
    assert not calls  # a gradient is wanted, and the kernel has none
    with torch.no_grad():
        select_experts(router_logits(x.double(), weight.double()), None, 2)
        assert not calls
        index, weights = select_experts(router_logits(x, weight), None, 2)
    assert len(calls) == 1 and index.shape == weights.shape == (5, 2)
