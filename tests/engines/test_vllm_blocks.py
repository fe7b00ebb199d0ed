"""vLLM decodes as `dmax.LLM` does: strategies, ends of prompts and completions, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import STRATEGIES, Wanted, load, texts
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm_engine import complete, differences, sampling_params, start

GROUPS = "mixed tails short eos_first eos_ignored few_tokens sampled 64_threshold".split()
REFUSED = {
    "needs 2 open blocks": {"dmax_strategy": "mbd"},
    "needs 4 open blocks": {"dmax_strategy": "d2f"},
    "branches of a block": {"dmax_strategy": "lopa"},
    "needs hidden states": {"dmax_strategy": "demask", "dmax_head": "tiny-base"},
    "unknown strategy": {"dmax_strategy": "soft"},
    "no option `dmax_treshold`": {"dmax_treshold": 0.5},
    "no option `dmax_alpha`": {"dmax_strategy": "threshold", "dmax_alpha": 0.5},
    "between 0 and 1": {"dmax_threshold": 1.5},
}
"""A part of the sentence, and the options that it answers."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    return start()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.first] * (name == "spd")) for name in STRATEGIES]
)
def test_a_strategy_gives_the_same_tokens_in_as_many_forwards(llm: LLM, name: str) -> None:
    wanted = load(name)
    assert differences(wanted, complete(llm, wanted)) == []


def test_64_prompts_whose_blocks_are_committed_along_with_the_next_ones(llm: LLM) -> None:
    wanted = load("64_spd")
    done = complete(llm, wanted)
    assert len(done) == 64
    assert differences(wanted, done) == []
    assert [each.text for each in done] == [each.text for each in wanted]
    assert [each.cost["num_commit_forwards"] for each in done] == [0] * 64


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_requests(llm: LLM, group: str) -> None:
    wanted = load(group)
    assert differences(wanted, complete(llm, wanted)) == []


def test_a_checkpoint_that_names_its_strategy_needs_no_options(llm: LLM) -> None:
    wanted = load("spd")
    assert differences(wanted, complete(llm, wanted, extra_args=None)) == []


def test_one_at_a_time_and_all_at_once_are_alike(llm: LLM) -> None:
    wanted = load("mixed")[:6]
    alone = [complete(llm, [each])[0] for each in wanted]
    assert differences(wanted, alone) == []


def test_what_cannot_be_decoded_is_refused_and_the_engine_goes_on(llm: LLM) -> None:
    (wanted,) = load("spd")[:1]
    for sentence, options in REFUSED.items():
        asked = SamplingParams(max_tokens=8, temperature=0, extra_args=options)
        with pytest.raises(VLLMValidationError, match=sentence) as refusal:
            llm.generate([{"prompt_token_ids": list(wanted.prompt)}], asked, use_tqdm=False)
        assert "\n" not in str(refusal.value)
    assert differences([wanted], complete(llm, [wanted])) == []


def test_a_cancelled_request_frees_its_slot_and_harms_no_other(llm: LLM) -> None:
    engine: Any = llm.llm_engine
    wanted = load("threshold")
    for index, each in enumerate(wanted):
        prompt = {"prompt_token_ids": list(each.prompt)}
        engine.add_request(f"cancel-{index}", prompt, sampling_params(each))
    for _ in range(6):
        engine.step()
    cancelled = ("cancel-1", "cancel-3", "cancel-6")  # two that run, and one that waits
    engine.abort_request(list(cancelled))
    finished: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        finished |= {each.request_id: each for each in engine.step() if each.finished}
    kept = [index for index in range(len(wanted)) if f"cancel-{index}" not in cancelled]
    assert finished.keys() >= {f"cancel-{index}" for index in kept}
    for index in kept:
        ids = tuple(finished[f"cancel-{index}"].outputs[0].token_ids)
        assert ids[: len(wanted[index].token_ids)] == wanted[index].token_ids
    assert engine.get_num_unfinished_requests() == 0
    assert differences(wanted, complete(llm, wanted)) == []


def test_logprobs_come_with_the_same_tokens(llm: LLM) -> None:
    wanted: list[Wanted] = load("spd")[:4]
    prompts = [{"prompt_token_ids": list(each.prompt)} for each in wanted]
    asked = [sampling_params(each, logprobs=2) for each in wanted]
    for ours, output in zip(wanted, llm.generate(prompts, asked, use_tqdm=False), strict=True):
        (completion,) = output.outputs
        assert tuple(completion.token_ids)[: len(ours.token_ids)] == ours.token_ids
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        for token, choices in zip(completion.token_ids, completion.logprobs, strict=True):
            assert token in choices and len(choices) >= 2
            assert all(choice.logprob <= 0 for choice in choices.values())


def test_stop_texts_end_a_completion(llm: LLM) -> None:
    (wanted,) = load("spd")[1:2]
    stop = wanted.text.split()[5]
    (done,) = complete(llm, [wanted], stop=[stop])
    assert done.finish_reason == "stop"
    assert done.text == wanted.text[: wanted.text.index(stop)]


def test_texts_are_decoded_as_chat_messages(llm: LLM) -> None:
    wanted = load("spd")[:4]
    chats = [[{"role": "user", "content": text}] for text in texts()[:4]]
    asked = [sampling_params(each) for each in wanted]
    for ours, output in zip(wanted, llm.chat(chats, asked, use_tqdm=False), strict=True):
        assert tuple(output.prompt_token_ids or ()) == ours.prompt
        assert output.outputs[0].text == ours.text
