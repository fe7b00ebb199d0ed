"""The process of `dmax.tasks.equality`: reads questions and writes `true` or `false`, line by line.

A question is `[gold, answer]`, or `{"golds": […], "answers": […]}` for the published scoring.

It is a script that is run by its path. It imports nothing of this package, since that would take
longer than importing math-verify.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from functools import lru_cache
from itertools import product
from typing import Any

# What sympy is given to read: numbers, operators, letters. Its parser runs what it reads.
ARITHMETIC = re.compile(r"(?:(?>\d+(?:\.\d+)?)|[\s+*/()-]|\b(?:pi|sqrt|[a-zA-Z])\b)+")


def serve() -> None:
    """Say that math-verify is there, or why not; then answer line by line until the input ends."""
    # Whatever the parsers print is no reply, so it goes to stderr.
    replies = sys.stdout
    sys.stdout = sys.stderr
    try:
        import math_verify  # noqa: F401  # it is loaded before the first question
    except ImportError as error:
        print(json.dumps(str(error)), file=replies, flush=True)
        return
    logging.disable()
    print(json.dumps(None), file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        is_equal = _equal_any(**question) if isinstance(question, dict) else _equal(*question)
        print(json.dumps(is_equal), file=replies, flush=True)


def _equal(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    gold, answer = (parse(f"\\boxed{{{text}}}") for text in (gold, answer))
    return bool(verify(gold, answer))


def _equal_any(golds: list[str], answers: list[str]) -> bool:
    pairs = list(product(golds, answers))
    as_arithmetic = (_equal_as_arithmetic(*pair) for pair in pairs)
    as_formulas = (_equal_as_formulas(*pair) for pair in pairs)
    return any(as_arithmetic) or any(as_formulas)


def _equal_as_arithmetic(gold: str, answer: str) -> bool:
    """Whether sympy reads both and their difference is 0."""
    import sympy

    values = [_arithmetic(text) for text in (gold, answer)]
    if None in values:
        return False
    try:
        return bool(sympy.simplify(values[0] - values[1]) == 0)
    # sympy raises all kinds of errors for what cannot be subtracted or simplified.
    except Exception:
        return False


@lru_cache(maxsize=1000)
def _arithmetic(text: str) -> Any:
    """What sympy reads; None if it is no plain arithmetic."""
    import sympy

    text = text.replace(r"\pi", "pi").replace(r"\cdot", "*").replace("^", "**")
    text = re.sub(r"(.*)%", r"(\1)/100", text.translate(str.maketrans("{}", "()")))
    if not ARITHMETIC.fullmatch(text):
        return None
    try:
        return sympy.sympify(text)
    # sympy raises all kinds of errors for what it cannot read.
    except Exception:
        return None


def _equal_as_formulas(gold: str, answer: str) -> bool:
    """Whether math-verify finds formulas in both, as they stand or between dollars, and equal."""
    from math_verify import verify

    spellings = product(*((text, f"${text}$") for text in (gold, answer)))
    return any(verify(*map(_formula, pair)) for pair in spellings)


@lru_cache(maxsize=1000)
def _formula(text: str) -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(text, extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()])


if __name__ == "__main__":
    serve()
