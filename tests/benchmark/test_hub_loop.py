"""The readable loop under bench/ decides as the engine does."""

from __future__ import annotations

import hub_loop
import pytest
import torch

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
        completion, forwards = hub_loop.generate(
            llm.checkpoint,
            output.prompt_token_ids,
            threshold=threshold,
            soft=strategy == "spd",
            max_new_tokens=256,
        )
        assert completion == output.token_ids
        assert forwards == output.num_forwards


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
