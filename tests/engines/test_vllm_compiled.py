"""vLLM with `torch.compile`, which takes a C++ compiler."""

from __future__ import annotations

import pytest
from reference import load
from vllm import LLM
from vllm_engine import complete, differences, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(enforce_eager=False)


@pytest.mark.parametrize("group", ["spd", "threshold"])
def test_tokens_and_forwards_stay_the_same(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []
