"""bench/cpu.py and what it measures beside `dmax bench`."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_line
import compiled
import cpu as bench
import dense
import hub_contest
import memory
import pytest
import torch
from overhead import LoopTimes, loop_times, product_seconds
from ratios import ratio
from rich.console import Console
from torch import nn

from dmax.benchmark.cpu import SPD, TASK, encode
from dmax.benchmark.measure import spread
from dmax.benchmark.run import record_tables
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks.word_problems import WordProblems

CPU = torch.device("cpu")
TINY = bench.Options(
    limit=1,
    batch_limit=2,
    repeats=1,
    batch_sizes=(1, 2),
    dtypes=("float32",),
    dense_layers=1,
    compiles=False,
)
SECTIONS = "decoding hub_loop batching dense ratios".split()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", dtype=torch.float32, device="cpu", max_batch_size=2)


def test_a_record_holds_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    # For speed; no answer ends within so few tokens.
    monkeypatch.setattr(WordProblems, "max_new_tokens", 32)
    monkeypatch.setattr(bench, "measure_apart", lambda *_: {"loaded_mib": 400.0, "peak_mib": 500.0})
    console = Console(file=io.StringIO())
    record = record_tables("cpu", CPU, asdict(TINY), bench.tables(TINY), console=console)
    json.dumps(record)
    assert list(record) == ["benchmark", "command", "environment", "settings", "notes", *SECTIONS]
    assert record["settings"]["dense_layers"] == 1

    assert [row["equal_completions"] for row in record["hub_loop"]] == ["1/1", "1/1", "1/1"]
    for row in record["hub_loop"]:
        assert row["engine_forwards"] == row["hub_forwards"] == row["cached_forwards"]
        assert row["cached_equal_completions"] == "1/1"
        assert row["engine_cached_ratio"]["median"] > 0
        assert "compiled" not in row and "together" not in row  # not asked for; too few

    one, two = record["batching"]
    assert (one["batch"], two["batch"]) == (1, 2) and two["model_calls"] < one["model_calls"]
    assert one["loop_overhead"]["median"] < 1 and one["peak_mib"] == 500
    seconds = one["ms_per_forward"]["median"] * one["model_calls"] / 1e3
    assert seconds == pytest.approx(one["seconds"]["median"])
    assert record["dense"][0]["floor_ms"]["low"] > 0

    methods = {row["method"]: row for row in record["decoding"]}
    ratios = {row["name"]: row for row in record["ratios"]}
    best = methods["SPD, best"]["tokens_per_second"]["median"]
    base = methods["threshold"]["tokens_per_second"]["median"]
    assert ratios["SPD, best / threshold"]["value"] == best / base
    assert ratios["SPD, best / threshold"]["met"] == (best / base >= 2.5)
    assert "loop overhead, batch 16, float32" not in ratios


def test_prompts_are_also_given_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_contest, "TOGETHER", 1)
    monkeypatch.setattr(WordProblems, "max_new_tokens", 32)
    rounds = hub_contest.contests({"tiny-base": llm, "tiny-dmax": llm}, 1, 0.95, 7)
    rows = hub_contest.hub_table(rounds, "float32", 1, compiles=False).rows
    for row in rows:
        assert row["together"]["median"] > 0 and row["together_ratio"]["median"] > 0
    assert rows[2]["prompt_tokens"] > 3 * rows[1]["prompt_tokens"]


def _measured() -> dict[str, list[dict[str, Any]]]:
    """Rows of every table, all speeds 10 but for SPD's, which is 60."""
    names = ("SPD", "SPD, best", "threshold", "one token", "one token, block 1")
    ten = {"median": 10.0}
    batch = {"dtype": "float32", "tokens_per_second": ten}
    return {
        "methods": [
            {"method": name, "tokens_per_second": {"median": 60.0} if name == "SPD" else ten}
            for name in names
        ],
        "loops": [
            {
                "method": "spd",
                "shots": 0,
                "engine_ratio": {"median": 2.9},
                "compiled_ratio": {"median": 3.1},
                "together_ratio": {"median": 3.0},
                **{f"{name}_cached_ratio": ten for name in ("engine", "compiled", "together")},
            }
        ],
        "batches": [
            {**batch, "batch": 1, "loop_overhead": {"median": 0.08}, "products_share": 0.5},
            {**batch, "batch": 16, "loop_overhead": {"median": 0.08}, "products_share": 0.6},
        ],
        "dense": [{"dtype": "float32", "ratio": 1.6, "compiled_ratio": 1.5}],
    }


def test_ratios_and_targets() -> None:
    measured = _measured()
    judged = [
        *bench.method_ratios(measured["methods"]),
        *bench.loop_ratios(measured["loops"]),
        *bench.batch_ratios(measured["batches"]),
        *bench.dense_ratios(measured["dense"]),
    ]
    rows = {row["name"]: row for row in judged}
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
    assert rows["engine, 16 at once, / hub loop, spd"]["met"] is True
    assert rows["loop overhead, batch 1, float32"]["met"] is True
    assert rows["loop overhead, batch 16, float32"]["met"] is False
    assert rows["products' share of a step, batch 16, float32"]["value"] == 0.6
    assert rows["engine / cached loop, spd"] == {
        "name": "engine / cached loop, spd",
        "value": 10.0,
        "target": None,
        "met": None,
    }
    assert rows["batch 16 / batch 1, float32"]["value"] == 1.0
    assert rows["135M forward / its products, float32"]["met"] is False
    assert rows["135M forward, compiled, / its products, float32"]["met"] is True
    assert ratio("a", 0.11, "<= 0.1")["met"] is False


def test_a_part_is_measured_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WordProblems, "max_new_tokens", 32)
    options = replace(TINY, only=("batches",), memory=False)
    *tables, ratios = bench.tables(options)
    assert [table.name for table in tables] == ["batching"]
    assert all("peak_mib" not in row for row in tables[0].rows)
    names = [row["name"] for row in ratios.rows]
    assert names == [
        "loop overhead, batch 1, float32",
        "products' share of a step, batch 1, float32",
    ]


def test_the_products_of_a_step_are_those_of_its_layers_experts_and_head(llm: LLM) -> None:
    params = DecodingParams("spd", 0.5, max_new_tokens=16)
    prompt = llm.encode("2 + 2 = ?")[:16]  # a block with its answer
    calls = list[str]()
    layers = [each for each in llm.model.base_model.modules() if isinstance(each, nn.Linear)]
    hooks = [each.register_forward_hook(lambda *_: calls.append("linear")) for each in layers]
    seconds, num_products = product_seconds(llm, params, [prompt])
    for hook in hooks:
        hook.remove()
    num_forwards = llm.generate([prompt], params)[0].num_forwards
    assert seconds > 0
    # The head, and of every layer with experts at least their two products.
    config = llm.model.config
    num_sparse = config.num_hidden_layers - config.first_k_dense_replace
    assert num_products >= len(calls) + num_forwards * (1 + 2 * num_sparse)


def test_options_that_make_no_table() -> None:
    with pytest.raises(InputError, match="must hold 1, got 4, 16"):
        replace(TINY, batch_sizes=(4, 16))
    with pytest.raises(InputError, match="unknown dtype 'bf16'"):
        replace(TINY, dtypes=("float32", "bf16"))


def test_the_share_outside_the_model() -> None:
    # 9 s, of which the layers take 6 s and the head's product 1 s: the other 2 s are the loop's.
    times = LoopTimes(steps=9.0, layers=6.0, head=1.0, picking=0.9)
    assert times.overhead == pytest.approx(2 / 9)
    assert times.picking_share == pytest.approx(0.1)


def test_watching_an_engine_counts_its_calls_and_leaves_no_trace(llm: LLM) -> None:
    prompts = encode(llm, TASK.examples(3, 11))
    before = llm.generate(prompts, SPD)
    times = loop_times(llm, SPD, prompts)
    assert times.blocks == sum(output.num_forwards for output in before)
    assert times.calls >= max(1, times.blocks // 2)  # two sequences share a call
    assert times.steps > times.layers > 0 and times.head > 0
    assert [o.token_ids for o in llm.generate(prompts, SPD)] == [o.token_ids for o in before]
    assert not llm.model.base_model._forward_hooks

    alone = LLM.from_checkpoint(llm.checkpoint, max_batch_size=1)
    (output,) = alone.generate(prompts[:1], SPD)
    # The prompt goes along with the first step.
    assert loop_times(alone, SPD, prompts[:1]).calls == output.num_forwards


def test_what_compiling_gains_and_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"plain": spread([100.0]), "compiled": spread([200.0])}
    processes = iter([{**figures, "start_up": 30.0}, {**figures, "start_up": 6.0}])
    monkeypatch.setattr(compiled, "in_a_process", lambda *_: next(processes))
    (row,) = compiled.compiled_table(["float32"], [1], 3, 7, 1).rows
    assert (row["gain"], row["start_up"], row["start_up_cached"]) == (2.0, 30.0, 6.0)
    assert row["pays_after"] == 6000  # 5 ms saved each

    monkeypatch.setattr("torch.compile", lambda encode: encode)
    measured = compiled.measure("float32", 2, 2, 7, 1)
    assert measured["plain"]["median"] > 0 and measured["compiled"]["median"] > 0
    assert measured["start_up"] < 60


def test_products_of_a_dense_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dense.llama_135m(
        num_hidden_layers=2,
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=3,
    )
    times = dense.dense_times(small, 2, compiles=False, context=32)
    assert times.keys() == {"ms_per_forward", "floor_ms"}
    assert times["ms_per_forward"]["low"] > 0 and times["floor_ms"]["low"] > 0
    monkeypatch.setattr("torch.compile", lambda encode: encode)
    assert dense.dense_times(small, 1, compiles=True, context=32)["compiled_ms"]["low"] > 0

    products = dense.products_of(small, dense.open_block(small, 64))
    assert len(products) == 1 + 2 * 7  # the head, and seven linear layers in each of two
    assert products[0][1].shape == (64, 48)


def test_the_backbone_has_the_published_shape() -> None:
    with torch.device("meta"):
        model = dense.llama_135m().model
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_memory_is_measured_by_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], **_: Any) -> SimpleNamespace:
        assert words[:2] == [sys.executable, memory.__file__]
        monkeypatch.setattr(sys, "argv", words[1:])
        with redirect_stdout(io.StringIO()) as output:
            runpy.run_path(words[1], run_name="__main__")
        return SimpleNamespace(stdout=output.getvalue())

    monkeypatch.setattr(memory.subprocess, "run", run)
    found = memory.measure_apart("tiny-dmax", "bfloat16", 2, 2, 7)
    assert found.keys() == {"loaded_mib", "peak_mib"}
    if sys.platform == "linux":
        assert found["peak_mib"] >= found["loaded_mib"] > 50


def test_results_are_named_after_the_hardware() -> None:
    path = command_line.result_path("cpu", CPU)
    assert path.parent == Path("bench/results")
    assert path.name.startswith("cpu_") and path.suffix == ".json" and " " not in path.name
    date = path.stem.rpartition("_")[2]
    parts = command_line.result_path("cpu", CPU, ("steps", "contexts"))
    assert parts.stem == f"{path.stem.removesuffix(date)}steps_contexts_{date}"


def test_bad_options_end_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/cpu.py", "--dtypes", "bf16"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "unknown dtype 'bf16'" in capsys.readouterr().err
