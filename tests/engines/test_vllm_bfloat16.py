"""vLLM in bfloat16, where every other kernel and batch size rounds otherwise: a count."""

from __future__ import annotations

import pytest
from reference import load
from vllm import LLM
from vllm_engine import complete, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(dtype="bfloat16")


@pytest.mark.parametrize("strategy", ["spd", "threshold"])
def test_as_few_completions_differ_as_in_our_own_engine_at_another_batch_size(
    llm: LLM, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = load(f"bfloat16_{strategy}")
    done = complete(llm, wanted)
    alone = load(f"alone_{strategy}")
    num_other = sum(a.token_ids != b.token_ids for a, b in zip(wanted, done, strict=True))
    num_own = sum(a.token_ids != b.token_ids for a, b in zip(wanted, alone, strict=True))
    with capsys.disabled():
        print(  # noqa: T201  # the counts are the result
            f"\n{strategy} in bfloat16: {num_other} of {len(wanted)} completions have other tokens "
            f"than dmax.LLM's; {num_own} of its own have, one at a time"
        )
    assert num_other <= num_own + len(wanted) // 8
