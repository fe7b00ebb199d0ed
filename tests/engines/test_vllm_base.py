"""vLLM with a checkpoint that names no strategy, as LLaDA-2.x's do not."""

from __future__ import annotations

import pytest
from reference import load
from vllm import LLM
from vllm_engine import complete, differences, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(
        "tiny-base",
        additional_config={"dmax_strategy": "joint_threshold"},
        hf_overrides={"decoding_strategy": None},  # it names one, which would come first
    )


@pytest.mark.parametrize("group", ["base_joint_threshold", "base_learn2pd", "base_threshold"])
def test_a_request_chooses_its_strategy(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []


def test_the_server_chooses_where_the_request_does_not(llm: LLM) -> None:
    wanted = load("base_joint_threshold")
    assert differences(wanted, complete(llm, wanted, extra_args=None)) == []
