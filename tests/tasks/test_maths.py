"""Mathematical tasks: published prompts, gold answers from rows, and completions scored by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmax.errors import InputError
from dmax.tasks import Task, get_task
from dmax.tasks.maths import final_number, last_box


def task_of(folder: Path, name: str, *rows: dict[str, Any]) -> Task:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return get_task(name, path)


# --- prompts and gold answers ---------------------------------------------------------------------


def test_gsm8k_asks_as_published_and_takes_the_gold_number_from_the_last_line(
    tmp_path: Path,
) -> None:
    row = {
        "question": "Ann had 3 pens and got 1,200. How many?",
        "answer": "3 + 1200 = <<3+1200=1203>>\n#### 1,203",
    }
    task = task_of(tmp_path, "gsm8k", row)
    [example] = task.examples(5, seed=0)
    assert example.prompt == (
        "Question: Ann had 3 pens and got 1,200. How many?\nLet's think step by step\nAnswer:"
    )
    assert (example.answer, example.reference) == ("1203", row["answer"])
    assert task.max_new_tokens == 2048
    assert task.score(row["answer"], example)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (
            {"body": "Ben has 4 figs.", "question": "How many?", "answer": "4 (figs)"},
            "Ben has 4 figs. How many?",
            "4",
        ),
        (
            {"body": "Half.", "question": "How much?", "answer": "1/2 (of the cake)"},
            "Half. How much?",
            "1/2",
        ),
        ({"body": "Two.", "question": "Each?", "answer": "3 (cats); 5 (dogs)"}, "Two. Each?", "3"),
        ({"body": "Clock.", "question": "When?", "answer": "12:30"}, "Clock. When?", "12:30"),
        ({"question": "What is 2 + 2?", "answer": "4"}, " What is 2 + 2?", "4"),
    ],
)
def test_asdiv_joins_body_and_question_and_leaves_the_unit_out(
    tmp_path: Path, row: dict[str, str], question: str, answer: str
) -> None:
    [example] = task_of(tmp_path, "asdiv", row).examples(1, seed=0)
    assert example.prompt == f"Question: {question}\nLet's think step by step\nAnswer:"
    assert example.answer == answer


@pytest.mark.parametrize("name", ["math500", "minerva_algebra"])
@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (
            {
                "problem": "Solve.",
                "solution": r"So $x=\boxed{\frac{1}{2}}$.",
                "answer": r"\frac{1}{2}",
            },
            r"\frac{1}{2}",
        ),
        (
            {"problem": "Solve.", "solution": r"First \boxed{1}, then $\boxed{(2, \infty)}$."},
            r"(2, \infty)",
        ),
        ({"problem": "Solve.", "solution": r"It is $\boxed 7$."}, "7"),
        ({"question": "Solve.", "ground_truth_answer": "p - q"}, "p - q"),
    ],
)
def test_math_asks_for_a_box_and_takes_the_gold_answer_where_it_is(
    tmp_path: Path, name: str, row: dict[str, str], answer: str
) -> None:
    [example] = task_of(tmp_path, name, row).examples(1, seed=0)
    assert (
        example.prompt
        == "Solve.\nLet's think step by step, and put your final answer within \\boxed{}."
    )
    assert (example.answer, example.reference) == (answer, row.get("solution"))


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "18"},
            "`answer` has no line `#### N` with the final number",
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "#### many"},
            "`answer` has no line `#### N`",
        ),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "`question` is empty"),
        ("gsm8k", {"answer": "#### 1"}, "`question` is missing"),
        ("gsm8k", {"question": "How many?", "answer": 18}, "`answer` must be a text, got 18"),
        (
            "asdiv",
            {"body": "A.", "question": "B?", "answer": " (apples)"},
            "`answer` has nothing before its unit",
        ),
        ("asdiv", {"body": 3, "question": "B?", "answer": "1"}, "`body` must be a text, got 3"),
        ("math500", {"answer": "1"}, "`problem` or `question` is missing"),
        ("math500", {"problem": "A?"}, "`answer` is missing, and there is no `solution`"),
        (
            "math500",
            {"problem": "A?", "answer": ""},
            "`answer` is missing, and there is no `solution`",
        ),
        (
            "minerva_algebra",
            {"problem": "A?", "solution": r"It is \boxed{2"},
            "`answer` is missing, and there is no",
        ),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(
    tmp_path: Path, name: str, row: dict[str, Any], reason: str
) -> None:
    good = {"question": "What is 2 + 2?", "answer": "#### 4"}
    with pytest.raises(InputError) as caught:
        task_of(tmp_path, name, good, row)
    assert caught.value.message.startswith(f"{tmp_path / 'rows.jsonl'}:2: {reason}")


# --- completions scored by hand -------------------------------------------------------------------

NUMBERS = [  # completion, gold number, verdict
    ("She sells 9 eggs for $2 each: 9 * 2 = 18.\n#### 18", "18", True),
    ("9 * 2 = 18 dollars.", "18", True),
    ("So the answer is **18**.", "18", True),
    ("Therefore she makes $18.", "18", True),
    (r"The answer is $\boxed{18}$ dollars.", "18", True),
    (r"\boxed{18}", "-18", False),
    (r"\boxed{-18}", "-18", True),
    ("The temperature is -5 degrees.", "-5", True),
    ("From 23 we take 5: 23-5 = 18", "18", True),
    ("He is left with 23-5", "-5", False),  # a difference, no negative number
    (r"\boxed{\$1,250}", "1250", True),
    (r"\boxed{1{,}250}", "1250", True),
    (r"It costs $1,250.00 in all.", "1250", True),
    ("It costs 1,250", "1", False),
    ("1,2", "12", False),  # two numbers, no thousands
    (r"\boxed{18 \text{ dollars}}", "18", True),
    (r"\boxed{18 dollars per day}", "18", True),
    (r"\boxed{\text{18 dollars}}", "18", True),
    (r"\boxed{60 km/h}", "60", True),
    (r"\boxed{18.}", "18", True),
    (r"\boxed{x = 18}", "18", True),
    (r"\boxed{9 \times 2 = 18}", "18", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{1/2}", "0.5", True),
    ("She eats 3/4 of it", "0.75", True),
    (r"\boxed{0.33}", "1/3", False),
    (r"\boxed{50\%}", "50", True),
    ("That is 50% of them.", "50", True),
    (r"\boxed{5 apples and 3 pears}", "3", False),
    (r"First \boxed{16}, no, \boxed{18}.", "18", True),
    (r"First \boxed{18}, no, \boxed{16}.", "18", False),
    ("#### 16\nWait, that forgets two.\n#### 18", "18", True),
    ("\\boxed{16}\n#### 18", "18", True),
    ("#### 18\n\\boxed{16}", "18", False),
    ("#### 2. Add up\nThe total is 18", "18", True),  # a heading, no answer
    (r"She has 18 eggs, so the answer is \boxed{20}.", "18", False),  # right in the reasoning only
    # No mark: the last number counts.
    ("16 - 3 - 4 = 9. Then 9 * 2 = 18. So she gets 18 in 1 day", "18", False),
    (r"9 * 2 = 18, so \boxed{18", "18", False),  # cut off
    ("16 - 3 - 4 =", "4", True),  # cut off, and right by luck, as lm-eval has it too
    ("", "18", False),
    ("I cannot tell.", "18", False),
    (r"\boxed{}", "18", False),
    (r"\boxed{eighteen}", "18", False),
    (r"\boxed{\frac{}{}", "18", False),
    (r"\boxed{18, 19}", "18", False),
    ("The answer is −7.", "-7", True),
    ("The answer is .5", "0.5", True),
]


@pytest.mark.parametrize("name", ["gsm8k", "asdiv"])
@pytest.mark.parametrize(("text", "gold", "verdict"), NUMBERS)
def test_word_problems_scored_by_hand(
    tmp_path: Path, name: str, text: str, gold: str, verdict: bool
) -> None:
    answer = f"#### {gold}" if name == "gsm8k" else f"{gold} (units)"
    task = task_of(tmp_path, name, {"question": "How many?", "answer": answer})
    [example] = task.examples(1, seed=0)
    assert example.answer == gold
    assert task.score(text, example) is verdict


FORMULAS = [  # completion, gold answer, verdict
    (r"\boxed{\frac{14}{3}}", r"\frac{14}{3}", True),
    (r"\boxed{14/3}", r"\frac{14}{3}", True),
    (r"\boxed{\dfrac{28}{6}}", r"\frac{14}{3}", True),
    (r"\boxed{4.67}", r"\frac{14}{3}", False),
    (r"\boxed{1.25}", r"\frac{5}{4}", True),
    (r"\boxed{9/5}", r"1\frac{4}{5}", True),
    (r"\boxed{\frac 34}", r"\frac{3}{4}", True),
    (r"$\boxed{(3, \frac{\pi}{2})}$", r"\left( 3, \frac{\pi}{2} \right)", True),
    (r"\boxed{(\frac{\pi}{2}, 3)}", r"\left( 3, \frac{\pi}{2} \right)", False),
    (r"\boxed{(3, 4]}", "(3,4]", True),
    (r"\boxed{[3, 4]}", "(3,4]", False),
    (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(-\infty, 2) \cup (3, \infty)", True),
    (r"\boxed{-2, 1}", "1,-2", True),
    (r"\boxed{\{1, -2\}}", "1,-2", True),
    (r"\boxed{1}", "1,-2", False),
    (r"\boxed{5}", "x=5", True),
    (r"\boxed{x = 5}", "5", True),
    (r"\boxed{2x + 3}", "y = 2x + 3", True),
    (r"\boxed{q - p}", "p - q", False),
    (r"\boxed{-q + p}", "p - q", True),
    (r"\boxed{(b+2)(a+5)}", "(a+5)(b+2)", True),
    (r"\boxed{\sqrt{52}}", r"2\sqrt{13}", True),
    (r"\boxed{1 - \sqrt{19}, 1 + \sqrt{19}}", r"1 \pm \sqrt{19}", True),
    (r"\boxed{90}", r"90^\circ", True),
    (r"\boxed{\$32,348}", r"\$32,\!348", True),
    (r"\boxed{10080}", r"10,\!080", True),
    (r"\boxed{864}", r"864 \mbox{ inches}^2", True),
    (r"\boxed{15\%}", r"15\%", True),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", True),
    (r"\boxed{\text{Evan}}", r"\text{Evelyn}", False),
    (r"\boxed{C}", r"\text{(C)}", True),
    (r"\boxed{\text{(B)}}", r"\text{(C)}", False),
    (
        r"\boxed{\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}}",
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        True,
    ),
    (r"\boxed{2x}", "2", False),
    (r"\boxed{6 - 5i}", "6 - 5i", True),
    (r"\boxed{6 + 5i}", "6 - 5i", False),
    (r"\boxed{7.}", "7", True),
    (r"First \boxed{6}, then \boxed{7}", "7", True),
    (r"First \boxed{7}, then \boxed{6}", "7", False),
    (r"\fbox{7}", "7", True),
    ("The final answer is 7.", "7", False),  # the prompt asks for a box
    (r"We get 7, and \boxed{8}", "7", False),
    (r"so \boxed{\frac{14}{3", r"\frac{14}{3}", False),
    ("", "7", False),
]


@pytest.mark.parametrize(("text", "gold", "verdict"), FORMULAS)
def test_competition_problems_scored_by_hand(
    tmp_path: Path, text: str, gold: str, verdict: bool
) -> None:
    task = task_of(tmp_path, "math500", {"problem": "Solve.", "answer": gold})
    [example] = task.examples(1, seed=0)
    assert task.score(text, example) is verdict


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{\left\{ a \mid a > 0 \right\}}", r"\left\{ a \mid a > 0 \right\}"),
        # An escaped brace opens nothing, and a point at the end is dropped.
        (r"\boxed{\left\{ a \right.}", r"\left\{ a \right"),
        (r"\boxed {3}", "3"),
        (r"\boxed{a} and \boxed{b} end", "b"),
        ("\\boxed{\n 4 \n}", "4"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{6} \boxed{", None),
        ("none", None),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a1 = 4.5.", "4.5"),
        ("10,000,000!", "10000000"),
        ("$-5$", "-5"),
        ("3 / 4", "4"),
        ("x", None),
        ("7\\%", "7%"),
    ],
)
def test_the_last_number_where_nothing_is_marked(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_extraction_is_what_was_scored(tmp_path: Path) -> None:
    task = task_of(tmp_path, "gsm8k", {"question": "How many?", "answer": "#### 18"})
    assert task.extract("It is $1,800 in all.") == "1800"
    assert task.extract("Nothing.") is None
    task = task_of(tmp_path, "math500", {"problem": "A?", "answer": "1"})
    assert task.extract(r"\boxed{\frac12}") == r"\frac12"
