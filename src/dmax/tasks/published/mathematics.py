r"""The published scoring of `math500` and `minerva_algebra`: right if any of ten answers is.

The answers are, in this order:

1. the last phrase that marks an answer, if little stands after it,
2. the last box, if little stands after it,
3. the last formula between dollars or brackets within the last 800 characters,
4. each of the last three lines, and what stands after its last `=`,
5. the whole completion if it is short.

Each of them is compared with each gold answer as a text, by sympy as arithmetic, and by
math-verify as a formula. math-verify finds numbers in sentences, so a line counts that only
mentions the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from dmax.tasks import Example
from dmax.tasks.equality import equal_any
from dmax.tasks.published.marks import PHRASES, boxes, distinct, marked

NUM_ANSWERS = 10
TAIL = 800  # characters in which formulas and lines are looked for
SHORT = 200  # characters of a completion that may as a whole be the answer
SUFFIX = 20  # letters and digits after which a mark is not the end of a completion
HASHES = re.compile(r"^\s*####\s*(.+?)\s*$", re.MULTILINE)
MARKS = (*PHRASES, HASHES)
FORMULAS = (
    re.compile(r"\$\$(.*?)\$\$", re.DOTALL),
    re.compile(r"\\\[(.*?)\\\]", re.DOTALL),
    re.compile(r"\\\((.*?)\\\)", re.DOTALL),
    re.compile(r"(?<!\$)\$(?!\$)(.+?)(?<!\$)\$(?!\$)", re.DOTALL),
)
WRAPPERS = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
COMMANDS = re.compile(r"\\(?:boxed|fbox|text|mathrm|textbf)\s*\{(.*)\}", re.DOTALL)
PREFIX = re.compile(
    r"^\s*(?:####|<answer>|(?:final )?answer\s*[:：]|the final answer is)\s*", re.IGNORECASE
)
POSTFIX = re.compile(r"\s*(?:</answer>|I hope it is correct\.?)\s*$", re.IGNORECASE)
SPELLINGS = {
    **{"−": "-", "×": "*", "÷": "/", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\%": "%"},
    **dict.fromkeys(("**", "__", r"\left", r"\right", r"\!", r"\,", r"\;"), ""),
}
ENDS = " \n\t\r,.;:!。；，`"
# Units and filling words that the normalisation of Minerva (arXiv 2206.14858) removes.
WORDS = (
    "square ways integers dollars mph inches ft hours km units points feet minutes digits cents "
    "degrees cm gm pounds meters meals edges students multiples"
).split()
FILLING = [*WORDS, "$", '"', "{,}", r"\ ", r"\text{}", r"^\circ", r"^{\circ}", r"\dots", r"\ldots"]
TEXTS = re.compile(r"\\(?:text|textbf|mbox|overline)\{(.*?)\}")


def is_correct(text: str, example: Example) -> bool:
    """Whether any answer of a completion equals any gold one."""
    found = answers(text)
    gold = gold_answers(example.answer)
    plain = {normalized(answer) for answer in found} - {""}
    return not plain.isdisjoint(map(normalized, gold)) or equal_any(gold, found)


def gold_answers(answer: str) -> list[str]:
    """The gold answer, its formulas, and what stands after its last `=`."""
    parts = [answer, *_formulas(answer), *_of_line(answer)]
    return distinct(map(bare, parts))


def answers(text: str) -> list[str]:
    """What a completion may mean as its answer."""
    text = text.strip()
    return distinct(map(bare, _passages(text)))[:NUM_ANSWERS] or distinct([bare(text)])


def _passages(text: str) -> Iterator[str]:
    yield from _at_the_end(marked(text, MARKS), text)
    yield from _at_the_end(boxes(text), text)
    tail = text[-TAIL:]
    yield from _formulas(tail)[-1:]
    lines = [line for line in tail.splitlines() if line.strip()]
    for line in reversed(lines[-3:]):
        yield from _of_line(line)
    if len(text) <= SHORT:
        yield text


def _at_the_end(found: Iterable[tuple[int, str]], text: str) -> list[str]:
    """The passage that ends last, if little stands after it; at most one."""
    end, passage = max(found, default=(0, ""), key=lambda each: each[0])
    num_after = sum(mark.isalnum() or mark == "\\" for mark in text[end:])
    return [passage] if passage and num_after < SUFFIX else []


def _formulas(text: str) -> list[str]:
    return [formula for pattern in FORMULAS for formula in pattern.findall(text)]


def _of_line(line: str) -> list[str]:
    """A line without its bullet, and what stands after its last `=`."""
    line = line.strip().lstrip("-*").strip()
    return [line, line.rpartition("=")[2]] if "=" in line else [line]


def bare(answer: str) -> str:
    """An answer without what announces and wraps it, in the usual spelling; empty for none."""
    answer = POSTFIX.sub("", PREFIX.sub("", answer.strip()))
    for spelling, usual in SPELLINGS.items():
        answer = answer.replace(spelling, usual)
    before = None
    while answer != before:
        before = answer
        answer = _unwrapped(answer).strip(ENDS)
    return "" if answer.lower() in ("answer", "final answer") else " ".join(answer.split())


def _unwrapped(answer: str) -> str:
    """An answer without one pair of delimiters, or one command, that holds all of it."""
    for opening, closing in WRAPPERS:
        if len(answer) > len(opening + closing) - 1 and _is_wrapped(answer, opening, closing):
            return answer[len(opening) : -len(closing)]
    command = COMMANDS.fullmatch(answer)
    return command[1] if command and _is_closed(command[1]) else answer


def _is_wrapped(answer: str, opening: str, closing: str) -> bool:
    return answer.startswith(opening) and answer.endswith(closing)


def _is_closed(text: str) -> bool:
    """Whether no brace of a text closes one that was opened before it."""
    depth = 0
    for mark in text:
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0:
            return False
    return depth == 0


def normalized(answer: str) -> str:
    """An answer as it is compared as a text: without articles, units, signs and spaces."""
    answer = answer.rpartition("=")[2]
    answer = TEXTS.sub(r"\1", answer)
    answer = re.sub(r"\ban? ", "", answer)
    for filling in FILLING:
        answer = answer.replace(filling, "")
    answer = answer.replace(r"\{", "{").replace(r"\}", "}").replace(" ", "").strip(ENDS)
    is_grouped = answer.replace(",", "").isdigit()
    return answer.replace(",", "") if is_grouped else answer
