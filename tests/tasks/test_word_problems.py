"""Word problems: arithmetic read back from the text, lengths, splits, scoring."""

from __future__ import annotations

import hashlib
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmax.errors import InputError
from dmax.tasks import get_task, task_names
from dmax.tasks import word_problem_patterns as patterns
from dmax.tasks.word_problems import (
    Numbers,
    ShortWordProblems,
    Split,
    apply_step,
    extract_answer,
    generate,
    problems,
    score,
    split_of,
)
from dmax.tiny.tokenizer import build_tokenizer

# What each clause says, read back from the text: pattern with old value a, operand b and result c,
# and the operation.
SPOKEN = {
    "+": "+",
    "plus": "+",
    "-": "-",
    "minus": "-",
    "x": "*",
    "times": "*",
    "/": "/",
    "divided by": "/",
}
EQUATION = (
    r"(?P<a>\d+) (?P<op>[-+x/]|plus|minus|times|divided by) (?P<b>\d+) "
    r"(?:which )?(?:equals|is|makes|gives) (?P<c>\d+)"
)
CLAUSES = (
    (r"adding (?P<b>\d+) to the (?P<a>\d+) .* with (?P<c>\d+) ", "+"),
    (r"with (?P<b>\d+) more than (?P<a>\d+) .* has (?P<c>\d+) ", "+"),
    (r"(?P<b>\d+) on top of (?P<a>\d+) and holds (?P<c>\d+) ", "+"),
    (r"taking (?P<b>\d+) from the (?P<a>\d+) .* with (?P<c>\d+) ", "-"),
    (r"with (?P<b>\d+) fewer than (?P<a>\d+) .* has (?P<c>\d+) ", "-"),
    (r"gives up (?P<b>\d+) out of (?P<a>\d+) and holds (?P<c>\d+) ", "-"),
    (r"taking (?P<b>\d+) times the (?P<a>\d+) .* with (?P<c>\d+) ", "*"),
    (r"with (?P<b>\d+) lots of (?P<a>\d+) .* has (?P<c>\d+) ", "*"),
    (r"counts (?P<b>\d+) sets of (?P<a>\d+) and holds (?P<c>\d+) ", "*"),
    (r"cutting the (?P<a>\d+) .* by (?P<b>\d+) leaves .* with (?P<c>\d+) ", "/"),
    (r"with one of (?P<b>\d+) parts of (?P<a>\d+) .* has (?P<c>\d+) ", "/"),
    (r"keeps one in (?P<b>\d+) out of (?P<a>\d+) and holds (?P<c>\d+) ", "/"),
)


def read_step(sentence: str) -> tuple[int, str, int, int]:
    """The step a worked sentence states, as (a, operation, b, c), read without the generator."""
    found = [(match, SPOKEN[match["op"]]) for match in re.finditer(EQUATION, sentence)]
    for pattern, operation in CLAUSES:
        found += [(match, operation) for match in re.finditer(pattern, sentence)]
    assert len(found) == 1, sentence
    match, operation = found[0]
    return int(match["a"]), operation, int(match["b"]), int(match["c"])


def test_there_are_at_least_forty_sentence_patterns_over_four_operations() -> None:
    assert set(patterns.STEPS) == {"+", "-", "*", "/"}
    sentences = [sentence for steps in patterns.STEPS.values() for sentence in steps]
    assert len(set(sentences)) == len(sentences) >= 40
    assert all(len(patterns.STEPS[operation]) >= 10 for operation in "+-")
    assert all(len(patterns.STEPS[operation]) >= 8 for operation in "*/")
    assert not re.search(r"\b(twice|half|double)\b", " ".join(sentences))


@pytest.mark.parametrize("operation", sorted(patterns.STEPS))
def test_every_operation_is_worked_out_in_several_forms_that_state_all_numbers(
    operation: str,
) -> None:
    forms = patterns.FORMS + patterns.FORMS_BY_OPERATION[operation]
    assert len(set(forms)) == len(forms) >= 6
    for form in forms:
        assert set(re.findall(r"\{([abc])\}", form)) == {"a", "b", "c"}
    orders = {tuple(re.findall(r"\{([abc])\}", form)) for form in forms}
    assert len(orders) >= 3  # the numbers do not always come in the same order


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**6))
def test_a_problem_is_a_pure_function_and_its_chain_is_sound(seed: int, index: int) -> None:
    problem = generate(seed, index)
    assert problem == generate(seed, index)
    assert 4 <= problem.num_steps == len(problem.steps) <= 8
    assert 1 <= problem.start <= 99
    value = problem.start
    for operation, operand in problem.steps:
        assert operand in (range(2, 21) if operation in "+-" else (2, 3, 4))
        assert operation != "/" or value % operand == 0
        value = apply_step(value, operation, operand)
        assert 1 <= value <= 99
    assert value == problem.answer


@settings(max_examples=200, deadline=None)
@given(index=st.integers(0, 10**6))
def test_every_step_is_told_and_worked_out(index: int) -> None:
    problem = generate(5, index)
    told = [int(number) for number in re.findall(r"\d+", problem.question)]
    assert told == [problem.start, *(operand for _, operand in problem.steps)]
    worked, _, closing = problem.response.partition("\n")
    sentences = re.findall(r"[^.]+\.", worked)
    assert len(sentences) == len(problem.steps)
    value = problem.start
    for sentence, (operation, operand) in zip(sentences, problem.steps, strict=True):
        result = apply_step(value, operation, operand)
        numbers = {int(number) for number in re.findall(r"\d+", sentence)}
        assert numbers == {value, operand, result}, sentence
        a, read_operation, b, c = read_step(sentence)
        assert (a, read_operation, b, c) == (value, operation, operand, result), sentence
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[read_operation] == c
        value = result
    assert closing == f"#### {problem.answer}"


def test_answers_have_the_promised_length_and_many_wordings() -> None:
    tokenizer = build_tokenizer()
    lengths = [len(tokenizer.encode(problem.response)) for problem in problems(500, seed=11)]
    assert min(lengths) >= 60
    assert max(lengths) <= 160
    assert 80 <= statistics.mean(lengths) <= 120
    sentences = [re.findall(r"[^.]+\.", generate(11, index).response) for index in range(200)]
    wordings = {re.sub(r"\d+", "N", sentence) for each in sentences for sentence in each}
    assert len(wordings) > 800  # of about 1,200 sentences


def test_leads_follow_their_preference_and_never_repeat() -> None:
    leads = sorted({*patterns.OPENING_LEADS, *patterns.LEADS}, key=len, reverse=True)
    counts = dict.fromkeys(leads, 0)
    for index in range(1000):
        before = None
        for position, sentence in enumerate(
            re.findall(r"\s*([^.]+)\.", generate(12, index).response)
        ):
            lead = next(lead for lead in leads if sentence.startswith(f"{lead} "))
            assert lead != before
            assert lead in (patterns.LEADS if position else patterns.OPENING_LEADS)
            before = lead
            counts[lead] += position > 0
    assert [lead for lead in sorted(leads, key=lambda lead: -counts[lead]) if counts[lead]] == list(
        patterns.LEADS
    )


def test_train_and_test_never_share_a_chain() -> None:
    train = {(p.start, p.steps) for p in problems(3000, seed=1, split="train", max_steps=4)}
    test = {(p.start, p.steps) for p in problems(3000, seed=1, split="test", max_steps=4)}
    assert not train & test
    assert {split_of(*chain) for chain in test} == {"test"}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (Numbers(), {"train": "9a4a466306", "test": "448faadd96"}),
        (Numbers(largest=99, largest_operand=20), {"train": "fcde7465b3", "test": "abe0918226"}),
    ],
)
def test_the_stream_stays_what_the_bundled_models_learned(
    numbers: Numbers, expected: dict[str, str]
) -> None:
    digests = {}
    for split in ("train", "test"):
        drawn = problems(500, seed=0, split=split, numbers=numbers)
        texts = "".join(problem.question + problem.response for problem in drawn)
        digests[split] = hashlib.sha1(texts.encode()).hexdigest()[:10]
    assert digests == expected


def test_one_chain_in_ten_is_for_testing() -> None:
    sides = [
        split_of(start, (("+", b), ("*", n)))
        for start in range(100)
        for b in range(2, 21)
        for n in (2, 3, 4)
    ]
    assert sides.count("test") / len(sides) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (3, 3), (12, 12)])
def test_other_numbers_of_steps_come_to_an_end(low: int, high: int) -> None:
    for problem in problems(20, seed=1, min_steps=low, max_steps=high):
        assert low <= problem.num_steps <= high


@pytest.mark.parametrize(("low", "high"), [(0, 4), (5, 4)])
def test_an_empty_range_of_steps_is_refused(low: int, high: int) -> None:
    with pytest.raises(InputError, match="min_steps <= max_steps"):
        generate(0, 0, min_steps=low, max_steps=high)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="must be one of train, test, got 'tests'") as caught:
        generate(0, 0, split="tests")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean `test`?"


def test_problems_are_distinct() -> None:
    questions = [problem.question for problem in problems(2000, seed=3)]
    assert len(set(questions)) == 2000


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3.\n#### 17", 17),
        ("#### 17", 17),
        ("#### -4\n", -4),
        ("#### 17 apples", None),
        ("#### 1\n#### 2", 2),
        ("#### 17\nmore", None),
        ("the answer is 17", None),
        ("x #### 17", None),
        ("", None),
        ("#### 17 \n\n", 17),
        ("#### 17\r\n", 17),
        ("#### 007", 7),
        ("####17", None),
        ("####  17", None),
        ("##### 17", None),
        (" #### 17", None),
        ("#### +17", None),
        ("#### 17.0", None),
        ("#### 17.", None),
        ("#### 1,700", None),
        ("#### \u0663", None),  # a digit of another script
        ("#### " + "9" * 5000, None),  # more digits than int() takes
    ],
)
def test_extraction_is_strict(text: str, answer: int | None) -> None:
    assert extract_answer(text) == answer
    assert score(text, 17) == score(text, "17") == (answer == 17)


def test_the_task_scores_references_right_and_others_wrong() -> None:
    task = get_task("word_problems")
    examples = task.examples(20, seed=7)
    assert examples == task.examples(20, seed=7)
    for example in examples:
        assert example.reference is not None
        assert task.score(example.reference, example)
        assert not task.score(f"#### {int(example.answer) + 1}", example)
        assert not task.score("", example)


@pytest.mark.parametrize("split", ["train", "test"])
def test_short_problems_have_two_steps_and_small_numbers(split: Split) -> None:
    drawn = list(ShortWordProblems.problems(200, 0, split))
    assert len({problem.question for problem in drawn}) == 200
    for problem in drawn:
        assert problem.num_steps == 2
        assert split_of(problem.start, problem.steps) == split
        numbers = map(int, re.findall(r"\d+", problem.question + problem.response))
        assert max(numbers) <= 20


def test_the_short_task_has_the_test_problems_of_its_seed() -> None:
    task = get_task("short_word_problems")
    drawn = list(ShortWordProblems.problems(5, 7, "test"))
    assert [example.prompt for example in task.examples(5, 7)] == [p.question for p in drawn]
    for problem, example in zip(drawn, task.examples(5, 7), strict=True):
        assert task.score(problem.response, example)


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="unknown task 'word_problem'; choose from asdiv, .*, word_problems"
    ):
        get_task("word_problem")
    assert "word_problems" in task_names()
