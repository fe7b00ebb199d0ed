"""The bundled models' tokenizer: whole words and whole numbers of the word problems, bytes for everything else."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dmax.tasks import word_problem_patterns as patterns
from dmax.tasks.word_problems import LARGEST_NUMBER

MASK = "<|mask|>"
EOS = "<|endoftext|>"
ROLE_OPEN = "<role>"
ROLE_CLOSE = "</role>"
ROLE_END = "<|role_end|>"
ROLES = ("HUMAN", "ASSISTANT", "SYSTEM")
CHAT_TEMPLATE = (
    "{% set roles = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} %}"
    "{% for message in messages %}"
    "<role>{{ roles[message['role']] }}</role>{{ message['content'] }}<|role_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def words() -> list[str]:
    """Every word, number and punctuation mark that the generator can write, with its leading space where it has one."""
    openings = (
        *patterns.OPENERS,
        *patterns.OPENING_LEADS,
        *patterns.LEADS,
        *(step for steps in patterns.STEPS.values() for step in steps),
    )
    forms = (
        *patterns.FORMS,
        *(form for forms in patterns.FORMS_BY_OPERATION.values() for form in forms),
    )
    operators = (operator for choices in patterns.OPERATORS.values() for operator in choices)
    sentences = (
        *openings,
        *patterns.QUESTIONS,
        *forms,
        *patterns.THINGS,
        *patterns.EQUALS,
        *operators,
    )
    names = [name for group in patterns.NAMES.values() for name in group]
    found = {"\n", "####", *ROLES}
    for text in (
        *sentences,
        *patterns.NAMES,
        *patterns.OBJECT_PRONOUNS.values(),
        *patterns.ITEMS,
        *names,
    ):
        for word in re.findall(r"\w+|[^\w\s]+", re.sub(r"\{\w+\}", " ", text)):
            found |= {f" {word}", word} if not word.isalnum() else {f" {word}"}
    for text in (*openings, *names):  # sentences that may open a text
        first = re.sub(r"\{\w+\}.*", "", text).split()[:1]
        found |= {word[0].upper() + word[1:] for word in first} | {
            f" {word[0].upper()}{word[1:]}" for word in first
        }
    numbers = [
        f"{space}{number}" for number in range(2 * LARGEST_NUMBER + 2) for space in ("", " ")
    ]
    return sorted(found) + numbers


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: a known word is one token, any other text its bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in words():
        piece = "".join(
            part
            for part, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)
        )
        if piece not in tokens:
            tokens.append(piece)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": [ROLE_OPEN, ROLE_CLOSE, ROLE_END]})
    fast.chat_template = CHAT_TEMPLATE
    return fast
