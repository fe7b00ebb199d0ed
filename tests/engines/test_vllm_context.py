"""vLLM with a short context: completions reach its last position, and no further."""

from __future__ import annotations

import pytest
from reference import CONTEXT, load
from vllm import LLM
from vllm.exceptions import VLLMValidationError
from vllm_engine import complete, differences, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start(max_model_len=CONTEXT, max_num_batched_tokens=CONTEXT)


@pytest.mark.parametrize("asked", [None, CONTEXT, 10_000])
def test_a_completion_ends_at_the_last_position_of_the_context(llm: LLM, asked: int | None) -> None:
    wanted = load("context")
    done = complete(llm, wanted, max_tokens=asked)
    assert [len(each.prompt) + len(each.token_ids) for each in wanted] == [CONTEXT] * len(wanted)
    assert differences(wanted, done) == []


def test_a_prompt_may_leave_room_for_one_token_and_not_for_none(llm: LLM) -> None:
    (longest,) = [each for each in load("context") if len(each.prompt) == 1]
    full = [*longest.prompt, *longest.token_ids]
    assert len(full) == CONTEXT
    outputs = llm.generate([{"prompt_token_ids": full[:-1]}], use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 1
    with pytest.raises(VLLMValidationError, match=str(CONTEXT)):
        llm.generate([{"prompt_token_ids": full}], use_tqdm=False)
