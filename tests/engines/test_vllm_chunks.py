"""vLLM reads prompts in chunks, and shares the keys and values of prefixes."""

from __future__ import annotations

import pytest
from reference import BLOCK, load
from vllm import LLM
from vllm_engine import complete, differences, start

CHUNK = 65  # two blocks, and a token that is of no use


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(
        block_size=BLOCK,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        max_num_batched_tokens=CHUNK,
    )


@pytest.mark.parametrize("group", ["spd", "threshold", "mixed", "tails", "sampled"])
def test_tokens_and_forwards_stay_the_same(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []


def test_prefixes_are_shared_in_whole_blocks(llm: LLM) -> None:
    wanted = load("spd")
    complete(llm, wanted)
    done = complete(llm, wanted)
    assert all(each.num_cached % BLOCK == 0 for each in done)
    assert sum(each.num_cached for each in done) >= 8 * BLOCK
    assert differences(wanted, done) == []
