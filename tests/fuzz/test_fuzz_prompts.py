"""Prompts of any type: texts, ids and messages mean one thing each, everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hostile
import numpy as np
import torch
from hypothesis import strategies as st
from oracle import attempt, fuzz, refused

from dmax import LLM, DecodingParams
from dmax.errors import InputError

PARAMS = DecodingParams(strategy="threshold", max_new_tokens=8, max_steps_per_block=4)
TEXT = "Tom has 3 apples. How many apples does Tom have?"

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
ids = st.lists(st.integers(5, 200), min_size=1, max_size=20)
anything = st.recursive(
    hostile.values(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"role": st.just("user") | inner, "content": inner})
        | st.fixed_dictionaries({"type": st.just("text") | inner, "text": inner})
    ),
    max_leaves=4,
)


def check_result(llm: LLM, outcome: Any) -> None:
    if not isinstance(outcome, InputError):
        assert all(isinstance(output.token_ids, tuple) for output in outcome)
        vocabulary = llm.model.config.vocab_size
        for output in outcome:
            assert output.prompt_token_ids
            assert all(type(token) is int for token in output.prompt_token_ids)
            assert all(0 <= token < vocabulary for token in output.prompt_token_ids)


@fuzz(140, prompt=anything)
def test_any_value_as_a_prompt(llm: LLM, prompt: Any) -> None:
    check_result(llm, attempt(lambda: llm.generate(prompt, PARAMS)))


@fuzz(50, prompts=st.lists(st.just(TEXT) | anything, min_size=1, max_size=3))
def test_one_bad_prompt_among_others(llm: LLM, prompts: list[Any]) -> None:
    outcome = attempt(lambda: llm.generate(prompts, PARAMS))
    check_result(llm, outcome)
    if not isinstance(outcome, InputError) and prompts.count(TEXT) == len(prompts):
        assert len(outcome) == len(prompts)


@fuzz(
    30, content=anything, role=st.sampled_from(("user", "system", "assistant")) | hostile.values()
)
def test_any_content_and_any_role_of_a_message(llm: LLM, content: Any, role: Any) -> None:
    message = [{"role": role, "content": content}]
    check_result(llm, attempt(lambda: llm.generate(message, PARAMS)))


FORMS: dict[str, Callable[[str], Any]] = {
    "a message": lambda text: [{"role": "user", "content": text}],
    "one part": lambda text: [{"role": "user", "content": [{"type": "text", "text": text}]}],
    "two parts": lambda text: [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": text[: len(text) // 2]},
                {"type": "text", "text": text[len(text) // 2 :]},
            ],
        }
    ],
}


@fuzz(30, text=texts, form=st.sampled_from(sorted(FORMS)))
def test_a_text_means_the_same_in_every_form(llm: LLM, text: str, form: str) -> None:
    plain = attempt(lambda: llm.encode(text))
    formed = attempt(lambda: llm.encode(FORMS[form](text)))
    assert isinstance(plain, InputError) == isinstance(formed, InputError)
    if not isinstance(plain, InputError):
        assert plain == formed


ARRAYS: dict[str, Callable[[list[int]], Any]] = {
    "a tuple": tuple,
    "an array": np.array,
    "an array of small numbers": lambda given: np.array(given, dtype=np.uint8),
    "a tensor": torch.tensor,
    "numbers of numpy": lambda given: [np.int64(each) for each in given],
}


@fuzz(30, given=ids, form=st.sampled_from(sorted(ARRAYS)))
def test_ids_mean_the_same_in_every_form(llm: LLM, given: list[int], form: str) -> None:
    outcome = attempt(lambda: llm.encode(ARRAYS[form](given)))
    assert not isinstance(outcome, InputError), str(outcome)
    assert outcome == tuple(given)
    assert all(type(token) is int for token in outcome)


INVALID: dict[str, Callable[[], Any]] = {
    "bytes are no text": lambda: b"text",
    "bytes are no ids": lambda: bytearray(b"\x05\x06"),
    "there is no prompt": lambda: None,
    "a number is no prompt": lambda: 3,
    "real numbers are no ids": lambda: [5.0, 6.0],
    "an array of real numbers is no list of ids": lambda: np.array([5.0, 6.0]),
    "truths are no ids": lambda: [True, False],
    "an array of truths is no list of ids": lambda: np.array([True, False]),
    "a matrix is no prompt of ids": lambda: [[{"role": "user", "content": np.ones((2, 2))}]],
    "an id is negative": lambda: [5, -1],
    "an id lies outside the vocabulary": lambda: [5, 10**6],
    "an id is larger than a machine word": lambda: [5, 2**64],
    "a message has no content": lambda: [{"role": "user"}],
    "a message has no role": lambda: [{"content": "text"}],
    "a content is None": lambda: [{"role": "user", "content": None}],
    "a content is a number": lambda: [{"role": "user", "content": 3}],
    "a content is bytes": lambda: [{"role": "user", "content": b"text"}],
    "a content is a mapping": lambda: [{"role": "user", "content": {"text": "a"}}],
    "a role is unknown": lambda: [{"role": "wizard", "content": "text"}],
    "a role is None": lambda: [{"role": None, "content": "text"}],
    "a role is a number": lambda: [{"role": 1, "content": "text"}],
    "a part is an image": lambda: [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}
    ],
    "a part is a text without type": lambda: [{"role": "user", "content": [{"txt": "a"}]}],
    "a part's text is None": lambda: [
        {"role": "user", "content": [{"type": "text", "text": None}]}
    ],
    "a part is a number": lambda: [{"role": "user", "content": [1]}],
    "a text holds half of a surrogate pair": lambda: "\ud800",
    "a content holds half of a surrogate pair": lambda: [{"role": "user", "content": "a\udfff"}],
    "ids and texts are mixed": lambda: [5, "text"],
    "ids and messages are mixed": lambda: [{"role": "user", "content": "a"}, 5],
    "a complex number is no id": lambda: [5, 1j],
}


@fuzz(
    45,
    reason=st.sampled_from(sorted(INVALID)),
    others=st.lists(texts, max_size=2),
    place=st.integers(0, 2),
)
def test_what_is_no_prompt_is_refused(llm: LLM, reason: str, others: list[str], place: int) -> None:
    wrong = INVALID[reason]()
    prompts: Any = [*others[:place], wrong, *others[place:]] if others else wrong
    refused(attempt(lambda: llm.generate(prompts, PARAMS)), reason)


@fuzz(10, given=ids, place=st.integers(0, 20))
def test_a_mask_in_a_prompt_is_refused(llm: LLM, given: list[int], place: int) -> None:
    mask = llm.checkpoint.special_ids.mask_token_id
    prompt = [*given[:place], mask, *given[place:]]
    refused(attempt(lambda: llm.generate(prompt, PARAMS)), "the prompt holds a mask id")
