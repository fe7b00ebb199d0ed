"""Token ids and forwards of `dmax.LLM`, inside SGLang, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import BLOCK, STRATEGIES, load
from sglang_engine import answers, differences, running


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with running() as started:
        yield started


@pytest.mark.first
def test_eight_prompts_by_spd(engine: Any) -> None:
    assert not differences(answers(engine, load("spd")), load("spd"))


@pytest.mark.parametrize("group", ["64_spd", "64_threshold"])
def test_64_prompts(engine: Any, group: str) -> None:
    wanted = load(group)
    assert len(wanted) == 64
    assert not differences(answers(engine, wanted), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_with_one_open_block(engine: Any, strategy: str) -> None:
    assert not differences(answers(engine, load(strategy)), load(strategy))


@pytest.mark.parametrize(
    "group", ["mixed", "tails", "short", "eos_first", "eos_ignored", "few_tokens", "sampled"]
)
def test_groups(engine: Any, group: str) -> None:
    assert not differences(answers(engine, load(group)), load(group))


def test_every_block_is_committed_in_a_forward_of_its_own(engine: Any) -> None:
    wanted = load("spd")
    for answer, right in zip(answers(engine, wanted), wanted, strict=True):
        start = len(right.prompt) // BLOCK * BLOCK
        end = len(right.prompt) + len(answer["output_ids"])
        commits = answer["meta_info"]["dmax_num_commit_forwards"][-1]
        assert commits == -(-(end - start) // BLOCK)


def test_a_cached_prefix_changes_nothing(engine: Any) -> None:
    # Pages are whole blocks: of the shared prompt whole blocks are read from the cache, and the
    # block that it ends in is encoded anew with what follows.
    engine.flush_cache()
    wanted = load("64_spd")[:4]
    assert not differences(answers(engine, wanted), wanted)
    again = answers(engine, wanted)
    assert not differences(again, wanted)
    hits = [answer["meta_info"]["cached_tokens"] for answer in again]
    assert hits == [len(each.prompt) // BLOCK * BLOCK for each in wanted]
    prefills = [answer["meta_info"]["dmax_num_prefill_forwards"][-1] for answer in again]
    assert prefills == [0, 0, 0, 0]


@pytest.mark.parametrize("shared", [1, 31, 32, 33, 63, 64])
def test_prompts_that_share_their_beginning(engine: Any, shared: int) -> None:
    # What the first request has left in the cache must not depend on what follows in its block.
    engine.flush_cache()
    wanted = load("64_spd")
    longest = max(wanted, key=lambda each: len(each.prompt))
    other = [*longest.prompt[:shared], *reversed(longest.prompt[shared:])]
    engine.generate(input_ids=other, sampling_params={"max_new_tokens": 64})
    assert not differences(answers(engine, [longest]), [longest])
