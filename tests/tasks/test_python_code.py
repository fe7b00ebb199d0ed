"""Programming tasks: published prompts, the code in a completion, completions scored by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dmax.errors import InputError
from dmax.sandbox import KINDS, works
from dmax.tasks import Task, get_task
from dmax.tasks.python_code import NUMPY, CodeProblem, complete, definitions, extract_code

pytestmark = pytest.mark.skipif(
    not any(map(works, KINDS)), reason="no isolation for foreign code works here"
)

MBPP = {
    "source_file": "by hand",
    "task_id": 1,
    "prompt": "Write a function to double a number.",
    "code": "def double(x):\n  return x * 2 ",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == 4", "assert math.isnan(double(math.nan))"],
}
STUB = (
    "from typing import List\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
    "def halves(xs: List[int]) -> List[int]:\n"
    '    """ Half of each.\n    >>> halves([4])\n    [2]\n    """\n'
)
HUMANEVAL = {
    "task_id": "HumanEval/1",
    "prompt": STUB,
    "entry_point": "halves",
    "canonical_solution": "    return [half(x) for x in xs]\n",
    "test": (
        "\n\nMETADATA = {}\n\n\n"
        "def check(candidate):\n    assert candidate([4, 2]) == [half(4), 1]\n"
    ),
}


def task_of(folder: Path, name: str, *rows: dict[str, Any]) -> Task:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return get_task(name, path)


# --- prompts and rows -----------------------------------------------------------------------------


def test_mbpp_asks_as_published(tmp_path: Path) -> None:
    task = task_of(tmp_path, "mbpp", MBPP)
    [example] = task.examples(5, seed=0)
    assert example.prompt == (
        "You are an expert Python programmer, and here is your task: "
        "Write a function to double a number. Your code should pass these tests:\n\n"
        "assert double(2) == 4\nassert math.isnan(double(math.nan))\n\n"
        "Please enclose your code within delimiters as follows:\n"
        "```python\n# YOUR CODE HERE\n```\n\n"
    )
    assert example.answer == MBPP["code"]
    assert task.max_new_tokens == 2048


def test_humaneval_asks_as_published(tmp_path: Path) -> None:
    [example] = task_of(tmp_path, "humaneval", HUMANEVAL).examples(5, seed=0)
    assert example.prompt == (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{STUB}\n```\n\n"
        "Please enclose your code within delimiters as follows:\n"
        "```python\n# YOUR CODE HERE\n```\n\n"
    )


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mbpp", MBPP),
        ("mbpp", {**MBPP, "test_imports": None, "test_list": ["assert double(2) == 4"]}),
        ("mbpp_plus", {**MBPP, "test": "for n in range(9):\n    assert double(n) == n + n"}),
        ("humaneval", HUMANEVAL),
        ("humaneval_plus", HUMANEVAL),
    ],
)
def test_reference_solutions_pass(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    task = task_of(tmp_path, name, row)
    [example] = task.examples(1, seed=0)
    assert example.reference is not None
    assert task.score(example.reference, example)
    assert not task.score("", example)


def test_plus_tests_count_and_those_shown_are_not_enough(tmp_path: Path) -> None:
    row = {
        **MBPP,
        "test_list": ["assert double(2) == 4"],
        "test": "assert double(2) == 4\nassert double(3) == 6",
    }
    by_luck = "```python\ndef double(x):\n    return x ** 2\n```"
    for name, verdict in (("mbpp", True), ("mbpp_plus", False)):
        task = task_of(tmp_path, name, row)
        [example] = task.examples(1, seed=0)
        assert "double(3)" not in example.prompt
        assert task.score(by_luck, example) is verdict


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("mbpp", {**MBPP, "test_list": []}, "`test_list` is missing or empty"),
        (
            "mbpp",
            {**MBPP, "test_list": "assert True"},
            "`test_list` must be a list of texts, got 'assert True'",
        ),
        ("mbpp", {**MBPP, "test_list": [1]}, "`test_list` must be a list of texts, got [1]"),
        ("mbpp", {**MBPP, "prompt": ""}, "`prompt` is empty"),
        ("mbpp_plus", MBPP, "`test` is missing"),
        (
            "mbpp",
            {**MBPP, "code": "def twice(x):\n    return 2 * x"},
            "the tests use nothing that `code` defines",
        ),
        ("mbpp", {**MBPP, "code": "def double(x:"}, "the tests use nothing that `code` defines"),
        (
            "humaneval",
            {**HUMANEVAL, "entry_point": "thirds"},
            "`prompt` is no Python that defines its `entry_point`",
        ),
        (
            "humaneval",
            {**HUMANEVAL, "prompt": "def halves("},
            "`prompt` is no Python that defines its `entry_point`",
        ),
        (
            "humaneval",
            {key: HUMANEVAL[key] for key in ("prompt", "entry_point")},
            "`canonical_solution` is missing",
        ),
        ("humaneval_plus", {**HUMANEVAL, "test": None}, "`test` is missing"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(
    tmp_path: Path, name: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        task_of(tmp_path, name, row)
    assert caught.value.message.startswith(f"{tmp_path / 'rows.jsonl'}:1: {reason}")


# --- the code in a completion ---------------------------------------------------------------------

CODE = "def f(x):\n    return x"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{CODE}\n```",
        f"Here it is:\n\n```python\n{CODE}\n```\nIt returns x.",
        f"```\n{CODE}\n```",
        f"```py\n{CODE}\n\n```",
        f"```Python3 title=f\n{CODE}\n```",
        f"```python\n{CODE}",  # never closed
        f"```python\n{CODE}\n```\nOr shorter:\n```python\nf = lambda x: x\n```",
        f"```bash\npip install x\n```\n```python\n{CODE}\n```",
        CODE,
        f"\n{CODE}\n",
        f"The function:\n\n{CODE}\n\nThis returns its argument.",
        f"Sure.\n{CODE}",
    ],
)
def test_the_code_is_found(text: str) -> None:
    assert extract_code(text) == CODE


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", None),
        (" \n", None),
        ("```python\n```", None),
        ("I do not know.", "I do not know."),
        ("import duties are high", "import duties are high"),
        ("    return x", "    return x"),
        ("```python\n    return x\n```", "    return x"),
        (
            f"from math import pi\n\n@cache\n{CODE}\nThat is all.",
            f"from math import pi\n\n@cache\n{CODE}",
        ),
    ],
)
def test_what_else_may_come(text: str, code: str | None) -> None:
    assert extract_code(text) == code


def test_definitions_leave_out_what_runs_beside_them() -> None:
    code = (
        "import math\nLIMIT = 3\nsize: int = 4\nx = input()\n"
        "@staticmethod\ndef f(x):\n    print(x)\n    return x\n"
        "class A:\n    pass\n"
        "print(f(2))\nassert f(2) == 3\nif __name__ == '__main__':\n    input()\n"
    )
    kept = definitions(code)
    assert [line for line in kept.split("\n") if line and not line.startswith(" ")] == (
        ["import math", "LIMIT = 3", "size: int = 4", "@staticmethod", "def f(x):", "class A:"]
    )
    assert definitions("print(1)") == "print(1)"
    assert definitions("def f(:") == "def f(:"


@pytest.mark.parametrize(
    "code",
    ["x = " + " + ".join(["1"] * 20_000), "x = " + "(" * 5000, "x = '\0'", "x = 0x" + "f" * 5000],
)
def test_code_that_no_parser_survives_is_run_as_it_stands(code: str) -> None:
    assert definitions(code) == code


def test_a_completion_gives_the_body_or_repeats_the_signature() -> None:
    body = complete("return [half(x) for x in xs]", STUB, "halves")
    assert body == f"{STUB}\n    return [half(x) for x in xs]"
    assert complete("    return [half(x) for x in xs]", STUB, "halves") == body
    assert complete("def halves(xs):\n    return 1", STUB, "halves").startswith(STUB)


# --- completions scored by hand -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("```python\ndef double(x):\n    return x + x\n```", True),
        ("Use addition:\n```python\ndef double(x):\n    return x + x\n```\nDone.", True),
        ("def double(x):\n    return x + x", True),
        # Its own test is not run.
        ("```python\ndef double(x):\n    return x + x\n\nassert double(2) == 5\n```", True),
        (
            "```python\nn = int(input())\ndef double(x):\n    return x + x\nprint(double(n))\n```",
            True,
        ),
        # Constants are kept, unlike as published.
        ("```python\nFACTOR = 2\ndef double(x):\n    return FACTOR * x\n```", True),
        # There is nothing to read.
        ("```python\ndef double(x):\n    return 2 * int(input())\n```", False),
        (
            "```python\ndef double(x):\n    return 2\n```\n"
            "```python\ndef double(x):\n    return x + x\n```",
            False,
        ),
        ("```python\ndef twice(x):\n    return x + x\n```", False),
        ("```python\ndef double(x):\n    return x + \n```", False),
        ("```python\ndef double(x):\n    return x +", False),
        ("Double it by adding it to itself.", False),
        ("```python\nraise SystemError\n```", False),
        ("", False),
    ],
)
def test_mbpp_scored_by_hand(tmp_path: Path, text: str, verdict: bool) -> None:
    task = task_of(tmp_path, "mbpp", MBPP)
    [example] = task.examples(1, seed=0)
    assert task.score(text, example) is verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (f"```python\n{STUB}    return [half(x) for x in xs]\n```", True),
        (
            "```python\ndef halves(xs: List[int]) -> List[int]:\n"
            "    return [x // 2 for x in xs]\n```",
            True,
        ),
        ("```python\n    return [half(x) for x in xs]\n```", True),
        ("    return [half(x) for x in xs]", True),
        ("return [half(x) for x in xs]", True),
        ("    out = []\n    for x in xs:\n        out.append(half(x))\n    return out\n", True),
        ("```python\ndef halves(xs):\n    return xs\n```", False),
        ("```python\ndef solve(xs):\n    return [x // 2 for x in xs]\n```", False),
        ("    pass", False),
        ("Each number is halved.", False),
        ("", False),
    ],
)
def test_humaneval_scored_by_hand(tmp_path: Path, text: str, verdict: bool) -> None:
    task = task_of(tmp_path, "humaneval", HUMANEVAL)
    [example] = task.examples(1, seed=0)
    assert task.score(text, example) is verdict


def test_a_problem_knows_its_tests_and_its_stub(tmp_path: Path) -> None:
    [problem] = task_of(tmp_path, "humaneval", HUMANEVAL).examples(1, seed=0)
    assert isinstance(problem, CodeProblem)
    assert (problem.stub, problem.names) == (STUB, ("halves",))
    assert problem.setup.startswith(STUB)
    assert problem.tests.endswith("\ncheck(halves)")


def test_a_function_may_have_the_name_of_a_builtin(tmp_path: Path) -> None:
    row = {
        **MBPP,
        "code": "def sum(a, b):\n    return a + b",
        "test_list": ["assert sum(1, 2) == 3"],
    }
    task = task_of(tmp_path, "mbpp", row)
    [problem] = task.examples(1, seed=0)
    assert isinstance(problem, CodeProblem)
    assert problem.names == ("sum",)
    assert task.score("def sum(a, b):\n    return b + a", problem)


PLUS = """
import numpy as np

def is_floats(x):
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return isinstance(x, float)

for given, expected in (({given}, {expected}),):
    found = double(given)
    is_close = is_floats(expected) and np.allclose(found, expected, rtol=1e-07, atol=1e-06)
    assert found == expected or is_close
"""


@pytest.mark.parametrize(
    ("given", "expected", "verdict"),
    [
        ("2", "4", True),
        ("2", "5", False),
        ("0.1", "0.2000001", True),
        ("0.1", "0.21", False),
        ("'a'", "2.0", False),
    ],
)
def test_plus_tests_compare_numbers_without_numpy(
    tmp_path: Path, given: str, expected: str, verdict: bool
) -> None:
    tests = PLUS.replace("{given}", given).replace("{expected}", expected)
    task = task_of(tmp_path, "mbpp_plus", {**MBPP, "test": tests})
    [example] = task.examples(1, seed=0)
    assert example.reference is not None
    assert task.score(example.reference, example) is verdict


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("[1.0, (2.0,)]", "[1.0, (2.0 + 1e-9,)]", True),
        ("[1.0]", "[1.0, 2.0]", False),
        ("[1.0, 2.0]", "[1.0, 2.1]", False),
        ("float('inf')", "float('inf')", True),
        ("float('nan')", "float('nan')", False),
        ("[]", "[]", True),
    ],
)
def test_what_stands_for_numpy_compares_as_numpy_does(
    a: str, b: str, verdict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands for numpy is gone after the test.
    monkeypatch.setitem(sys.modules, "numpy", sys.modules["numpy"])
    exec(NUMPY, namespace := {})  # type: ignore[var-annotated]
    assert eval(f"allclose({a}, {b}, rtol=1e-07, atol=1e-06)", namespace) is verdict
