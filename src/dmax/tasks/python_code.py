"""Tasks whose answer is a Python function: `mbpp` (sanitized), `humaneval` and their plus variants.

Prompts are those of the published evaluation, zero-shot. As there, the first fenced block of a
completion counts, and only its imports and definitions. They run in the sandbox, against the tests
of the row.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from dmax.sandbox import check, run_python
from dmax.tasks import Example
from dmax.tasks.data import Benchmark, DatasetRow, HubDataset

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py")  # what may stand after the fence of a block that counts
START_OF_CODE = re.compile(r"(?:from [\w.]+ import |import \w|(?:async )?def \w|class \w|@\w)")
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DELIMITERS = (
    "Please enclose your code within delimiters as follows:\n```python\n# YOUR CODE HERE\n```\n\n"
)
# Tests of the plus sets import numpy for one comparison and for the names of its types. The sandbox
# has only the standard library, so this stands for numpy there. Candidates return no arrays.
NUMPY = """
import sys, types

def allclose(a, b, rtol=1e-05, atol=1e-08):
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(allclose(x, y, rtol, atol) for x, y in zip(a, b))
    return a == b or abs(a - b) <= atol + rtol * abs(b)

sys.modules["numpy"] = types.SimpleNamespace(
    allclose=allclose, ndarray=(), float64=float, float32=float
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeProblem(Example):
    """An example that a program answers; `answer` is a solution.

    Attributes:
        tests: program that calls a solution and fails if it is wrong.
        names: what the tests take from a solution. With a stub it is the one function asked for.
        setup: program that runs before the tests.
        stub: start of a program that a solution completes: imports, helpers and signature. It may
            be empty.
    """

    tests: str
    names: tuple[str, ...]
    setup: str = ""
    stub: str = ""


def extract_code(text: str) -> str | None:
    """The code of a completion; None if it holds nothing.

    It is the first Python block. Without one it is what can be read as code, else the whole text.
    """
    blocks = [code for language, code in FENCE.findall(text) if language.lower() in PYTHON]
    code = blocks[0] if blocks else _without_prose(text)
    return code.strip("\n").rstrip() or None


def _without_prose(text: str) -> str:
    """From the first line that starts like code to the last line with which it still parses."""
    lines = text.split("\n")
    start = next((index for index, line in enumerate(lines) if START_OF_CODE.match(line)), None)
    if start is None:
        return text
    for end in range(len(lines), start, -1):
        code = "\n".join(lines[start:end])
        if parse(code):
            return code
    return text


def parse(code: str) -> ast.Module | None:
    """The tree of a program; None if it is no Python, holds null bytes, or is nested too deeply."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the completion's own faults
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def definitions(code: str) -> str:
    """Imports, definitions and constants of a program, without calls, prints and tests beside them.

    A program that cannot be read, or has none of them, is given back as it stands.
    """
    tree = parse(code)
    if tree is None:
        return code
    kept = [node for node in tree.body if _is_definition(node)]
    try:
        return "\n\n".join(ast.unparse(node) for node in kept) or code
    except (RecursionError, ValueError):  # a sum of 1,000 terms, or an integer of 5,000 digits
        return code


def _is_definition(node: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class, or a constant.

    Constants stay because three of MBPP's own solutions need one. One that reads input does not.
    """
    if isinstance(node, ast.Assign | ast.AnnAssign):
        names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        return "input" not in names
    return isinstance(node, KEPT)


def defined(code: str) -> set[str]:
    """Names of the functions and classes that a program defines; empty if it cannot be read."""
    tree = parse(code)
    if tree is None:
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def used(code: str) -> set[str]:
    """Names that a program reads anywhere; empty if it cannot be read."""
    tree = parse(code)
    if tree is None:
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def complete(code: str, stub: str, entry_point: str) -> str:
    """A program from a stub and a completion that repeats its signature or gives only the body.

    The stub stands first in both cases: its imports and helpers are part of the problem.
    """
    if entry_point in defined(code):
        return f"{stub}\n\n{definitions(code)}"
    return f"{stub}\n{textwrap.indent(textwrap.dedent(code), '    ')}"


def passes(program: str, problem: CodeProblem) -> bool:
    """Whether a program passes the tests of a problem, in the sandbox."""
    return check(program, problem.tests, names=problem.names, setup=problem.setup).passed


class CodeBenchmark(Benchmark):
    """A benchmark whose answers run against tests."""

    def __init__(self, data: Path | None = None) -> None:
        run_python("")  # raises `InputError` where foreign code cannot be isolated
        super().__init__(data)

    @abstractmethod
    def example(self, row: DatasetRow) -> CodeProblem:
        """The problem of a row; raises `InputError` if the row has none."""

    def extract(self, text: str) -> str | None:
        """The code of a completion; None if it holds nothing."""
        return extract_code(text)

    def score(self, text: str, example: Example) -> bool:
        """Whether the code of a completion passes the tests of the problem."""
        assert isinstance(example, CodeProblem), "the examples of this task are problems"
        code = extract_code(text)
        if code is None:
            return False
        if example.stub:
            program = complete(code, example.stub, entry_point=example.names[0])
        else:
            program = definitions(code)
        return passes(program, example)


class Mbpp(CodeBenchmark):
    """The task `mbpp`: all 427 problems of the sanitized set."""

    name = "mbpp"
    hub = HubDataset("google-research-datasets/mbpp", "sanitized", "prompt+train+validation+test")
    setup = ""

    def example(self, row: DatasetRow) -> CodeProblem:
        """A row has `prompt`, `code` and `test_list`; it may have `test_imports`."""
        text = row.text("prompt")
        solution = row.text("code")
        shown = row.texts("test_list")
        if not shown:
            raise row.wrong("`test_list` is missing or empty")
        tests = self.tests(row, shown)
        names = tuple(sorted(defined(solution) & used(tests) - defined(tests)))
        if not names:
            raise row.wrong("the tests use nothing that `code` defines")
        prompt = (
            f"You are an expert Python programmer, and here is your task: {text} "
            "Your code should pass these tests:\n\n" + "\n".join(shown) + f"\n\n{DELIMITERS}"
        )
        return CodeProblem(
            prompt, solution, _fenced(solution), tests=tests, names=names, setup=self.setup
        )

    def tests(self, row: DatasetRow, shown: list[str]) -> str:
        """The tests that count: those shown in the prompt."""
        return "\n".join([*row.texts("test_imports"), *shown])


class MbppPlus(Mbpp):
    """The task `mbpp_plus`: 378 problems, the prompt of `mbpp`, many more tests."""

    name = "mbpp_plus"
    hub = HubDataset("evalplus/mbppplus", None, "test")
    setup = NUMPY

    def tests(self, row: DatasetRow, shown: list[str]) -> str:
        """The tests that count: the program `test`, not only those shown."""
        return row.text("test")


class HumanEval(CodeBenchmark):
    """The task `humaneval`: 164 problems, asked as instructions."""

    name = "humaneval"
    hub = HubDataset("openai/openai_humaneval", None, "test")
    setup = ""

    def example(self, row: DatasetRow) -> CodeProblem:
        """A row has `prompt`, `entry_point`, `canonical_solution`, and a `test` with `check`."""
        stub = row.text("prompt")
        name = row.text("entry_point")
        solution = row.text("canonical_solution")
        if name not in defined(stub):
            raise row.wrong(f"`prompt` is no Python that defines its `entry_point` `{name}`")
        prompt = (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{stub}\n```\n\n{DELIMITERS}"
        )
        tests = f"{row.text('test')}\ncheck({name})"
        setup = f"{stub}\n{self.setup}"  # tests use helpers of the stub
        program = stub + solution
        return CodeProblem(
            prompt, program, _fenced(program), tests=tests, names=(name,), setup=setup, stub=stub
        )


class HumanEvalPlus(HumanEval):
    """The task `humaneval_plus`: the same problems with many more tests."""

    name = "humaneval_plus"
    hub = HubDataset("evalplus/humanevalplus", None, "test")
    setup = NUMPY


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
