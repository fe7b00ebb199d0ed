"""Prompts in forwards of their own: who sees whom, and that no mask is spelt out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made import Made
from torch import Tensor

from dmax.engine.runner import ModelRunner
from dmax.models.llada2_moe.modeling import LLaDA2MoeModel

Golden = tuple[str, Any, dict[str, Any]]


def after_prompts(checkpoint: Any, lengths: list[int]) -> list[Tensor]:
    """Keys and values after chunks of prompts in slots that hold `lengths` positions already."""
    runner = ModelRunner(checkpoint.model, checkpoint.special_ids, len(lengths), 128)
    generator = torch.Generator().manual_seed(1)
    stores = [*runner.cache.keys, *runner.cache.values]
    for store in stores:
        store.copy_(torch.randn(store.shape, generator=generator))
    slots = list(range(len(lengths)))
    for slot, length in zip(slots, lengths, strict=True):
        runner.cache.commit([slot], length)
    prompts = torch.randint(300, (len(slots), 48), generator=generator)
    for chunk in prompts.split(32, dim=1):
        runner.prefill(slots, chunk)
    return stores


@pytest.mark.parametrize("lengths", [[0], [64, 64], [16, 64]], ids=str)
def test_what_prompts_see_is_the_same_without_a_mask(
    golden: Golden, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint, _ = golden
    actual = after_prompts(checkpoint, lengths)
    monkeypatch.setattr(LLaDA2MoeModel, "takes_staircase", False)
    expected = after_prompts(checkpoint, lengths)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_long_prompts_make_nothing_as_large_as_a_mask(golden: Golden) -> None:
    _, checkpoint, _ = golden
    start, size = 15_872, 512
    runner = ModelRunner(checkpoint.model, checkpoint.special_ids, 1, start + size)
    runner.cache.commit([0], start)
    with Made() as made:
        runner.prefill([0], torch.zeros(1, size, dtype=torch.long))
    assert made.largest < size * (start + size) / 10
