"""The process that compares answers: threads, deaths, silence, and no math-verify."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmax.errors import InputError
from dmax.tasks import equality
from dmax.tasks.equality import Comparer, equal

# Stands for the real worker: "same" is true, "die" ends it, "hang" says nothing, all else is false.
WORKER = """
import json, sys, threading
print("null", flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    if answer == "die":
        sys.exit()
    if answer == "hang":
        threading.Event().wait()
    print(json.dumps(gold == answer), flush=True)
"""


@pytest.fixture
def comparer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparer]:
    (tmp_path / "equality_worker.py").write_text(WORKER)
    monkeypatch.setattr(equality, "__file__", str(tmp_path / "equality.py"))
    comparer = Comparer()
    yield comparer
    comparer.stop()


def test_answers_are_compared_as_mathematics() -> None:
    assert equal("0.5", r"\frac{1}{2}")
    assert not equal("0.5", r"\frac{1}{3}")


def test_any_thread_may_ask() -> None:
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(equal("1/2", f"{n}/4")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == [False, False, False, True]


@pytest.mark.parametrize(
    "answer", ["", "{", "\\", "\x00", "\n", r"\frac{1}{", "}" * 50, "\ud800", "a" * 1000]
)
def test_what_cannot_be_read_is_not_equal_and_does_no_harm(answer: str) -> None:
    assert not equal("1", answer)
    assert equal("1", "1")


def test_a_process_that_dies_over_an_answer_is_replaced(comparer: Comparer) -> None:
    assert comparer.compare("same", "same")
    assert not comparer.compare("same", "die")
    assert comparer.compare("same", "same")


def test_a_process_that_says_nothing_is_killed_and_replaced(
    comparer: Comparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert comparer.compare("same", "same")
    with monkeypatch.context() as patch:
        patch.setattr(comparer, "_limit", 0)
        assert not comparer.compare("same", "hang")
    assert comparer.compare("same", "same")


def test_a_process_that_died_between_two_questions_costs_no_answer(comparer: Comparer) -> None:
    assert comparer.compare("same", "same")
    process = comparer._process
    assert process is not None
    process.kill()
    process.wait()
    assert comparer.compare("same", "same")


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        ("print('\"no antlr\"')", "math-verify does not start: no antlr"),
        ("", "math-verify does not start: no reply"),
    ],
)
def test_a_math_verify_that_does_not_start_is_said(
    tmp_path: Path, comparer: Comparer, worker: str, reason: str
) -> None:
    (tmp_path / "equality_worker.py").write_text(worker)
    with pytest.raises(InputError, match=reason):
        comparer.compare("1", "1")


def test_the_evaluating_process_never_imports_sympy_for_it() -> None:
    before = "sympy" in sys.modules
    assert equal("2", "2.0")
    assert ("sympy" in sys.modules) == before
    assert "math_verify" not in sys.modules
