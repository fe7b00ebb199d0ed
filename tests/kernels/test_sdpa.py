"""Our `sdpa` against transformers': the same numbers, without repeated keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dmax.attention import prepare_mask
from dmax.kernels.attention import ATTENTION_FUNCTIONS, sdpa_attention_forward

BATCH, HEADS, GROUPS, QUERIES, KEYS, SIZE = 2, 6, 2, 5, 40, 16


class Layer(nn.Module):
    num_key_value_groups = HEADS // GROUPS
    is_causal = False


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (
        (QUERIES, HEADS),
        (KEYS, GROUPS),
        (KEYS, GROUPS),
    )  # heads last, as projections and caches have them
    return [
        torch.randn(BATCH, *shape, SIZE).to(dtype).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


def make_mask(dtype: torch.dtype) -> Tensor:
    visible = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.5
    visible[0, 0, 0] = False  # sees nothing
    return prepare_mask(visible, dtype, "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_sdpa_equals_that_of_transformers(dtype: torch.dtype, masked: bool) -> None:
    found = []
    for function in (ALL_ATTENTION_FUNCTIONS["sdpa"], ATTENTION_FUNCTIONS["sdpa"]):
        inputs = make_inputs(dtype)
        output, _ = function(
            Layer(), *inputs, make_mask(dtype) if masked else None, scaling=0.3, is_causal=False
        )
        output.float().square().sum().backward()
        found.append([output, *(each.grad for each in inputs)])
    assert torch.equal(found[0][0], found[1][0])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(
            actual, expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=2e-2
        )


def test_other_devices_use_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *inputs, **options: calls.append(options)
    )
    query, key, value = (each.to("meta") for each in make_inputs(torch.float32))
    sdpa_attention_forward(Layer(), query, key, value, None, scaling=0.3, is_causal=False)
    assert calls == [{"scaling": 0.3, "dropout": 0.0, "is_causal": False}]
