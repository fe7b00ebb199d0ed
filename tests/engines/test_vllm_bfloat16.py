"""vLLM in bfloat16, whose products round otherwise than torch's: differences are counted."""

from __future__ import annotations

import pytest
from reference import load
from vllm import LLM
from vllm_engine import complete, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(dtype="bfloat16")


@pytest.mark.parametrize("group", ["bfloat16_spd", "bfloat16_threshold"])
def test_most_completions_are_the_same(
    llm: LLM, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = load(group)
    done = complete(llm, wanted)
    pairs = list(zip(wanted, done, strict=True))
    num_other = sum(ours.token_ids != theirs.token_ids for ours, theirs in pairs)
    num_longer = sum(ours.num_forwards != theirs.cost["num_forwards"] for ours, theirs in pairs)
    with capsys.disabled():
        print(  # noqa: T201  # the count is the result
            f"\n{group}: {num_other} of {len(pairs)} completions have other tokens, "
            f"{num_longer} another number of forwards"
        )
    assert num_other <= len(pairs) // 4
