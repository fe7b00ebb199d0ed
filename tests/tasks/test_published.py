"""The strict and the published scoring side by side, on completions scored by hand.

Each case says what both have to find, and why where they differ.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

from dmax.errors import InputError
from dmax.sandbox import KINDS, works
from dmax.tasks import Example
from dmax.tasks.equality import equal
from dmax.tasks.maths import WordProblemBenchmark, last_box
from dmax.tasks.published import mathematics, programs, published_scorer, word_problems
from dmax.tasks.published.marks import boxes
from dmax.tasks.python_code import CodeProblem, HumanEval, Mbpp

RIGHT, WRONG = True, False


# --- word problems: gsm8k, asdiv ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "strict", "published"),
    [
        ("3 + 4 = 7 figs.\n#### 7", "7", RIGHT, RIGHT),
        ("3 + 4 = 8 figs.\n#### 8", "7", WRONG, WRONG),
        ("She has \\boxed{1,250} pens.", "1250", RIGHT, RIGHT),
        ("She pays $12.50 in all.", "12.5", RIGHT, RIGHT),
        ("**Answer:** 7", "7", RIGHT, RIGHT),
        ("", "7", WRONG, WRONG),
        ("Nobody knows.", "7", WRONG, WRONG),
        # The box says 8; the last line, the second candidate, says 7.
        ("So it is \\boxed{8}.\nCheck: 3 + 4 = 7", "7", WRONG, RIGHT),
        # The last line says 2, the line before it 7.
        ("She has 7 figs left.\nThat took 2 steps.", "7", WRONG, RIGHT),
        # The same, with the answer in the third line from the end: two candidates are before it.
        ("She has 7 figs.\nBen has 5.\nThat took 2 steps.", "7", WRONG, WRONG),
        # Two phrases mark an answer; the last one is wrong, the one before it right.
        ("The final answer is 7.\nAnswer: 9", "7", WRONG, RIGHT),
        # A fraction in a box: the published code drops the braces and takes the last digits.
        ("It is \\boxed{\\frac{1}{2}} of the cake.", "1/2", RIGHT, WRONG),
        # A minus at the end is a sign there, and an operation here.
        ("The difference is 9-2", "2", RIGHT, WRONG),
        ("The temperature is -2", "-2", RIGHT, RIGHT),
        # The last line takes something back, so it is passed over; strictly its number counts.
        ("So 7 figs are left.\n8 would be wrong", "7", WRONG, RIGHT),
        # The one line with a number is passed over; strictly it counts.
        ("It is incorrect to say anything but 7", "7", RIGHT, WRONG),
        # Given up, and nothing marks an answer near the end.
        ("I give up. It may be 7", "7", RIGHT, WRONG),
        (
            "A glitch made me say 5 first, and I was slow. " + "So. " * 80 + "#### 7",
            "7",
            RIGHT,
            RIGHT,
        ),
        # A unit with a number in the last line.
        ("#### 7 apples in 2 bags", "7", WRONG, WRONG),
    ],
)
def test_word_problems(text: str, gold: str, strict: bool, published: bool) -> None:
    example = Example("How many?", gold, f"He counts.\n#### {gold}")
    task = object.__new__(WordProblemBenchmarkOfOne)
    assert task.score(text, example) is strict
    assert published_scorer("gsm8k")(text, example) is published
    assert (
        published_scorer("asdiv")(text, Example("How many?", gold, f"{gold} (figs)")) is published
    )


class WordProblemBenchmarkOfOne(WordProblemBenchmark):
    def example(self, row: object) -> Example:
        raise AssertionError("no rows are read")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("#### 5\n\\boxed{6}\n7\n8\n9", [5, 6, 9, 8, 7]),  # marks, box, lines from the end
        ("Answer: 1\nAnswer: 2\nAnswer: 3\nAnswer: 4", [4, 3, 2, 1]),
        ("<answer>3</answer>\nFinal Answer: 4", [4, 3]),  # by kind of phrase, the last first
        ("1\n2\n3\n4\n5\n6", [6, 5, 4, 3, 2]),  # five lines
        ("0.50 and 50%", [50]),
        ("1/0", []),
        ("7\n7.0\n14/2", [7]),
    ],
)
def test_the_numbers_of_a_completion_in_their_order(text: str, numbers: list[int]) -> None:
    assert word_problems.answers(text) == [Fraction(number) for number in numbers]


@pytest.mark.parametrize(
    "answer", [f"1/{'9' * 5000}", f"3/{'1' * 4400}", f"3.{'1' * 6000}/{'7' * 5000}", "1" * 5000]
)
def test_an_answer_of_thousands_of_digits_is_wrong(answer: str) -> None:
    example = Example("How many?", "3", "#### 3")
    assert not word_problems.is_correct(f"#### {answer}", example)
    assert word_problems.is_correct(f"So 3 figs.\n#### {answer}", example)


@pytest.mark.parametrize(
    ("answer", "number"), [("9 (apples)", 9), ("3 (cats); 5 (dogs)", 5), ("1/2 (cake)", "1/2")]
)
def test_the_gold_number_of_asdiv_is_the_last_of_the_row(answer: str, number: object) -> None:
    example = Example("How many?", "unused", answer)
    assert word_problems.gold_number(example) == Fraction(str(number))


# --- mathematics: math500, minerva_algebra --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "strict", "published"),
    [
        (r"So the answer is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", RIGHT, RIGHT),
        (r"So the answer is $\boxed{0.5}$.", r"\frac{1}{2}", RIGHT, RIGHT),
        (r"So the answer is $\boxed{\frac{1}{3}}$.", r"\frac{1}{2}", WRONG, WRONG),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", RIGHT, RIGHT),
        (r"\boxed{p-q}", "p - q", RIGHT, RIGHT),
        (r"\boxed{q-p}", "p - q", WRONG, WRONG),
        (r"It is \boxed{\text{Evelyn}}.", r"\text{Evelyn}", RIGHT, RIGHT),
        ("", "9", WRONG, WRONG),
        ("I cannot solve this.", "9", WRONG, WRONG),
        # Nothing is boxed: strictly there is no answer.
        ("There are 9 divisors.", "9", WRONG, RIGHT),
        (r"Therefore $x = 9$.", "9", WRONG, RIGHT),
        ("The final answer is 9. I hope it is correct.", "9", WRONG, RIGHT),
        # The box is wrong, and one of the last three lines mentions the answer.
        ("3 x 3 gives 9\nso I take 8\n\\boxed{8}", "9", WRONG, RIGHT),
        # The same, with more than three lines after it.
        ("It is 9\nno\nno\nno\n\\boxed{8}", "9", WRONG, WRONG),
        # A long text after the box: it does not count any more, but nothing else is found either.
        (
            r"\boxed{9}. " + "This was a nice exercise about divisors of small numbers.\n" * 4,
            "9",
            RIGHT,
            WRONG,
        ),
        # A box that is never closed holds nothing, and nothing else reads it.
        (r"\boxed{9", "9", WRONG, WRONG),
        # The last box counts strictly; an earlier one stands in the last three lines.
        ("\\boxed{9}\nor rather\n\\boxed{10}", "9", WRONG, RIGHT),
    ],
)
def test_mathematics(text: str, gold: str, strict: bool, published: bool) -> None:
    box = last_box(text)
    assert (box is not None and equal(gold, box)) is strict
    for task in ("math500", "minerva_algebra"):
        assert published_scorer(task)(text, Example("How many?", gold)) is published


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "So $a = 3$.\nAnswer: $x = 4$",
            ["x = 4", "4$", "So $a = 3$", "3$", "So $a = 3$. Answer: $x = 4$"],
        ),
        (r"\boxed{7}", ["7"]),
        ("- **7 dollars**", ["7 dollars", "- 7 dollars"]),
    ],
)
def test_the_answers_of_a_completion_in_their_order(text: str, found: list[str]) -> None:
    assert mathematics.answers(text) == found


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        (r"\text{(C)}", "(C)"),
        ("x = 5 square inches", "5"),
        ("1,234", "1234"),
        ("1,2", "12"),  # as published: digits and commas are one number
        (r"45^\circ", "45"),
        (r"\$ 3", "3"),
    ],
)
def test_answers_are_compared_without_units_and_signs(answer: str, plain: str) -> None:
    assert mathematics.normalized(mathematics.bare(answer)) == plain


def test_boxes_are_closed_hold_something_and_do_not_stand_in_each_other() -> None:
    text = r"\boxed{} \fbox {a{b}} \boxed{\boxed{c}} \boxed{d"
    assert [content for _, content in boxes(text)] == ["a{b}", r"\boxed{c}"]
    ends = [text[:end].count("}") for end, _ in boxes(text)]
    assert ends == [3, 5]


def test_what_sympy_reads_cannot_run_anything() -> None:
    for text in ("__import__('os')", "x.y", "exec(1)", "lambda: 1", "[1]", "9" * 3000 + "!"):
        assert not mathematics.is_correct(text, Example("How many?", "12345"))
    assert mathematics.is_correct("2*(3+4)", Example("How many?", "14"))
    assert mathematics.is_correct("14%", Example("How many?", "7/50"))


# --- programs: humaneval, mbpp --------------------------------------------------------------------

needs_isolation = pytest.mark.skipif(
    not any(map(works, KINDS)), reason="no isolation for foreign code works here"
)
STUB = (
    "import math\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
    "def halves(xs: list) -> list:\n"
    '    """ Half of each."""\n'
)
HALVES = CodeProblem(
    "Complete halves.",
    STUB + "    return [half(x) for x in xs]\n",
    tests="def check(candidate):\n    assert candidate([4, 2]) == [half(4), 1]\ncheck(halves)",
    names=("halves",),
    setup=STUB,
    stub=STUB,
)
DOUBLE = CodeProblem(
    "Write double.",
    "def double(x):\n    return 2 * x",
    tests="assert double(2) == 4\nassert double(0) == 0",
    names=("double",),
)


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


@needs_isolation
@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        (fenced("def double(x):\n    return 2 * x"), RIGHT, RIGHT),
        (fenced("def double(x):\n    return 3 * x"), WRONG, WRONG),
        ("Here it is:\n" + fenced("def double(x):\n    return x + x") + "\nDone.", RIGHT, RIGHT),
        (fenced("def double(x):\n    return x + x", ""), RIGHT, RIGHT),
        ("", WRONG, WRONG),
        (fenced("def twice(x):\n    return 2 * x"), WRONG, WRONG),
        # Only the first block counts.
        (fenced("def double(x):\n    return 0") + "\n" + fenced(DOUBLE.answer), WRONG, WRONG),
        # Calls beside the function do not run.
        (fenced("def double(x):\n    return 2 * x\nassert double(1) == 3"), RIGHT, RIGHT),
        # A constant at the top level: dropped by the published code.
        (fenced("TWO = 2\ndef double(x):\n    return TWO * x"), RIGHT, WRONG),
        (fenced("double = lambda x: 2 * x"), RIGHT, RIGHT),  # with no function nothing is dropped
        # Prose around code without a fence: we look for the code in it.
        ("I would write\ndef double(x):\n    return 2 * x", RIGHT, WRONG),
        ("def double(x):\n    return 2 * x", RIGHT, RIGHT),
        # A block that is never closed.
        ("```python\ndef double(x):\n    return 2 * x", RIGHT, RIGHT),
        # A block of another language first: we look for Python.
        (fenced("pip install it", "bash") + "\n" + fenced(DOUBLE.answer), RIGHT, WRONG),
        # Two lines of code that cannot be read.
        (fenced("def double(x)\n    return 2 * x"), WRONG, WRONG),
        # `\_` for `_`, as models write it in prose: unescaped by the published code.
        (fenced("def double(x\\_):\n    return 2 * x\\_"), WRONG, RIGHT),
    ],
)
def test_mbpp(text: str, strict: bool, published: bool) -> None:
    assert object.__new__(Mbpp).score(text, DOUBLE) is strict
    assert published_scorer("mbpp")(text, DOUBLE) is published


@needs_isolation
@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        (fenced(STUB + "    return [half(x) for x in xs]"), RIGHT, RIGHT),
        (fenced(STUB + "    return [half(x) for x in xs][::-1]"), WRONG, WRONG),
        # The tests use `half`; the published evaluation has it only from the completion.
        (fenced("def halves(xs):\n    return [x // 2 for x in xs]"), RIGHT, WRONG),
        # The body alone.
        (fenced("    return [half(x) for x in xs]"), RIGHT, WRONG),
        (fenced("return [half(x) for x in xs]"), RIGHT, WRONG),
        # A wrong helper of its own: strictly the problem's `half` judges, there the completion's.
        (
            fenced("def half(x):\n    return 1\ndef halves(xs):\n    return [1, 1]"),
            WRONG,
            RIGHT,
        ),
        (
            fenced("def half(x):\n    return x // 2\ndef halves(xs):\n    return [2, 1]"),
            RIGHT,
            RIGHT,
        ),
        ("", WRONG, WRONG),
        ("pass", WRONG, WRONG),
        (fenced(STUB), WRONG, WRONG),
        (fenced(STUB + "    while True:\n        return [half(x) for x in xs]"), RIGHT, RIGHT),
        (fenced(STUB + "    return [x >> 1 for x in xs]", ""), RIGHT, RIGHT),
    ],
)
def test_humaneval(text: str, strict: bool, published: bool) -> None:
    assert object.__new__(HumanEval).score(text, HALVES) is strict
    assert published_scorer("humaneval")(text, HALVES) is published


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (
            "```python\nimport re\nx = 1\ndef f():\n    return re\n```",
            "import re\n\ndef f():\n    return re",
        ),
        ("```python\nprint(1)\n```", "print(1)"),
        ("a ```b``` c", "b"),
        ("def f(: pass", "def f(: pass"),
    ],
)
def test_what_runs_of_a_completion(text: str, code: str) -> None:
    assert programs.program(text) == code


def test_a_task_without_a_published_scoring_is_refused() -> None:
    with pytest.raises(InputError, match="'word_problems' has no published scoring"):
        published_scorer("word_problems")
