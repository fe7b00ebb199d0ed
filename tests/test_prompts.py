"""Prompts of every form become token ids, and what is none is refused before anything is computed.

Chat templates are programs of strangers: they fail, hang and write without end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_llm import folder_fixture  # noqa: F401  (fixture)

from dmax.chat_template import render_chat
from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.errors import InputError
from dmax.prompts import encode_prompt, split_prompts
from dmax.tiny.tokenizer import build_tokenizer

IDS = (5, 6, 7)


@pytest.fixture(scope="module", name="checkpoint")
def checkpoint_fixture(folder: Path) -> Checkpoint:
    return load_checkpoint(folder, dtype=torch.float32, device="cpu")


def with_template(checkpoint: Checkpoint, template: Any) -> Checkpoint:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return replace(checkpoint, tokenizer=tokenizer)


# ---- token ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        deque([5, 6, 7]),
        np.array([5, 6, 7]),
        np.array([5, 6, 7], dtype=np.uint8),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int16),
        list(np.array([5, 6, 7])),
        list(torch.tensor([5, 6, 7])),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_come_in_every_form(checkpoint: Checkpoint, prompt: Any) -> None:
    ids = encode_prompt(prompt, checkpoint)
    assert ids == IDS
    assert {type(token) for token in ids} == {int}
    assert len(split_prompts(prompt)) == 1


@pytest.mark.parametrize("prompts", [np.array([IDS, IDS]), torch.tensor([IDS, IDS])])
def test_two_dimensions_are_several_prompts(checkpoint: Checkpoint, prompts: Any) -> None:
    assert [encode_prompt(each, checkpoint) for each in split_prompts(prompts)] == [IDS, IDS]


@pytest.mark.parametrize(
    "prompt",
    [
        b"567",
        bytearray(b"567"),
        memoryview(b"567"),
        [5.0, 6.0],
        [True, False],
        [5, None],
        [5, "6"],
        [[5, 6], [7]],
        np.array([5.0]),
        np.array([True]),
        np.array([[5]]),
        np.array(5),
        np.array(["a"]),
        torch.tensor([5.0]),
        torch.tensor([True]),
        torch.tensor([[5]]),
        torch.tensor(5),
        [torch.tensor([5])],
        {5, 6},
        {"input_ids": [5]},
        iter([5]),
        None,
        5,
        object(),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_what_is_no_prompt_is_refused_in_one_sentence(checkpoint: Checkpoint, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt 3 must be a text, a list of token ids") as error:
        encode_prompt(prompt, checkpoint, "prompt 3")
    assert len(error.value.message) < 320
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("prompts", "hint"),
    [
        (b"a", "decode the bytes to a text"),
        ({"input_ids": [1]}, "pass its `input_ids`"),
        (iter(["a"]), "make a list of it"),
        ({"role": "user", "content": "a"}, "a message stands in a list"),
        (None, None),
        (np.array(3), "[N] is one prompt"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "[N] is one prompt"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(prompts: Any, hint: str | None) -> None:
    with pytest.raises(InputError) as error:
        split_prompts(prompts)
    assert (error.value.hint or "").startswith(hint or "")


@pytest.mark.parametrize("mark", ["<|mask|>", "Hi <|mask|> there"])
def test_a_mask_in_a_prompt_is_refused(checkpoint: Checkpoint, mark: str) -> None:
    mask = checkpoint.special_ids.mask_token_id
    for prompt in ([5, mask], np.array([mask]), mark, [{"role": "user", "content": mark}]):
        with pytest.raises(InputError, match=f"holds the mask token {mask}"):
            encode_prompt(prompt, checkpoint)


# ---- texts and messages --------------------------------------------------------------------------


def test_messages_and_their_parts_are_the_same_prompt(checkpoint: Checkpoint) -> None:
    parts = [{"type": "text", "text": "Tom has "}, {"type": "text", "text": "3 apples."}]
    ids = encode_prompt("Tom has 3 apples.", checkpoint)
    assert encode_prompt([{"role": "user", "content": "Tom has 3 apples."}], checkpoint) == ids
    assert encode_prompt([{"role": "user", "content": parts}], checkpoint) == ids


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "robot", "content": "a"},
        {"role": "user", "content": "\ud800"},
    ],
)
def test_messages_that_cannot_be_read_are_named(checkpoint: Checkpoint, message: Any) -> None:
    with pytest.raises(InputError, match=r"^prompt 2: .*message 1"):
        encode_prompt([message], checkpoint, "prompt 2")


def test_half_a_surrogate_pair_is_refused_with_and_without_a_template(
    checkpoint: Checkpoint,
) -> None:
    for each in (checkpoint, with_template(checkpoint, None)):
        with pytest.raises(InputError, match="half of a surrogate pair"):
            encode_prompt("a\udc80", each)


def test_any_other_character_is_encoded(checkpoint: Checkpoint) -> None:
    text = "a\x00\x1b\u202e\U0001f600\n"
    assert text in checkpoint.tokenizer.decode(encode_prompt(text, checkpoint))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 20_000_000,
        [{"role": "user", "content": "x" * 20_000_000}],
        [{"role": "user", "content": ""}] * 1_000_000,
        range(10**12),
        np.zeros(10**7, dtype=np.int8),
    ],
    ids=["text", "message", "messages", "range", "array"],
)
def test_what_cannot_fit_is_refused_before_it_is_encoded(
    checkpoint: Checkpoint, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("render_chat", "encode_text"):
        monkeypatch.setattr(f"dmax.chat_template.{name}", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(InputError, match="there is room for"):
        encode_prompt(prompt, checkpoint)


def test_a_tokenizer_that_cannot_encode_is_said(checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"a": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(InputError, match="tokenizer of this checkpoint cannot encode the text"):
        encode_prompt("b", replace(checkpoint, tokenizer=tokenizer))


# ---- chat templates ------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}<{{ message['role'] }}>{{ message.content }}{% endfor %}",
        "{%- for m in messages %}{{ '<' + m.role + '>' + m.content | trim }}{%- endfor %}",
        {"default": "<user>{{ messages[0].content }}", "tool_use": "x"},
    ],
)
def test_templates_are_rendered_as_transformers_does(checkpoint: Checkpoint, template: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, CHAT, 100) == expected == "<user>Hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ 'x'.ljust(10**10) }}", "too much memory"),
        ("{{ '%10000000000d' | format(3) }}", "too much memory"),
        (
            "{% set n = namespace(x='x') %}"
            "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "too much memory",
        ),
        ("{{ 'x' * 10**6 }}", "it writes 1000000 characters"),
        ("{% for i in range(10**10) %}{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "too long",
        ),
        ("{{ 10**(10**9) % 7 }}", "too long"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('no\nsystem') }}", r"no\\nsystem"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|SecurityError"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{% if 3 < 'a' %}{% endif %}", "not supported"),
        ("{% include 'other' %}", "no loader"),
        ("{{", "unexpected 'end of template'"),
        ("{% if 1 %}" * 9000, "recursion"),
        ("x" * 1000, "it writes 1000 characters"),
        ("x" * 200_000, "has 200000 characters"),
        ({"tool_use": "x"}, "no usable chat template"),
        (3, "no usable chat template"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_template_that_fails_is_refused_in_one_sentence(template: Any, reason: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=reason) as error:
        render_chat(tokenizer, CHAT, 500)
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400


def test_a_template_cannot_make_a_text_that_no_tokenizer_takes(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        encode_prompt("a", with_template(checkpoint, "{{ '\ud800' }}"))
