"""The bundled tokenizer: whole words and numbers, any text back to itself, a save keeps all."""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dmax.tasks import word_problem_patterns as patterns
from dmax.tasks.word_problems import problems
from dmax.tiny.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    # Special tokens spelled out in a text are special tokens; everything else is its bytes.
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_the_vocabulary_stays_what_the_bundled_models_learned() -> None:
    tokens = sorted(TOKENIZER.get_vocab().items(), key=lambda entry: entry[1])
    assert [index for _, index in tokens] == list(range(len(TOKENIZER)))
    assert len(TOKENIZER) == 981
    assert hashlib.sha1(repr(tokens).encode()).hexdigest()[:10] == "e03a376edb"


def test_numbers_are_whole_tokens() -> None:
    for number in range(200):
        assert len(TOKENIZER.encode(f" {number}")) == 1
        assert len(TOKENIZER.encode(f"{number}")) == 1


def test_generated_texts_need_no_bytes() -> None:
    alphabet = {token for token in TOKENIZER.get_vocab() if len(token) == 1} - {
        "A",
        "Ċ",
        ",",
        ".",
        "?",
        "+",
        "-",
    }
    for problem in problems(1000, seed=4):
        for text in (problem.question, problem.response):
            assert not alphabet & set(TOKENIZER.tokenize(text)), text


def test_no_pattern_needs_bytes() -> None:
    # Independent of what a sample happens to contain: every pattern, name, item and choice of
    # words.
    openings = (*patterns.OPENERS, *(step for steps in patterns.STEPS.values() for step in steps))
    forms = (
        *patterns.FORMS,
        *(form for forms in patterns.FORMS_BY_OPERATION.values() for form in forms),
    )
    operators = [word for choices in patterns.OPERATORS.values() for word in choices]
    fill = {
        "a": 12,
        "b": 3,
        "c": 36,
        "op": "plus",
        "eq": "is",
        "owner": "he",
        "whom": "him",
        "things": "of them",
    }
    people = [
        (name, patterns.OBJECT_PRONOUNS[word])
        for word, names in patterns.NAMES.items()
        for name in names
    ]
    texts = [
        f"{lead} {form}".format(name="Tom", items="toys", **fill)
        for lead in patterns.LEADS
        for form in forms
    ]
    for (name, whom), items in product(people, patterns.ITEMS):
        texts.append(f"{name} has 1 {items}, {whom} {name}.")
    for operator, equals, things in product(operators, patterns.EQUALS, patterns.THINGS):
        texts.append(
            f"First he has 1 {operator} 2 which {equals} 3 {things.format(items='toys')}, she"
        )
    for first, second in product(openings, (*openings, *patterns.QUESTIONS)):
        pair = [sentence.format(name="Tom", items="toys", **fill) for sentence in (first, second)]
        texts.append(" ".join(sentence[0].upper() + sentence[1:] for sentence in pair))
    for text in texts:
        pieces = TOKENIZER.tokenize(text)
        words = [
            piece for piece, _ in TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ]
        assert pieces == words, text  # one token each, so none fell to bytes


def test_encoding_adds_nothing() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode(" 7") == [TOKENIZER.convert_tokens_to_ids("Ġ7")]


def test_each_part_of_the_chat_frame_is_one_token() -> None:
    assert TOKENIZER.eos_token_id == TOKENIZER.pad_token_id
    specials = ["<|mask|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>"]
    assert set(TOKENIZER.all_special_tokens) == set(specials)
    for token in (*specials, "HUMAN", "ASSISTANT", "SYSTEM"):
        assert TOKENIZER.tokenize(token) == [token]
    messages = [{"role": role, "content": "7"} for role in ("user", "assistant", "user")]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    human, assistant = (f"<role>{role}</role>7<|role_end|>" for role in ("HUMAN", "ASSISTANT"))
    assert text == human + assistant + human
    assert len(TOKENIZER.encode(text)) == 5 * len(messages)


def test_a_save_keeps_ids_and_template(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Tom has 3 apples."},
    ]
    for tokenizer in (TOKENIZER, loaded):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == (
            "<role>SYSTEM</role>s<|role_end|><role>HUMAN</role>Tom has 3 apples.<|role_end|>"
            "<role>ASSISTANT</role>"
        )
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded, name) == getattr(TOKENIZER, name) is not None
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.all_special_ids == TOKENIZER.all_special_ids
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.encode("Tom has 3 apples.") == TOKENIZER.encode("Tom has 3 apples.")
    assert loaded.eos_token_id == loaded.pad_token_id
