"""Arithmetic word problems with worked answers, drawn from a seed: the task of the bundled models.

A problem is a chain of 4 to 8 dependent steps, longer than a small network can follow in one pass.
Every sentence of its answer is worded by several independent choices, so that tokens decided
together must agree. Both make deciding many tokens at once as hard as it is in real text.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import Literal, get_args

from dmax.errors import InputError, did_you_mean
from dmax.tasks import Example
from dmax.tasks.word_problem_patterns import (
    EQUALS,
    FORMS,
    FORMS_BY_OPERATION,
    ITEMS,
    LEADS,
    NAMES,
    OBJECT_PRONOUNS,
    OPENERS,
    OPENING_LEADS,
    OPERATORS,
    QUESTIONS,
    STEPS,
    THINGS,
)

Split = Literal["train", "test"]
LARGEST_NUMBER = 99  # the bundled tokenizer has a token for every number up to twice this
MIN_WORDS = 60  # words and punctuation marks of an answer: tokens of the bundled tokenizer
MIN_WORDS_PER_STEP = 15  # all that an answer of fewer than 4 steps needs
PREFERENCE = 1.8  # how much likelier each wording is than the next


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A question with its worked response.

    Attributes:
        question: the story, and what is asked.
        response: the steps, worked out in sentences, and the closing line `#### N`.
        answer: the number N.
        start: the value before the first step.
        steps: operation and operand of each step.
    """

    question: str
    response: str
    answer: int
    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def num_steps(self) -> int:
        """Length of the chain."""
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class Numbers:
    """How large the numbers get.

    Attributes:
        largest: of all values along the chain.
        largest_operand: of the numbers that are added or taken away.
    """

    largest: int = 30
    largest_operand: int = 6

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers too small for a chain, or too large for a token."""
        if not (20 <= self.largest <= LARGEST_NUMBER and 2 <= self.largest_operand <= self.largest):
            raise InputError(
                f"numbers must satisfy 20 <= largest <= {LARGEST_NUMBER} and "
                "2 <= largest_operand <= largest, "
                f"got {self.largest} and {self.largest_operand}"
            )


def generate(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    min_steps: int = 4,
    max_steps: int = 8,
    numbers: Numbers | None = None,
) -> WordProblem:
    """Problem number `index` of a seed: a pure function of its arguments.

    One chain in ten is for testing and never appears in training, whatever the seed. A hash of
    start, operations and operands chooses it.

    Raises:
        InputError: an unknown split, or an empty range of steps.
    """
    if split not in get_args(Split):
        choices = get_args(Split)
        raise InputError(
            f"`split` must be one of {', '.join(choices)}, got {split!r}",
            did_you_mean(split, choices),
        )
    if not 1 <= min_steps <= max_steps:
        raise InputError(
            f"steps must satisfy 1 <= min_steps <= max_steps, got {min_steps} and {max_steps}"
        )
    rng = random.Random(f"{seed}/{index}/{split}/{min_steps}/{max_steps}")
    while True:
        num_steps = rng.randint(min_steps, max_steps)
        start, steps = _draw_chain(rng, num_steps, numbers or Numbers())
        if split_of(start, steps) == split:
            return _tell(rng, start, steps)


def problems(
    num: int,
    *,
    seed: int = 0,
    split: Split = "train",
    min_steps: int = 4,
    max_steps: int = 8,
    numbers: Numbers | None = None,
) -> Iterator[WordProblem]:
    """The first `num` problems of a seed with distinct questions."""
    seen: set[str] = set()
    index = 0
    while len(seen) < num:
        problem = generate(
            seed, index, split, min_steps=min_steps, max_steps=max_steps, numbers=numbers
        )
        index += 1
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def split_of(start: int, steps: tuple[tuple[str, int], ...]) -> Split:
    """The split that a chain belongs to, the same for all seeds and machines."""
    digest = hashlib.blake2b(f"{start}{steps}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def apply_step(value: int, operation: str, operand: int) -> int:
    """The value after one step of a chain, in which every division is exact."""
    results = {
        "+": value + operand,
        "-": value - operand,
        "*": value * operand,
        "/": value // operand,
    }
    return results[operation]


def _draw_chain(
    rng: random.Random, num_steps: int, numbers: Numbers
) -> tuple[int, tuple[tuple[str, int], ...]]:
    largest = numbers.largest
    operands = range(2, numbers.largest_operand + 1)
    start = rng.randint(4, min(40, largest - 10))
    value = start
    steps = []
    for _ in range(num_steps):
        choices = {
            "+": [n for n in operands if value + n <= largest],
            "-": [n for n in operands if value - n >= 1],
            "*": [n for n in (2, 3, 4) if value * n <= largest],
            "/": [n for n in (2, 3, 4) if value % n == 0 and value > n],
        }
        weights = {"+": 3, "-": 3, "*": 2, "/": 2}
        feasible = [operation for operation, fitting in choices.items() if fitting]
        operation = rng.choices(feasible, [weights[operation] for operation in feasible])[0]
        operand = rng.choice(choices[operation])
        steps.append((operation, operand))
        value = apply_step(value, operation, operand)
    return start, tuple(steps)


def _tell(rng: random.Random, start: int, steps: tuple[tuple[str, int], ...]) -> WordProblem:
    pronoun = rng.choice(sorted(NAMES))
    words = {"name": rng.choice(NAMES[pronoun]), "items": rng.choice(ITEMS)}
    story = [rng.choice(OPENERS).format(a=start, **words)]
    story += [
        _capitalized(rng.choice(STEPS[operation]).format(b=operand, **words))
        for operation, operand in steps
    ]
    story.append(rng.choice(QUESTIONS).format(**words))
    while True:
        response = " ".join(_work_out(rng, pronoun, words, start, steps))
        answer = reduce(lambda value, step: apply_step(value, *step), steps, start)
        response = f"{response}\n#### {answer}"
        if count_words(response) >= min(MIN_WORDS, MIN_WORDS_PER_STEP * len(steps)):
            return WordProblem(" ".join(story), response, answer, start, steps)


def _work_out(
    rng: random.Random,
    pronoun: str,
    words: dict[str, str],
    start: int,
    steps: tuple[tuple[str, int], ...],
) -> Iterator[str]:
    a = start
    lead = None
    form = None
    for operation, b in steps:
        c = apply_step(a, operation, b)
        lead = _prefer(rng, OPENING_LEADS if lead is None else LEADS, unlike=lead)
        form = _prefer(rng, _interleaved(FORMS, FORMS_BY_OPERATION[operation]), unlike=form)
        clause = form.format(
            a=a,
            b=b,
            c=c,
            op=_prefer(rng, OPERATORS[operation]),
            eq=_prefer(rng, EQUALS),
            owner=_prefer(rng, (pronoun, words["name"])),
            whom=_prefer(rng, (OBJECT_PRONOUNS[pronoun], words["name"])),
            items=words["items"],
            things=_prefer(rng, THINGS).format(items=words["items"]),
        )
        yield f"{lead} {clause}"
        a = c


def _prefer(rng: random.Random, choices: Sequence[str], *, unlike: str | None = None) -> str:
    """A choice other than `unlike`.

    As with words in real text, some are likelier: each is `PREFERENCE` times as likely as the next.
    """
    left = [choice for choice in choices if choice != unlike]
    weights = [PREFERENCE**-rank for rank in range(len(left))]
    return rng.choices(left, weights)[0]


def _interleaved(general: Sequence[str], special: Sequence[str]) -> list[str]:
    """One of each in turn, and what is left of the longer one."""
    return [form for pair in zip_longest(general, special) for form in pair if form is not None]


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def count_words(text: str) -> int:
    """Words, numbers, punctuation marks and line breaks of a text."""
    return len(re.findall(r"\w+|\n|[^\w\s]+", text))


def extract_answer(text: str) -> int | None:
    """The number of the closing line `#### N`; None if the text does not end with one."""
    closing_line = r"^#### (-?[0-9]{1,18})\s*\Z"  # int() refuses thousands of digits
    match = re.search(closing_line, text, flags=re.MULTILINE)
    return int(match.group(1)) if match else None


def score(text: str, answer: int | str) -> bool:
    """Whether a text ends with the line `#### N` of the right answer; nothing else in it counts."""
    return extract_answer(text) == int(answer)


class WordProblems:
    """The task `word_problems`: unseen chains, scored by the exact final answer."""

    name = "word_problems"
    max_new_tokens = 256
    steps = (4, 8)
    numbers = Numbers()

    def examples(self, limit: int, seed: int) -> list[Example]:
        """The first `limit` test problems of a seed."""
        return [
            Example(problem.question, str(problem.answer), problem.response)
            for problem in self.problems(limit, seed, "test")
        ]

    @classmethod
    def problems(cls, num: int, seed: int, split: Split) -> Iterator[WordProblem]:
        """The first `num` problems of a seed, as long and with such numbers as the task has."""
        low, high = cls.steps
        return problems(
            num, seed=seed, split=split, min_steps=low, max_steps=high, numbers=cls.numbers
        )

    def extract(self, text: str) -> str | None:
        """The number of the closing line; None without such a line."""
        answer = extract_answer(text)
        return None if answer is None else str(answer)

    def score(self, text: str, example: Example) -> bool:
        """Whether the text ends with the right answer."""
        return score(text, example.answer)


class ShortWordProblems(WordProblems):
    """The task `short_word_problems`: two steps, and no number above 20."""

    name = "short_word_problems"
    max_new_tokens = 80
    steps = (2, 2)
    numbers = Numbers(largest=20, largest_operand=6)
