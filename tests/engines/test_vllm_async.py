"""vLLM plans a forward while the one before it runs, which is the default on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import load
from vllm import LLM
from vllm.platforms.cpu import CpuPlatform
from vllm_engine import complete, differences, num_blocks, start


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    plain = CpuPlatform.check_and_update_config.__func__

    def keeps_async_scheduling(cls: type, config: Any) -> None:
        plain(cls, config)  # switches it off, since a CPU gains nothing from it
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keeps_async_scheduling))
        yield start()


def test_scheduling_is_asynchronous(llm: LLM) -> None:
    engine: Any = llm.llm_engine
    core = engine.engine_core.engine_core
    assert core.vllm_config.scheduler_config.async_scheduling
    assert core.batch_queue_size == 2


@pytest.mark.parametrize(
    "group", ["64_spd", "threshold", "mixed", "tails", "few_tokens", "eos_first", "sampled"]
)
def test_tokens_and_forwards_stay_the_same(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []


def test_all_blocks_but_the_last_are_committed_in_forwards_of_their_own(llm: LLM) -> None:
    wanted = load("64_spd")
    num_commits = [done.cost["num_commit_forwards"] for done in complete(llm, wanted)]
    assert num_commits == [num_blocks(each) - 1 for each in wanted]
    assert (sum(num_commits), sum(each.num_forwards for each in wanted)) == (146, 654)
