"""The CPU benchmark: its reference loop decides as the engine does, and its record holds what it says it does."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from dmax import cli
from dmax.benchmark import compiled, cpu, hub_loop, memory
from dmax.benchmark.measure import Watch, in_turns, spread, watched
from dmax.benchmark.report import cell, ratio
from dmax.benchmark.run import command, result_path, run_cpu
from dmax.benchmark.shapes import llama_135m
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task
from dmax.tasks.word_problems import WordProblems

TINY = cpu.CpuOptions(
    limit=1,
    batch_limit=2,
    repeats=1,
    batch_sizes=(1, 2),
    dtypes=("float32",),
    dense_layers=1,
    compiles=False,
)
SECTIONS = "decoding hub_loop batching dense ratios".split()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "measure_apart", lambda *_: {"loaded_mib": 400.0, "peak_mib": 500.0})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", dtype=torch.float32, device="cpu", max_batch_size=2)


@pytest.mark.parametrize(
    ("model", "strategy", "threshold"),
    [("tiny-base", "threshold", 0.95), ("tiny-dmax", "spd", 0.5)],
)
def test_the_hub_loop_decides_as_the_engine_does(
    model: str, strategy: str, threshold: float
) -> None:
    llm = LLM(model, dtype=torch.float32, device="cpu")
    examples = get_task("word_problems").examples(2, 11)
    outputs = llm.generate([each.prompt for each in examples], DecodingParams(strategy, threshold))
    for output in outputs:
        completion, forwards = hub_loop.generate(
            llm.checkpoint,
            output.prompt_token_ids,
            threshold=threshold,
            soft=strategy == "spd",
            max_new_tokens=256,
        )
        assert completion == output.token_ids
        assert forwards == output.num_forwards


def test_the_hub_loop_ends_at_the_limit(llm: LLM) -> None:
    prompt = llm.encode(get_task("word_problems").examples(1, 11)[0].prompt)
    output = llm.generate([prompt], DecodingParams("spd", 0.5, max_new_tokens=9))[0]
    assert hub_loop.generate(
        llm.checkpoint, prompt, threshold=0.5, soft=True, max_new_tokens=9
    ) == (
        output.token_ids,
        output.num_forwards,
    )
    assert len(output.token_ids) == 9


def test_positions_the_hub_loop_selects() -> None:
    masked = torch.tensor([False, True, True, True, False])
    confidence = torch.tensor([0.1, 0.9, 0.4, 0.95, 0.99])

    def chosen(threshold: float, leftmost: bool) -> list[int]:
        return (
            hub_loop.select(masked, confidence, threshold, leftmost=leftmost)
            .nonzero()[:, 0]
            .tolist()
        )

    assert chosen(0.9, False) == [1, 3]
    assert chosen(0.9, True) == [1]
    assert chosen(0.97, False) == [3]
    assert chosen(0.97, True) == [1]
    assert not hub_loop.select(
        torch.zeros(5, dtype=torch.bool), confidence, 0.0, leftmost=False
    ).any()


def test_a_file_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "notes.json"
    output.write_text("{}")
    with pytest.raises(InputError, match="exists and was not written by this command"):
        run_cpu(TINY, console=Console(file=io.StringIO()), output=output)
    assert output.read_text() == "{}"


def test_a_record_holds_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        WordProblems, "max_new_tokens", 32
    )  # for speed; no answer ends within so few
    output = tmp_path / "results" / "cpu.json"
    record = run_cpu(TINY, console=Console(file=io.StringIO()), output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    assert list(record) == ["benchmark", "command", "environment", "settings", "notes", *SECTIONS]
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
    assert (
        methods["SPD"]["tpf"]
        > methods["threshold"]["tpf"]
        > 1
        >= methods["one token, block 1"]["tpf"]
    )
    assert all(
        set(row["tokens_per_second"]) == {"median", "low", "high"} for row in methods.values()
    )

    assert [row["equal_completions"] for row in record["hub_loop"]] == ["1/1", "1/1", "1/1"]
    assert all(row["engine_forwards"] == row["hub_forwards"] for row in record["hub_loop"])
    assert not any(
        "compiled" in row or "together" in row for row in record["hub_loop"]
    )  # not asked for; too few

    one, two = record["batching"]
    assert (one["batch"], two["batch"]) == (1, 2) and two["model_calls"] < one["model_calls"]
    assert 0 < one["loop_overhead"]["median"] < 1 and one["peak_mib"] == 500
    assert record["dense"][0]["floor_ms"]["low"] > 0

    ratios = {row["name"]: row for row in record["ratios"]}
    best, base = (
        methods[name]["tokens_per_second"]["median"] for name in ("SPD, best", "threshold")
    )
    assert ratios["SPD, best / threshold"]["value"] == best / base
    assert ratios["SPD, best / threshold"]["met"] == (best / base >= 2.5)
    assert "loop overhead, batch 16, float32" not in ratios


def test_prompts_are_also_given_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TOGETHER", 1)
    rows = cpu.against_hub_loop({"tiny-base": llm, "tiny-dmax": llm}, TINY).rows
    assert all(
        row["together"]["median"] > 0 and row["together_ratio"]["median"] > 0 for row in rows
    )


def test_right_answers_are_counted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [each for each in cpu.contenders(TINY) if each.label == "SPD"]
    monkeypatch.setattr(cpu, "contenders", lambda options: chosen)
    (row,) = cpu.decoding({"tiny-dmax": llm}, replace(TINY, limit=2)).rows
    assert (row["correct"], row["score"]) == (2, "2/2")
    assert row["tpf"] == row["tokens"] / row["forwards"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu, "QUICK", TINY)
    monkeypatch.setattr(cpu, "sections", lambda options: iter([cpu.ratios(TINY, *_measured())]))
    monkeypatch.setattr(sys, "argv", ["dmax", "bench", "--device", "cpu", "--quick", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code
    assert (
        out.count("\n") == 1
        and json.loads(out)["command"] == "dmax bench --device cpu --quick --json"
    )
    assert "SPD / one token" in err


def _measured() -> list[list[dict[str, Any]]]:
    """Rows of every table, all speeds 10 but for SPD's, which is 60."""
    methods = [
        {"method": name, "tokens_per_second": {"median": 10.0}}
        for name in ("SPD, best", "threshold")
    ]
    methods += [
        {"method": name, "tokens_per_second": {"median": 10.0}}
        for name in ("one token", "one token, block 1")
    ]
    methods.append({"method": "SPD", "tokens_per_second": {"median": 60.0}})
    batch = {
        "dtype": "float32",
        "batch": 1,
        "tokens_per_second": {"median": 10.0},
        "loop_overhead": {"median": 0.1},
    }
    loops = {"engine": 2.9, "compiled": 3.1, "together": 3.0}
    return [
        methods,
        [
            {
                "method": "spd",
                "shots": 0,
                **{f"{name}_ratio": {"median": value} for name, value in loops.items()},
            }
        ],
        [batch],
        [{"dtype": "float32", "ratio": 1.6, "compiled_ratio": 1.5}],
    ]


def test_ratios_and_targets() -> None:
    rows = {row["name"]: row for row in cpu.ratios(TINY, *_measured()).rows}
    assert rows["SPD / one token"] == {
        "name": "SPD / one token",
        "value": 6.0,
        "target": ">= 5",
        "met": True,
    }
    assert rows["SPD, best / threshold"]["met"] is False
    assert rows["SPD / one token, block 1"]["met"] is None
    assert rows["engine / hub loop, spd"]["met"] is False
    assert rows["compiled engine / hub loop, spd"]["met"] is True
    assert rows["loop overhead, batch 1, float32"]["met"] is True
    assert rows["engine, 16 at once, / hub loop, spd"]["met"] is True
    assert rows["135M forward / its products, float32"]["met"] is False
    assert rows["135M forward, compiled, / its products, float32"]["met"] is True
    assert ratio("a", 0.11, "<= 0.1")["met"] is False


def test_options_that_make_no_table() -> None:
    with pytest.raises(InputError, match="must hold 1, got 4, 16"):
        replace(TINY, batch_sizes=(4, 16))
    with pytest.raises(InputError, match="unknown dtype 'bf16'"):
        replace(TINY, dtypes=("float32", "bf16"))


def test_repeats_take_turns() -> None:
    order: list[str] = []

    def note(name: str) -> int:
        order.append(name)
        return len(order)

    results = in_turns({"a": lambda: note("a"), "b": lambda: note("b")}, 2)
    assert order == ["a", "b"] * 3
    assert results == {"a": [3, 5], "b": [4, 6]}
    assert spread([3.0, 1.0, 8.0]) == {"median": 3.0, "low": 1.0, "high": 8.0}


def test_the_share_outside_the_model() -> None:
    # 10 s, of which the model 6 s and its head 1 s, and 1 s for timing the head: 2 of 9 s are the
    # loop's own.
    assert Watch(forward=6.0, head=1.0).outside(10.0) == pytest.approx(2 / 9)


def test_watching_a_model_counts_its_calls_and_leaves_no_trace(llm: LLM) -> None:
    examples = get_task("word_problems").examples(2, 11)
    with watched(llm.model) as watch:
        done = cpu.solve(llm, DecodingParams(), examples)
    assert watch.calls >= max(1, done.forwards // 2)  # two sequences share a call
    assert watch.forward > watch.head > 0
    assert 0 < watch.picked(done.seconds) < watch.outside(done.seconds) < 1
    before = replace(watch)
    assert cpu.solve(llm, DecodingParams(), examples).completions == done.completions
    assert watch == before
    alone = LLM.from_checkpoint(llm.checkpoint, max_batch_size=1)
    (output,) = alone.generate([examples[0].prompt], DecodingParams())
    _, _, calls = cpu.watch_once(alone, DecodingParams(), examples[:1])
    assert calls == output.num_forwards  # the prompt goes along with the first


def test_what_compiling_gains_and_costs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"plain": {"median": 100.0}, "compiled": {"median": 200.0}}
    processes = iter([{**figures, "start_up": 30.0}, {**figures, "start_up": 6.0}])
    monkeypatch.setattr(compiled, "_two_processes", lambda *_: processes)
    (row,) = compiled.section(["float32"], [1], 3, 7, 1).rows
    assert (row["gain"], row["start_up"], row["start_up_cached"]) == (2.0, 30.0, 6.0)
    assert row["pays_after"] == 6000  # 5 ms saved each

    monkeypatch.setattr("torch.compile", lambda encode: encode)
    measured = compiled.measure("float32", 2, 2, 7, 1)
    assert measured["plain"]["median"] > 0 and measured["compiled"]["median"] > 0
    assert measured["start_up"] < 60


def test_products_of_a_dense_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    small = llama_135m(
        num_hidden_layers=2,
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=3,
    )
    times = cpu.dense_times(small, 2, compiles=False, context=32)
    assert times.keys() == {"ms_per_forward", "floor_ms"}
    assert times["ms_per_forward"]["low"] > 0 and times["floor_ms"]["low"] > 0
    monkeypatch.setattr("torch.compile", lambda encode: encode)
    assert cpu.dense_times(small, 1, compiles=True, context=32)["compiled_ms"]["low"] > 0


def test_the_backbone_has_the_published_shape() -> None:
    with torch.device("meta"):
        model = llama_135m().model
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_memory_is_measured_by_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], **_: Any) -> SimpleNamespace:
        assert words[:3] == [sys.executable, "-m", "dmax.benchmark.memory"]
        monkeypatch.setattr(sys, "argv", words[2:])
        monkeypatch.delitem(sys.modules, "dmax.benchmark.memory")
        with redirect_stdout(io.StringIO()) as output:
            runpy.run_module("dmax.benchmark.memory", run_name="__main__")
        return SimpleNamespace(stdout=output.getvalue())

    monkeypatch.setattr(memory.subprocess, "run", run)
    found = memory.measure_apart("tiny-dmax", "bfloat16", 2, 2, 7)
    assert found.keys() == {"loaded_mib", "peak_mib"}
    if sys.platform == "linux":
        assert found["peak_mib"] >= found["loaded_mib"] > 50  # type: ignore[operator]


def test_cells() -> None:
    row = {"a": 1234.5, "b": None, "c": {"median": 2.0, "low": 1.0, "high": 3.0}, "d": True}
    assert [cell(row, column) for column in ("a:.0f", "b:.1f", "c:.1f", "d", "e")] == [
        "1234",
        "–",
        "2.0 (1.0 to 3.0)",
        "yes",
        "–",
    ]


def test_commands_and_files_name_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = [str(tmp_path / "bench" / "cpu.py"), "--output", str(tmp_path / "my file.json")]
    assert command(script) == "python bench/cpu.py --output 'my file.json'"
    assert command(["/somewhere/bin/dmax", "bench"]) == "dmax bench"
    path = result_path(Path("bench/results"), "cpu", torch.device("cpu"))
    assert (
        path.parent == Path("bench/results")
        and path.name.startswith("cpu_")
        and path.suffix == ".json"
    )
    assert " " not in path.name
