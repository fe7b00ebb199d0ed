"""`dmax bench` on a CPU: its tables, record and command, and how figures are made and shown."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dmax import cli
from dmax.benchmark import cpu
from dmax.benchmark.measure import copy_bandwidth, in_turns, milliseconds, spread
from dmax.benchmark.report import Table, figure, show
from dmax.benchmark.run import command, run_benchmark
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.tasks.word_problems import WordProblems

TINY = cpu.CpuOptions(limit=1, batch_limit=2, repeats=1, batch_sizes=(1, 2), dtypes=("float32",))


def test_a_file_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "notes.json"
    output.write_text("{}")
    with pytest.raises(InputError, match="exists and was not written by this command"):
        run_benchmark("cpu", console=Console(file=io.StringIO()), output=output)
    assert output.read_text() == "{}"


def test_a_record_holds_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For speed; no answer ends within so few tokens.
    monkeypatch.setattr(WordProblems, "max_new_tokens", 32)
    monkeypatch.setattr(cpu, "FULL", TINY)
    output = tmp_path / "results" / "cpu.json"
    shown = io.StringIO()
    record = run_benchmark("cpu", console=Console(file=shown, width=200), output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    tables = ["decoding", "batching"]
    assert list(record) == ["benchmark", "command", "environment", "settings", "notes", *tables]
    assert record["benchmark"] == "cpu" and list(record["notes"]) == tables
    assert record["environment"]["torch"] == torch.__version__
    assert record["settings"]["seed"] == 7 and record["settings"]["repeats"] == 1

    methods = {row["method"]: row for row in record["decoding"]}
    assert [(row["model"], row["threshold"], row["block_length"]) for row in methods.values()] == [
        ("tiny-dmax", 0.5, 32),
        ("tiny-dmax", 0.2, 32),
        ("tiny-base", 0.95, 32),
        ("tiny-base", None, 32),
        ("tiny-base", None, 1),
    ]
    assert methods["SPD"]["correct"] == 0 and methods["SPD"]["score"] == "0/1"
    tpf = {name: row["tpf"] for name, row in methods.items()}
    assert tpf["SPD"] > tpf["threshold"] > 1 >= tpf["one token, block 1"]
    for row in methods.values():
        assert set(row["tokens_per_second"]) == {"median", "low", "high"}

    one, two = record["batching"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert one["tokens_per_second"]["low"] > 0 and one["seconds"]["low"] > 0
    assert "SPD, best" in shown.getvalue() and "speed-up" in shown.getvalue()


def test_right_answers_are_counted() -> None:
    llm = LLM("tiny-dmax", dtype=torch.float32, device="cpu", max_batch_size=2)
    examples = cpu.TASK.examples(2, 7)
    spd = cpu.contenders(TINY)[0]
    done = cpu.solve(llm, spd.params, cpu.encode(llm, examples))
    row = cpu.method_row(spd, llm, [done], examples)
    assert (row["correct"], row["score"]) == (2, "2/2")
    assert row["tpf"] == row["tokens"] / row["forwards"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("decoding", "methods", [{"method": "SPD"}], [{"method": "SPD"}])
    monkeypatch.setattr(cpu, "tables", lambda options: iter([table]))
    monkeypatch.setattr(sys, "argv", ["dmax", "bench", "--device", "cpu", "--quick", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code
    assert out.count("\n") == 1
    record = json.loads(out)
    assert record["command"] == "dmax bench --device cpu --quick --json"
    assert record["decoding"] == [{"method": "SPD"}] and record["settings"]["limit"] == 3
    assert "SPD" in err


def test_a_device_without_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = torch.device("mps")
    monkeypatch.setattr("dmax.benchmark.run.select_device", lambda device: chosen)
    with pytest.raises(InputError, match="there is no benchmark for mps"):
        run_benchmark("mps", console=Console(file=io.StringIO()))


def test_commands_name_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = [str(tmp_path / "bench" / "cpu.py"), "--output", str(tmp_path / "my file.json")]
    assert command(script) == "python bench/cpu.py --output 'my file.json'"
    assert command(["/somewhere/bin/dmax", "bench"]) == "dmax bench"


def test_repeats_take_turns() -> None:
    order: list[str] = []

    def note(name: str) -> int:
        order.append(name)
        return len(order)

    results = in_turns({"a": lambda: note("a"), "b": lambda: note("b")}, 2)
    assert order == ["a", "b"] * 3
    assert results == {"a": [3, 5], "b": [4, 6]}
    assert spread([3.0, 1.0, 8.0]) == {"median": 3.0, "low": 1.0, "high": 8.0}


def test_times_and_bandwidths_are_positive() -> None:
    device = torch.device("cpu")
    assert milliseconds(lambda: torch.ones(100).sum(), device) > 0
    assert copy_bandwidth(device, 1000, repeats=2)["low"] > 0


def test_figures() -> None:
    assert figure(1234.5, ".0f") == "1234"
    assert figure(None, ".1f") == "–"
    assert figure({"median": 2.0, "low": 1.0, "high": 3.0}, ".1f") == "2.0 (1.0 to 3.0)"


def test_words_stand_to_the_left_and_figures_to_the_right() -> None:
    shown = io.StringIO()
    cells = [
        {"case": "engine", "ms": "12.5", "problem": "–"},
        {"case": "a", "ms": "–", "problem": "out"},
    ]
    show(Table("steps", "steps", [], cells, "a note"), Console(file=shown, width=80))
    assert "│ a      │    – │ out     │" in shown.getvalue()
    assert "a note" in shown.getvalue()
    show(Table("steps", "nothing measured", [], []), Console(file=shown, width=80))
