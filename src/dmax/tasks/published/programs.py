"""The published scoring of `humaneval` and `mbpp`: pass@1 of the definitions of the first block.

The first fenced block counts, or the whole completion without one. Of a program that can be read,
only imports, functions and classes are kept; constants are not. It runs as it stands: the start of
a HumanEval problem does not stand before it, so a completion fails that leaves out a helper of the
tests, or gives only the body.
"""

from __future__ import annotations

import ast
import re

from dmax.sandbox import check
from dmax.tasks import Example
from dmax.tasks.python_code import KEPT, CodeProblem, defined, parse, used

BLOCK = re.compile(r"```(?:python)?\n(.*?)\n```", re.DOTALL)
OPENED = re.compile(r"```(?:python)?\s*(.*?)\s*(?:```|$)", re.DOTALL)  # never closed, or inline


def is_correct(text: str, example: Example) -> bool:
    """Whether the program of a completion passes the tests of its problem, in the sandbox."""
    assert isinstance(example, CodeProblem), "the examples of this task are problems"
    code = program(text)
    names = {*example.names, *(used(example.tests) & defined(code))} - defined(example.tests)
    return check(code, example.tests, names=sorted(names)).passed


def program(text: str) -> str:
    """What runs of a completion."""
    found = BLOCK.search(text) or OPENED.search(text)
    code = (found[1] if found else text).strip().replace("\\_", "_")
    tree = parse(code)
    kept = [node for node in tree.body if isinstance(node, KEPT)] if tree else []
    try:
        return "\n\n".join(map(ast.unparse, kept)) or code
    except (RecursionError, ValueError):  # a sum of 1,000 terms, or an integer of 5,000 digits
        return code
