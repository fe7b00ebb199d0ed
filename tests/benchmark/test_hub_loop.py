"""The readable loops under bench/ decide as the engine does."""

from __future__ import annotations

from typing import Any

import cached_loop
import hub_loop
import pytest
import torch
from torch import Tensor

from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task


@pytest.mark.parametrize(
    ("model", "strategy", "threshold"),
    [("tiny-base", "threshold", 0.95), ("tiny-dmax", "spd", 0.5)],
)
def test_the_hub_loop_decides_as_the_engine_does(
    model: str, strategy: str, threshold: float
) -> None:
    llm = LLM(model, dtype=torch.float32, device="cpu")
    examples = get_task("word_problems").examples(2, 11)
    outputs = llm.generate([each.prompt for each in examples], DecodingParams(strategy, threshold))
    for output in outputs:
        for loop in (hub_loop, cached_loop):
            completion, forwards = loop.generate(
                llm.checkpoint,
                output.prompt_token_ids,
                threshold=threshold,
                soft=strategy == "spd",
                max_new_tokens=256,
            )
            assert completion == output.token_ids
            assert forwards == output.num_forwards


@pytest.mark.parametrize("num_prompt", [3, 32, None])
def test_the_cached_loop_computes_what_is_not_final(
    num_prompt: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's whole blocks once, then a block, or two after one has become final."""
    llm = LLM("tiny-dmax", dtype=torch.float32, device="cpu")
    prompt = llm.encode(get_task("word_problems").examples(1, 11)[0].prompt)[:num_prompt]
    num_final = len(prompt) // 32 * 32
    seen = list[tuple[int, int]]()
    forward = cached_loop.CachedModel._forward

    def watched(self: cached_loop.CachedModel, checkpoint: Any, embeds: Tensor) -> Tensor:
        seen.append((self.num_final, embeds.shape[1]))
        return forward(self, checkpoint, embeds)

    monkeypatch.setattr(cached_loop.CachedModel, "_forward", watched)
    _, forwards = cached_loop.generate(
        llm.checkpoint, prompt, threshold=0.5, soft=True, max_new_tokens=64
    )
    num_prefill = int(num_final > 0)
    assert len(seen) == forwards + num_prefill
    assert seen[:num_prefill] == [(0, num_final)][:num_prefill]
    starts, sizes = zip(*seen[num_prefill:], strict=True)
    assert (starts[0], sizes[0]) == (num_final, 32)
    assert sorted(starts) == list(starts)
    assert set(sizes) <= {32, 64}
    if num_prompt is None:  # the answer takes several blocks
        assert sizes.count(64) == len(set(starts)) - 1 > 0


def test_the_hub_loop_ends_at_the_limit() -> None:
    llm = LLM("tiny-dmax", dtype=torch.float32, device="cpu")
    prompt = llm.encode(get_task("word_problems").examples(1, 11)[0].prompt)
    output = llm.generate([prompt], DecodingParams("spd", 0.5, max_new_tokens=9))[0]
    completion, forwards = hub_loop.generate(
        llm.checkpoint, prompt, threshold=0.5, soft=True, max_new_tokens=9
    )
    assert (completion, forwards) == (output.token_ids, output.num_forwards)
    assert len(completion) == 9


def test_positions_the_hub_loop_selects() -> None:
    masked = torch.tensor([False, True, True, True, False])
    confidence = torch.tensor([0.1, 0.9, 0.4, 0.95, 0.99])

    def chosen(threshold: float, prefix_only: bool) -> list[int]:
        found = hub_loop.select(masked, confidence, threshold, prefix_only=prefix_only)
        return found.nonzero()[:, 0].tolist()

    assert chosen(0.9, False) == [1, 3]
    assert chosen(0.9, True) == [1]
    assert chosen(0.97, False) == [3]
    assert chosen(0.97, True) == [1]
    nothing = torch.zeros(5, dtype=torch.bool)
    assert not hub_loop.select(nothing, confidence, 0.0, prefix_only=False).any()
