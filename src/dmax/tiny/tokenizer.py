"""The bundled models' tokenizer: words and numbers of the word problems, bytes for all else."""

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
    """Every word, number and mark that the generator writes, also with the space before it."""
    steps = [step for group in patterns.STEPS.values() for step in group]
    forms = [form for group in patterns.FORMS_BY_OPERATION.values() for form in group]
    operators = [operator for group in patterns.OPERATORS.values() for operator in group]
    names = [name for group in patterns.NAMES.values() for name in group]
    openings = [*patterns.OPENERS, *patterns.OPENING_LEADS, *patterns.LEADS, *steps]
    sentences = [*openings, *patterns.QUESTIONS, *patterns.FORMS, *forms]
    parts = [*patterns.THINGS, *patterns.EQUALS, *operators, *patterns.ITEMS]
    people = [*patterns.NAMES, *patterns.OBJECT_PRONOUNS.values(), *names]

    found = {"\n", "####", *ROLES}
    for text in [*sentences, *parts, *people]:
        without_fields = re.sub(r"\{\w+\}", " ", text)
        for word in re.findall(r"\w+|[^\w\s]+", without_fields):
            found.add(f" {word}")
            if not word.isalnum():
                found.add(word)
    for text in [*openings, *names]:  # these may open a text
        before_fields = re.sub(r"\{\w+\}.*", "", text)
        for word in before_fields.split()[:1]:
            capitalized = word[0].upper() + word[1:]
            found |= {capitalized, f" {capitalized}"}

    largest = 2 * LARGEST_NUMBER + 1
    numbers = [f"{space}{number}" for number in range(largest + 1) for space in ("", " ")]
    return sorted(found) + numbers


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: a known word is one token, other text its bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in words():
        token = "".join(part for part, _ in whole.pre_tokenize_str(word))
        if token not in tokens:
            tokens.append(token)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
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
