"""The published scoring of `gsm8k` and `asdiv`: right if either of two numbers is.

The numbers are the first two distinct ones of, in this order:

1. the last number of each of the last three phrases that mark an answer, the last phrase first,
2. the last number of the last box,
3. the last number of each of the last five lines, the last line first,
4. the last number of the last eight lines.

Passages that take something back ("wrong", "incorrect", …) are passed over. A completion that is
full of them has no numbers at all, unless its end marks an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from dmax.tasks import Example
from dmax.tasks.published.marks import PHRASES, boxes, marked

NUM_ANSWERS = 2
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")  # a minus always belongs to the number
HASHES = re.compile(r"####\s*([^\n]+)")
MARKS = (HASHES, *PHRASES)
DRESS = re.compile(r"\*\*|__|\\(?:boxed|fbox)\{|\\[()\[\]]|[}$,`]")  # bold, boxes, math, thousands
TAKEN_BACK = re.compile(
    r"\b(?:wrong|incorrect|false|typo|glitch|stuck|loop(?:ing)?|malfunction|give up|system error"
    r"|not right|confusing)\b",
    re.IGNORECASE,
)
GIVEN_UP = ("i give up", "system error", "malfunction", "i'm stuck", "glitch")
HESITATIONS = "wait wrong incorrect false glitch stuck loop malfunction".split()
HESITATIONS += ["system error", "give up"]
END = 250  # characters in which a lost completion may still mark its answer


def is_correct(text: str, example: Example) -> bool:
    """Whether either of the two numbers is the gold one."""
    return gold_number(example) in answers(text)[:NUM_ANSWERS]


def gold_number(example: Example) -> Fraction | None:
    """The last number of the answer as the row has it, or of its last marked phrase."""
    answer = example.reference or example.answer
    phrases = [phrase for _, phrase in marked(answer, MARKS)]
    return last_number(phrases[-1] if phrases else answer)


def answers(text: str) -> list[Fraction]:
    """The distinct numbers that a completion may mean as its answer, the likeliest first."""
    text = text.strip()
    if is_lost(text) and not ends_with_an_answer(text):
        return []
    numbers = (last_number(passage) for passage in _passages(text) if not is_unsure(passage))
    return list(dict.fromkeys(number for number in numbers if number is not None))


def _passages(text: str) -> Iterator[str]:
    """Where the number is looked for, in this order."""
    phrases = [phrase for _, phrase in marked(text, MARKS)]
    yield from reversed(phrases[-3:])
    yield from [content for _, content in boxes(text)][-1:]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    yield from reversed(lines[-5:])
    yield "\n".join(lines[-8:])


def last_number(text: str) -> Fraction | None:
    """The last number of a text, without currency signs and commas; None if there is none."""
    numbers = NUMBER.findall(DRESS.sub("", text))
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Fraction | None:
    numerator, _, denominator = number.partition("/")
    try:
        return Fraction(Decimal(numerator)) / int(denominator or 1)
    except (ArithmeticError, ValueError):  # int() refuses thousands of digits
        return None


def is_unsure(passage: str) -> bool:
    """Whether a passage takes something back."""
    lower = passage.lower()
    is_doubted = " no" in lower or "wrong" in lower or "incorrect" in lower
    return bool(
        TAKEN_BACK.search(lower)
        or lower.count("wait") >= 2
        or (lower.count("?") >= 2 and is_doubted)
    )


def is_lost(text: str) -> bool:
    """Whether a completion gives up, or takes back so much that it says nothing."""
    lower = text.lower()
    if any(phrase in lower for phrase in GIVEN_UP):
        return True
    num_wrong = sum(lower.count(word) for word in ("wrong", "incorrect", "false"))
    if lower.count("wait") >= 3 and num_wrong >= 1:
        return True
    return sum(lower.count(word) for word in HESITATIONS) >= 8


def ends_with_an_answer(text: str) -> bool:
    """Whether the end of a completion marks an answer and takes nothing back."""
    end = text[-END:]
    return not is_unsure(end) and bool(marked(end, MARKS) or boxes(end))
