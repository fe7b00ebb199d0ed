r"""Tasks with a mathematical answer: `gsm8k`, `asdiv`, `math500`, `minerva_algebra`.

Prompts are those of the published evaluation, zero-shot. Scoring is strict: one answer is taken
from a completion, the last `\boxed{…}`, and math-verify compares it with the gold one. The prompt
of the word problems asks for no form. There a closing line `#### N` counts as well, and without
either the last number, as in lm-eval's flexible extraction.
"""

from __future__ import annotations

import re
from pathlib import Path

from dmax.tasks import Example
from dmax.tasks.data import Benchmark, DatasetRow, HubDataset
from dmax.tasks.equality import equal, require_math_verify

# A minus right after a word, number or bracket is an operation; digits may be grouped by commas.
NUMBER = (
    r"(?:(?<![\w)\]}])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\\?%)?"
)
BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<bare>[^\s{}$]+))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
FINAL_LINE = re.compile(rf"^\s*####\s*({NUMBER})\.?\s*$", re.MULTILINE)
WORDS_OF_TEX = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox)\{([^{}]*)\}")
NUMBER_AND_UNIT = re.compile(rf"[\s$*]*({NUMBER})(?:[\s/]*[A-Za-z]+)*[\s.$*]*")
SPELLINGS = {"−": "-", "{,}": ",", r"\!": "", r"\,": "", r"\$": "$"}


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds; None without one, or if it is empty or never closed."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    last = boxes[-1]
    return _clean(last["bare"] or until_closed(text[last.end() :])) or None


def until_closed(text: str) -> str:
    """The text up to the brace that closes what was open before it; empty if none does."""
    depth = 1
    for found in BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[: found.start()]
    return ""


def _clean(answer: str) -> str:
    return answer.strip().rstrip(".").strip("* \n")


def final_number(text: str) -> str | None:
    r"""The final number of a completion; None if there is none.

    It stands in the last `\boxed{…}` or in the last line `#### N`, whichever comes later. Without
    either it is the last number of the text. A box may hold something else, such as `\frac{1}{2}`,
    which is given back as it stands. A unit is left out.
    """
    for spelling, plain in SPELLINGS.items():
        text = text.replace(spelling, plain)
    boxes = list(BOX.finditer(text))
    lines = list(FINAL_LINE.finditer(text))
    if lines and (not boxes or lines[-1].start() > boxes[-1].start()):
        return _digits(lines[-1][1])
    if boxes:
        box = last_box(text)
        return None if box is None else _without_unit(box)
    numbers = re.findall(NUMBER, text)
    return _digits(numbers[-1]) if numbers else None


def _without_unit(answer: str) -> str:
    found = NUMBER_AND_UNIT.fullmatch(WORDS_OF_TEX.sub(r"\1", answer))
    return _digits(found[1]) if found else answer


def _digits(number: str) -> str:
    return re.sub(r"[$,\\]", "", number)


class MathBenchmark(Benchmark):
    """A benchmark whose answers math-verify compares."""

    def __init__(self, data: Path | None = None) -> None:
        require_math_verify()
        super().__init__(data)

    def score(self, text: str, example: Example) -> bool:
        """Whether the answer of a completion equals the gold one."""
        answer = self.extract(text)
        return answer is not None and equal(example.answer, answer)


class WordProblemBenchmark(MathBenchmark):
    """Word problems with one number as their answer."""

    def extract(self, text: str) -> str | None:
        """The final number of a completion; None if there is none."""
        return final_number(text)

    @staticmethod
    def prompt(question: str) -> str:
        """The published prompt."""
        return f"Question: {question}\nLet's think step by step\nAnswer:"


class Gsm8k(WordProblemBenchmark):
    """The task `gsm8k`: 1,319 grade-school word problems."""

    name = "gsm8k"
    hub = HubDataset("openai/gsm8k", "main", "test")

    def example(self, row: DatasetRow) -> Example:
        """A row has `question` and `answer`, whose last line is `#### N`."""
        question = row.text("question")
        answer = row.text("answer")
        lines = FINAL_LINE.findall(answer)
        if not lines:
            raise row.wrong("`answer` has no line `#### N` with the final number")
        return Example(self.prompt(question), _digits(lines[-1]), answer)


class Asdiv(WordProblemBenchmark):
    """The task `asdiv`: 2,305 short word problems."""

    name = "asdiv"
    hub = HubDataset("EleutherAI/asdiv", "asdiv", "validation")

    def example(self, row: DatasetRow) -> Example:
        """A row has `question`, often `body` before it, and `answer` such as `9 (apples)`."""
        body = row.optional_text("body")
        question = row.text("question")
        answer = row.text("answer")
        number = answer.partition(" (")[0].strip()
        if not number:
            raise row.wrong("`answer` has nothing before its unit")
        return Example(self.prompt(f"{body} {question}"), _without_unit(number), answer)


class Math500(MathBenchmark):
    """The task `math500`: 500 competition problems from MATH."""

    name = "math500"
    hub = HubDataset("HuggingFaceH4/MATH-500", None, "test")

    def example(self, row: DatasetRow) -> Example:
        r"""A row has `problem` or `question`, and an answer.

        The answer is `answer`, `ground_truth_answer`, or the last box of `solution`.
        """
        problem = row.text("problem", "question")
        solution = row.optional_text("solution")
        answer = (
            row.optional_text("answer")
            or row.optional_text("ground_truth_answer")
            or last_box(solution)
        )
        if not answer:
            raise row.wrong(
                r"`answer` is missing, and there is no `solution` with a final \boxed{…}"
            )
        instruction = r"Let's think step by step, and put your final answer within \boxed{}."
        return Example(f"{problem}\n{instruction}", answer, solution or None)

    def extract(self, text: str) -> str | None:
        """The last boxed answer of a completion; None if there is none."""
        return last_box(text)


class MinervaAlgebra(Math500):
    """The task `minerva_algebra`: 1,187 algebra problems of the test set of MATH."""

    name = "minerva_algebra"
    hub = HubDataset("EleutherAI/hendrycks_math", "algebra", "test")
