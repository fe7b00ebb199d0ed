"""Rows of benchmarks: order, limits, bad files, and a hub that is not there."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dmax.tasks
from dmax.errors import InputError
from dmax.extras import install_hint
from dmax.tasks import get_task, task_names
from dmax.tasks.data import HubDataset, rows_of_hub
from dmax.tasks.maths import Gsm8k

ROWS = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_first_rows_in_the_order_of_the_file_whatever_the_seed(tmp_path: Path) -> None:
    task = get_task("gsm8k", write(tmp_path / "a.jsonl", *ROWS))
    assert [example.answer for example in task.examples(3, seed=1)] == ["1", "2", "3"]
    assert task.examples(3, seed=1) == task.examples(3, seed=2)
    assert len(task.examples(200, seed=7)) == 5


def test_a_plugin_is_found_and_cannot_take_a_name_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "dmax.tasks.maths:Math500"
    found = [EntryPoint(name, target, "dmax.tasks") for name in ("mine", "gsm8k")]
    monkeypatch.setattr(
        dmax.tasks, "entry_points", lambda group: found if group == "dmax.tasks" else []
    )
    assert "mine" in task_names() and task_names().count("gsm8k") == 1
    assert isinstance(get_task("gsm8k", write(tmp_path / "a.jsonl", *ROWS)), Gsm8k)


def test_a_plugin_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("mine", "notthere.module:Mine", "dmax.tasks")]
    monkeypatch.setattr(dmax.tasks, "entry_points", lambda group: found)
    with pytest.raises(InputError, match="cannot be loaded: No module named 'notthere'"):
        get_task("mine")


def test_blank_lines_separate_nothing_and_count_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[0], "", ROWS[1], "  ", {"question": "?"})
    with pytest.raises(InputError, match=r"a\.jsonl:5: `answer` is missing"):
        get_task("gsm8k", path)
    written = str(write(path, ROWS[0], "", ROWS[1]))
    assert len(get_task("gsm8k", written).examples(9, 0)) == 2


def test_texts_may_hold_other_line_breaks(tmp_path: Path) -> None:
    row = json.dumps({"question": "a\u2028b\x85c?", "answer": "#### 1"}, ensure_ascii=False)
    [example] = get_task("gsm8k", write(tmp_path / "a.jsonl", row)).examples(1, 0)
    assert "a\u2028b\x85c?" in example.prompt


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "Why?"', "not a JSON object"),
        ("[1, 2]", r"not a JSON object but \[1, 2\]"),
        ("null", "not a JSON object but None"),
        ("[" * 100_000, "not a JSON object"),
        (json.dumps(ROWS[0]), r"repeats the question of .*a\.jsonl:1"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[0], line)
    with pytest.raises(InputError) as caught:
        get_task("gsm8k", path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert caught.match(reason)


def test_a_line_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not UTF-8 text"):
        get_task("gsm8k", path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl holds no rows"):
        get_task("gsm8k", tmp_path / "a.jsonl")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl: No such file"):
        get_task("gsm8k", tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        get_task("gsm8k", tmp_path)


def test_a_task_that_makes_its_examples_reads_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="'word_problems' makes its own examples and reads no file"
    ):
        get_task("word_problems", tmp_path / "a.jsonl")


# --- the hub --------------------------------------------------------------------------------------


def test_rows_come_from_the_hub_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*words: Any, **named: Any) -> list[dict[str, str]]:
        asked.append((words, named))
        return [*ROWS, ROWS[0]]  # sets on the hub are taken as they are

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(get_task("gsm8k").examples(10, seed=0)) == 6
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([ROWS[0], {"question": "Why?"}], r"openai/gsm8k \(test\), row 2: `answer` is missing"),
        ([], "`openai/gsm8k` on the hub holds no rows"),
    ],
)
def test_a_hub_that_gives_something_else(
    monkeypatch: pytest.MonkeyPatch, rows: list[Any], reason: str
) -> None:
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *words, **named: rows)
    )
    with pytest.raises(InputError, match=reason):
        get_task("gsm8k")


def test_a_hub_out_of_reach_is_one_sentence_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(*words: Any, **named: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nwith a long tale")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as caught:
        list(rows_of_hub(HubDataset("openai/gsm8k", "main", "test")))
    assert caught.value.message == "cannot read `openai/gsm8k` from the hub: Couldn't reach the Hub"
    assert caught.value.hint == "give the rows as a JSONL file: --data FILE"


def test_datasets_is_asked_for_only_by_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert len(get_task("gsm8k", write(tmp_path / "a.jsonl", *ROWS)).examples(9, 0)) == 5
    with pytest.raises(InputError, match="needs the package `datasets`") as caught:
        get_task("gsm8k")
    assert install_hint("eval") in str(caught.value) and "--data FILE" in str(caught.value)


def test_math_verify_is_asked_for_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match="needs the package `math-verify`") as caught:
        Gsm8k(tmp_path / "missing.jsonl")
    assert caught.value.hint == install_hint("eval")


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed"
)
def test_the_real_package_offline_ends_in_the_same_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot read `nobody/nothing` from the hub: "):
        list(rows_of_hub(HubDataset("nobody/nothing", None, "test")))


def test_a_text_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a\\ud800", "answer": "#### 3"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: `question` holds half of a surrogate"):
        get_task("gsm8k", file)
