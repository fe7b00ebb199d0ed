"""vLLM without room for the keys and values of all requests: some are preempted and begin again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import BLOCK, load
from vllm import LLM
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_engine import complete, start

NUM_PREEMPTIONS = 32


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
        block_size=BLOCK,
        enable_prefix_caching=True,
        max_model_len=256,
        num_gpu_blocks_override=10,
    )


@pytest.mark.parametrize("group", ["64_spd", "mixed", "sampled"])
def test_tokens_stay_the_same_and_no_forward_is_hidden(
    llm: LLM, preempted: list[str], group: str
) -> None:
    wanted = load(group)
    before = len(preempted)
    done = complete(llm, wanted)
    assert [each.token_ids for each in done] == [each.token_ids for each in wanted]
    # An open block is lost with its request and decoded again, which costs its forwards again.
    more = [
        theirs.cost["num_forwards"] - ours.num_forwards
        for ours, theirs in zip(wanted, done, strict=True)
    ]
    assert min(more) == 0
    assert sum(each > 0 for each in more) <= len(preempted) - before


def test_there_were_32_preemptions(llm: LLM, preempted: list[str]) -> None:
    wanted = load("threshold")
    while len(preempted) < NUM_PREEMPTIONS:
        before = len(preempted)
        done = complete(llm, wanted)
        assert [each.token_ids for each in done] == [each.token_ids for each in wanted]
        assert len(preempted) > before, "the cache is too large for this case"
