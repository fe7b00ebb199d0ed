"""Token ids and forwards of `dmax.LLM` inside SGLang with tensor parallelism: two processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import load
from sglang_engine import answers, differences, running


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # A rank for each core; SGLang refuses more ranks than there are groups of cores.
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        with running(tp_size=2) as started:
            yield started


@pytest.mark.parametrize(
    "group", ["64_spd", "64_threshold", "joint_threshold", "iter_smooth", "mixed", "sampled"]
)
def test_groups(engine: Any, group: str) -> None:
    assert not differences(answers(engine, load(group)), load(group))


def test_requests_without_a_seed_are_sampled_alike_on_all_ranks(engine: Any) -> None:
    # If the ranks disagreed on a token, the next forward would mix two texts.
    prompts = [list(each.prompt) for each in load("spd")]
    found = engine.generate(input_ids=prompts, sampling_params={"temperature": 0.6})
    assert all(answer["meta_info"]["finish_reason"]["type"] == "stop" for answer in found)
    assert all("####" in answer["text"] for answer in found)
