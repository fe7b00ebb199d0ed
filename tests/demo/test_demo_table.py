"""The table of the demo, its closing sentence, and what it says to do next."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import dmax.demo
from dmax.demo.present import command_name, measure, next_steps
from dmax.demo.settings import CAREFUL, DMAX, SETTINGS
from dmax.demo.table import Measured, closing, table
from dmax.llm import LLM
from dmax.tasks import get_task


@pytest.fixture(scope="module")
def measured(models: dict[str, LLM]) -> list[Measured]:
    return measure(models, get_task("word_problems"), 2, 2026)


def test_every_setting_is_measured_on_the_same_problems(measured: list[Measured]) -> None:
    assert [each.setting for each in measured] == list(SETTINGS)
    assert len({each.summary.examples for each in measured}) == 1
    assert all(sum(each.correct) == each.summary.correct for each in measured)


@pytest.mark.parametrize("width", [120, 80, 40])
def test_the_table_has_counts_and_intervals(measured: list[Measured], width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(console, measured))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for each in measured:
        assert each.setting.label in shown
        assert f"{each.summary.correct}/2" in shown
        assert f"{each.summary.tpf:.2f}" in shown
    assert "95 % interval" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


def with_answers(measured: list[Measured], base: list[bool], ours: list[bool]) -> list[Measured]:
    """As if these were the answers, DMax at 5 times the TPF and 4 times the speed."""
    found = {CAREFUL: (base, 2.0, 100.0), DMAX: (ours, 10.0, 400.0)}
    return [
        replace(
            each,
            correct=tuple(found[each.setting][0]),
            summary=replace(
                each.summary,
                correct=sum(found[each.setting][0]),
                total=len(base),
                tpf=found[each.setting][1],
                tokens_per_second=found[each.setting][2],
            ),
        )
        for each in measured
        if each.setting in found
    ]


@pytest.mark.parametrize(
    ("base", "ours", "said"),
    [
        ([True] * 31 + [False], [True] * 30 + [False, True], "same accuracy within noise (31 and"),
        ([True] * 32, [False] * 6 + [True] * 26, "fewer answers right (26 and 32 of 32 right"),
        ([False] * 6 + [True] * 26, [True] * 32, "more answers right (32 and 26 of 32 right"),
    ],
)
def test_the_closing_sentence_says_what_was_found(
    measured: list[Measured], base: list[bool], ours: list[bool], said: str
) -> None:
    sentence = closing(with_answers(measured, base, ours))
    assert "5.0 times the tokens per forward, 4.0 times the speed" in sentence
    assert said in sentence


def test_next_steps_call_the_command_as_this_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv" / "bin" / "dmax"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert command_name(str(program)) == command_name(".venv/bin/dmax") == ".venv/bin/dmax"
    assert ".venv/bin/dmax eval --limit 200" in next_steps(".venv/bin/dmax").plain
    assert "  .venv/bin/dmax serve " in next_steps(".venv/bin/dmax").plain
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_name(str(program)) == "dmax"
    assert command_name("-c") == "dmax"


def test_the_demo_in_a_pipe_and_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dmax.demo, "NUM_PROBLEMS", 2)
    monkeypatch.setattr(sys, "argv", ["dmax", "demo"])
    monkeypatch.setenv("COLUMNS", "80")
    dmax.demo.run_demo()
    shown, said = capsys.readouterr()
    assert "\x1b" not in shown
    assert said.startswith("loading tiny-base and tiny-dmax …")
    assert shown.startswith("One unseen problem")
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.index("after 0.") < shown.index("95 % interval") < shown.index("TPF, tokens per")
    assert shown.index("DMax against the careful base: ") < shown.index("Next:")

    dmax.demo.run_demo(as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in record["rows"]] == [setting.label for setting in SETTINGS]
    assert len(record["watched"]["answers"]) == 3 and record["closing"].startswith("DMax against")
