"""vLLM under pressure: prompts read in chunks, prefixes shared, requests preempted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import load
from vllm import LLM
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_engine import complete, differences, start

CHUNK = 65  # two blocks and a token that is of no use


@pytest.fixture(scope="module")
def preempted() -> Iterator[list[str]]:
    """The requests that were preempted so far."""
    found: list[str] = []
    plain = Scheduler._preempt_request

    def told(self: Any, request: Any, *rest: Any, **more: Any) -> Any:
        found.append(request.request_id)
        return plain(self, request, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_preempt_request", told)
        yield found


@pytest.fixture(scope="module")
def llm(preempted: list[str]) -> LLM:
    return start(
        block_size=32,
        max_model_len=256,
        max_num_batched_tokens=CHUNK,
        num_gpu_blocks_override=10,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
    )


@pytest.mark.parametrize("group", ["spd", "threshold", "64_spd", "mixed", "tails", "sampled"])
def test_tokens_and_forwards_stay_the_same(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []


def test_prefixes_are_shared_in_whole_blocks(llm: LLM) -> None:
    wanted = load("spd")[:1]
    complete(llm, wanted)
    done = complete(llm, wanted)
    assert done[0].num_cached > 0
    assert done[0].num_cached % 32 == 0
    assert differences(wanted, done) == []


def test_there_were_32_preemptions(llm: LLM, preempted: list[str]) -> None:
    wanted = load("64_threshold")
    while len(preempted) < 32:
        before = len(preempted)
        assert differences(wanted, complete(llm, wanted)) == []
        assert len(preempted) > before, "the cache is too large for this case"
