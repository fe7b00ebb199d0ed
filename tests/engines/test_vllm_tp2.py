"""vLLM with tensor parallelism over two processes."""

from __future__ import annotations

import pytest
from reference import load
from vllm import LLM
from vllm_engine import complete, differences, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(tensor_parallel_size=2, distributed_executor_backend="mp")


@pytest.mark.parametrize("group", ["64_spd", "threshold", "joint_threshold", "mixed", "sampled"])
def test_tokens_and_forwards_stay_the_same(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []
