"""What a completion marks as its answer: boxes, and phrases such as "The final answer is"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from dmax.tasks.maths import until_closed

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# The phrases in the order in which they are looked for, whatever their order in a text.
TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.IGNORECASE | re.DOTALL)
FINAL_ANSWER = re.compile(r"final answer\s*[:：]\s*(.*?)(?=\n\s*\n|$)", re.IGNORECASE | re.DOTALL)
THE_FINAL_ANSWER_IS = re.compile(
    r"the final answer is\s*(.*?)(?:\.?\s*I hope it is correct\.?|$)", re.IGNORECASE | re.DOTALL
)
ANSWER_LINE = re.compile(r"^\s*answer\s*[:：]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
PHRASES = (TAG, FINAL_ANSWER, THE_FINAL_ANSWER_IS, ANSWER_LINE)


def marked(text: str, patterns: Iterable[re.Pattern[str]]) -> list[tuple[int, str]]:
    """Where each phrase with an answer ends, and the answer, one pattern after the other."""
    found = (match for pattern in patterns for match in pattern.finditer(text))
    return [(match.end(), match[1].strip()) for match in found if match[1].strip()]


def boxes(text: str) -> list[tuple[int, str]]:
    r"""Where each closed `\boxed{…}` or `\fbox{…}` ends, and what it holds if it holds anything."""
    return list(_boxes(text))


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while box := BOX.search(text, start):
        content = until_closed(text[box.end() :])
        start = box.end() + len(content) + (1 if content else 0)  # a box within it is no other
        if content.strip():
            yield start, content.strip()


def distinct(texts: Iterable[str]) -> list[str]:
    """Texts that are not empty, each where it stands first."""
    return [text for text in dict.fromkeys(texts) if text]
