"""The GPU benchmarks on a small model and a CPU: they run, route as told and count bytes right."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import alone
import gpu as bench
import pytest
import torch
from count_kernels import Node
from forwards import uniform
from predicted import beside, predictions
from rich.console import Console

from dmax.benchmark import gpu
from dmax.benchmark.gpu import build, failure
from dmax.benchmark.report import Row
from dmax.benchmark.roofline import against_floor, forward_bytes
from dmax.benchmark.routing import counts_of_mean, distinct_experts, prescribe, replayed
from dmax.benchmark.run import record_tables
from dmax.benchmark.shapes import llada2_mini
from dmax.benchmark.steps import measure_steps, never_sure, step_times
from dmax.checkpoint import Checkpoint
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.models import LLaDA2MoeConfig
from dmax.models.quantization import quantize_experts

CPU = torch.device("cpu")
MINI = LLaDA2MoeConfig()
SECTIONS = """
    bandwidth nodes machine kernels forwards steps batches contexts quantised speeds ratios
""".split()


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    return llada2_mini(torch.float32, CPU, **bench.SMALL_SHAPE)


def test_the_tables_of_the_command() -> None:
    options = gpu.GpuOptions(
        distinct=8.7,
        context=96,
        new_tokens=64,
        steps=2,
        repeats=1,
        copy_bytes=2**20,
        changes=bench.SMALL_SHAPE,
    )
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    tables = gpu.tables(options, CPU)
    record = record_tables("gpu", CPU, asdict(options), tables, console=console)
    json.dumps(record)
    assert list(record["notes"]) == ["machine", "steps"]
    assert record["machine"][0]["parameters"] == 537_120
    cases = ["bfloat16", "int8 experts", "fp8 experts", "int4 experts"]
    assert [row["case"] for row in record["steps"]] == cases
    assert not [row for row in record["steps"] if "error" in row]
    plain, *quantised = record["steps"]
    assert all(row["bytes"]["experts"] < plain["bytes"]["experts"] for row in quantised)
    assert all(row["distinct"] == 8.5 for row in record["steps"])
    assert "at TPF 6" in shown.getvalue()


def test_a_part_can_be_measured_alone() -> None:
    options = replace(bench.SMALL, batch_sizes=(1,), steps=2, only=("batches",))
    names = [table.name for table in bench.tables(options, CPU)]
    assert names == ["machine", "batches"]


def test_a_run_that_is_killed_leaves_what_it_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "by_context", killed)
    options = replace(bench.SMALL, batch_sizes=(1,), steps=2, only=("batches", "contexts"))
    output = tmp_path / "gpu.json"
    tables = bench.tables(options, CPU)
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        record_tables("gpu", CPU, asdict(options), tables, console=console, output=output)
    record = json.loads(output.read_text())
    assert list(record["notes"]) == ["machine", "batches"]
    assert [row["batch"] for row in record["batches"]] == [1]


def test_the_first_parts_need_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "build", None)
    options = replace(bench.SMALL, only=("bandwidth", "nodes"))
    bandwidth, nodes = bench.tables(options, CPU)
    assert bandwidth.rows[0]["gb_per_second"]["median"] > 0
    assert [row["case"] for row in nodes.rows] == ["operation of PyTorch"]
    assert 0 < nodes.rows[0]["us"]["low"] <= nodes.rows[0]["us"]["median"]


def test_a_part_that_fails_leaves_the_others_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(bench, "kernel_table", fail)
    monkeypatch.setattr(bench, "by_variant", fail)
    options = replace(bench.SMALL, batch_sizes=(1,), steps=2, only=("kernels", "engine", "batches"))
    machine, kernels, engine, batches = bench.tables(options, CPU)
    assert kernels.rows == [{"case": "kernels", "error": "ValueError: no such kernel"}]
    assert engine.rows == [{"case": "engine", "error": "ValueError: no such kernel"}]
    assert batches.rows[0]["step_ms"]["median"] > 0


def test_every_kernel_of_a_step_is_measured_alone(small: Checkpoint) -> None:
    prescribe(small.model, replayed(small.model.config, 8.7, 2, 32))
    table = alone.kernel_table(small, 128, 64)
    rows = {row["case"]: row for row in table.rows}
    assert not [row for row in table.rows if "error" in row]
    # Three layers: an embedding, products of attention (2 each), of a dense layer (3) and of two
    # layers of experts (router and shared: 4 each), and the head.
    assert rows["embedding"]["nodes"] == 2  # MASK's, too
    products = sum(row["nodes"] for name, row in rows.items() if name.startswith("mm"))
    assert products == 3 * 2 + 3 + 2 * 4 + 1
    assert rows["_scaled_dot_product_flash_attention_for_cpu"]["nodes"] == 3
    for row in table.rows:
        assert row["ratio"] == row["us"]["median"] / row["predicted_us"]


def test_a_node_that_cannot_be_captured_becomes_a_row() -> None:
    def wait() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    row = alone.kernel_row("wait", [wait], [Node("wait")], 128, CPU)
    assert row["error"].startswith("operation not permitted")


def test_steps_beside_their_prediction(tmp_path: Path) -> None:
    cases = (("H100", "bf16", 4.0), ("H100", "int8", 2.0), ("H200", "bf16", 5.0))
    shape = {"batch": 1, "context": 1024, "first_step_ms": 6.0}
    rows = [{"gpu": gpu, "experts": form, "step_ms": ms, **shape} for gpu, form, ms in cases]
    record = tmp_path / "prediction.json"
    record.write_text(json.dumps({"rows": rows}))
    predicted = predictions("NVIDIA H100 80GB HBM3", record)
    assert [row["experts"] for row in predicted] == ["bf16", "int8"]
    assert predictions("NVIDIA H100 80GB HBM3", tmp_path / "none.json") == []

    engine = _steps("engine", 5.0, context=1024, first_step_ms={"median": 9.0})
    int8 = engine | {"case": "int8 experts", "format": "int8"}
    other = engine | {"context": 4096}
    failed = {"case": "engine", "batch": 1, "context": 1024, "error": "out of memory"}
    table = beside([engine, int8, other, failed], predicted)
    assert table is not None
    told = [(row["case"], row["what"], row["ratio"]) for row in table.rows]
    assert told == [
        ("engine", "step_ms", 1.25), ("engine", "first_step_ms", 1.5),
        ("int8 experts", "step_ms", 2.5), ("int8 experts", "first_step_ms", 1.5),
    ]  # fmt: skip
    assert beside([other], predicted) is None


def test_everything_runs_on_a_small_model() -> None:
    options = replace(bench.SMALL, contexts=(128, 192), forwards=1, steps=2)
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    tables = bench.tables(options, CPU)
    record = record_tables("gpu", CPU, asdict(options), tables, console=console)
    json.dumps(record)
    assert list(record) == ["benchmark", "command", "environment", "settings", "notes", *SECTIONS]
    assert record["environment"]["device"] == "cpu" and "gpu" not in record["environment"]
    assert not [row for name in SECTIONS for row in record[name] if "error" in row]

    implementations = ["fused_moe", "grouped_mm", "batched_mm", "eager"]
    assert [row["experts"] for row in record["forwards"]] == implementations * 2
    replayed_row, uniform_row = record["forwards"][::4]
    assert replayed_row["distinct"] == 8.5
    assert uniform_row["distinct"] == pytest.approx(31.5, abs=0.6)
    assert [row["batch"] for row in record["batches"]] == [1, 2]
    assert [row["context"] for row in record["contexts"]] == [128, 192]
    assert [row["format"] for row in record["quantised"]] == ["int8", "fp8", "int4"]
    assert all(row["tpf"] == 16 for row in record["steps"])

    bandwidth = record["machine"][0]["gb_per_second"]["median"]
    for row in record["forwards"]:
        assert row["gb"] == pytest.approx(sum(row["bytes"].values()) / 1e9)
        assert row["floor_ms"] == pytest.approx(row["gb"] / bandwidth * 1e3)
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"]["median"])

    engine, *_, published = record["speeds"]
    assert engine["tpf_6"] == pytest.approx(6e3 / engine["step_ms"]["median"])
    assert published == {"case": "published: two H200, not measured here", "reported": 1338.0}
    assert "published: two H200, not measured here" in shown.getvalue()
    assert all(row["target"] is None for row in record["ratios"])  # none was set for this size


def test_the_full_model_is_drawn_on_its_device() -> None:
    model = llada2_mini(torch.bfloat16, torch.device("meta")).model
    biases = [buffer for name, buffer in model.named_buffers() if "expert_bias" in name]
    tensors = [*model.parameters(), *biases]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert sum(tensor.numel() for tensor in tensors) == 16_255_643_392


def test_a_gpu_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))
    with pytest.raises(InputError, match="needs 36 GiB of free GPU memory, this GPU has 24"):
        build(gpu.FULL, torch.device("cuda"))


def test_too_few_steps() -> None:
    with pytest.raises(InputError, match="`steps` must be a whole number of at least 2"):
        replace(bench.SMALL, steps=1)
    with pytest.raises(InputError, match="`new_tokens` must be a whole number of at least 64"):
        replace(bench.SMALL, new_tokens=32)


def test_targets_belong_to_a_gpu_and_the_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    assert bench.targets(cuda, bench.SMALL) is None
    assert bench.targets(CPU, bench.FULL) is None
    aims = bench.targets(cuda, bench.FULL)
    engine = _steps("engine", 4.0, of_floor=0.8)
    measured = [engine, _steps("grouped_mm", 24.0), _steps("int8 experts", 3.0)]
    rows = {row["name"]: row for row in bench.ratios(measured, aims).rows}
    assert rows["share of the floor"]["met"] is True
    assert rows["tokens/s at TPF 6"] == {
        "name": "tokens/s at TPF 6",
        "value": 1500,
        "target": ">= 1395",
        "met": True,
    }
    assert rows["engine / grouped_mm"] == {
        "name": "engine / grouped_mm",
        "value": 6,
        "target": ">= 5",
        "met": True,
    }
    assert rows["tokens/s at TPF 6, int8 experts"]["met"] is False
    assert rows["tokens/s at TPF 6 / published on two H200"]["value"] == pytest.approx(1500 / 1338)
    assert bench.ratios([{"case": "engine", "error": "out of memory"}], aims).rows == []


def _steps(case: str, ms: float, **more: Any) -> dict[str, Any]:
    return {"case": case, "batch": 1, "step_ms": {"median": ms}, **more}


def test_failures_become_rows(small: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure(RuntimeError("CUDA out of memory.\nTried")) == {"error": "CUDA out of memory."}
    assert failure(torch.OutOfMemoryError()) == {"error": "OutOfMemoryError"}

    def measure(*_: object, **__: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(gpu, "measure_steps", measure)
    prescribe(small.model, replayed(small.model.config, 8.7, 2, 32))
    row = gpu.step_row(small, "engine", bench.SMALL, {"median": 1e9})
    assert row["error"] == "CUDA out of memory."
    assert "step_ms" not in row and gpu.speed(row, 6) is None
    (cells,) = gpu.step_table("steps", "steps", [row]).cells
    assert cells["ms/step"] == "–" and cells["problem"] == "CUDA out of memory."


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distinct", "experts", "total"), [(163.3, 19_522, 20.83), (69.5, 8_308, 9.62)]
)
def test_bytes_of_a_forward(distinct: float, experts: float, total: float) -> None:
    model = llada2_mini(torch.bfloat16, torch.device("meta")).model
    prescribe(model, replayed(MINI, 69.5, 2, 32))
    parts = forward_bytes(model, distinct, context=1024)
    mega = {name: value / 1e6 for name, value in parts.items()}
    assert mega["experts"] == pytest.approx(experts, rel=1e-3)
    others = {
        "attention": 419,
        "shared_experts": 120,
        "router": 20,
        "dense_layers": 63,
        "head": 644,
        "cache": 42,
    }
    assert {name: round(value) for name, value in mega.items() if name != "experts"} == others
    assert sum(parts.values()) / 1e9 == pytest.approx(total, abs=0.01)


def test_bytes_of_quantised_experts() -> None:
    hidden = 256
    inner = 128
    one = 3 * inner * hidden
    scales = 2 * inner + hidden  # one for each output channel of gate, up and down
    expected = {
        None: 2 * one,
        "int8": one + 4 * scales,
        "fp8": one + 4 * scales,
        "int4": one / 2 + 2 * one / 128,  # a scale for 128 input channels
    }
    sizes = {"num_hidden_layers": 2, "hidden_size": hidden, "moe_intermediate_size": inner}
    for form, num_bytes in expected.items():
        model = llada2_mini(torch.bfloat16, CPU, **bench.SMALL_SHAPE | sizes).model
        if form is not None:
            quantize_experts(model, form)  # type: ignore[arg-type]
        assert forward_bytes(model, 1, context=32)["experts"] == num_bytes


def test_the_floor_of_a_time() -> None:
    found = against_floor({"median": 4.0}, {"a": 2e9, "b": 1e9}, {"median": 1.5e12})
    assert (found["gb"], found["floor_ms"], found["of_floor"]) == (3.0, 2.0, 0.5)


# --- routing --------------------------------------------------------------------------------------


def test_counts_have_the_mean_that_was_asked_for() -> None:
    assert counts_of_mean(69.5, 4) == [70, 69, 69, 70]
    assert sum(counts_of_mean(8.7, 100)) == 870


def test_blocks_are_hit_by_distinct_experts_of_a_set_of_their_own() -> None:
    tables = replayed(MINI, 69.5, 2, 32)
    assert len(tables) == 19 and tables[0].shape == (64, 8)
    counts = []
    for table in tables:
        first, second = table.split(32)
        counts += [len(first.unique()), len(second.unique())]
        assert set(first.unique().tolist()) != set(second.unique().tolist())
        assert all(len(set(row)) == 8 for row in table.tolist())
    assert set(counts) == {69, 70} and sum(counts) / len(counts) == 69.5


@pytest.mark.parametrize(
    ("tokens", "distinct"), [(16, 102.0), (32, 163.3), (64, 222.4), (128, 251.6), (256, 255.9)]
)
def test_uniform_choices_hit_as_many_as_expected(tokens: int, distinct: float) -> None:
    assert 256 * (1 - (1 - 8 / 256) ** tokens) == pytest.approx(distinct, abs=0.05)
    tables = uniform(LLaDA2MoeConfig(num_hidden_layers=2), tokens * 50)
    (table,) = tables
    assert all(len(set(row)) == 8 for row in table.tolist())
    mean = sum(len(block.unique()) for block in table.split(tokens)) / 50
    assert mean == pytest.approx(distinct, abs=2)


def test_a_model_reads_the_experts_it_is_told_to(small: Checkpoint) -> None:
    model: Any = small.model
    tokens = torch.zeros((1, 32), dtype=torch.long)
    prompt = torch.zeros((1, 96), dtype=torch.long)
    with torch.no_grad():
        with counted(model) as alike:
            model.model(input_ids=prompt)
        for distinct, expected in ((8.5, [8, 9]), (20, [20, 20])):
            prescribe(model, replayed(model.config, distinct, 2, 32))
            with counted(model) as found:
                model.model(input_ids=tokens)
            assert found == expected
            assert distinct_experts(model, 32) == sum(expected) / 2
        with counted(model) as found:
            model.model(input_ids=prompt)  # longer than what is prescribed
        assert found == alike


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Distinct experts of each layer and forward, in the order in which they run."""
    found: list[int] = []
    layers = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    hooks = [
        experts.register_forward_pre_hook(lambda _, inputs: found.append(len(inputs[1].unique())))
        for experts in layers
    ]
    yield found
    for hook in hooks:
        hook.remove()


# --- steps ----------------------------------------------------------------------------------------


def test_every_block_takes_the_steps_it_is_told_to(small: Checkpoint) -> None:
    llm = LLM.from_checkpoint(small, max_batch_size=2)
    engine = llm.engine(max_length=160, prefill_tokens=64)
    params = never_sure(96, 3)
    requests = [Request(index, tuple(range(index, index + 64)), params) for index in range(2)]
    times = step_times(engine, requests)
    assert [is_first for _, is_first in times] == [True, False, False] * 3
    assert all(ms > 0 for ms, _ in times)


def test_sequences_of_a_batch_stay_in_step(
    small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = list[bool]()

    def step_firsts(engine: Engine, prompts: list[list[int]], new_tokens: int, **_: int) -> Row:
        params = never_sure(new_tokens, 3)
        requests = [Request(index, tuple(ids), params) for index, ids in enumerate(prompts)]
        firsts.extend(is_first for _, is_first in step_times(engine, requests))
        return {}

    monkeypatch.setattr(gpu, "measure_steps", step_firsts)
    options = replace(bench.SMALL, context=512, new_tokens=64)
    llm = LLM.from_checkpoint(small, max_batch_size=4)
    gpu.run_steps(llm, options, cuda_graphs=False)
    assert firsts == [True, False, False] * 2


def test_steps_are_those_after_the_first_block(small: Checkpoint) -> None:
    engine = LLM.from_checkpoint(small, max_batch_size=1).engine(max_length=128)
    row = measure_steps(engine, [range(64)], 64, steps=4, repeats=1)
    assert row["tpf"] == 8 and row["peak_gib"] is None
    # At least, for 32 tokens.
    seconds = (3 * row["step_ms"]["low"] + row["first_step_ms"]["median"]) / 1e3
    assert 32 / row["tokens_per_second"]["median"] >= seconds
