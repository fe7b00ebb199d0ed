"""The GPU benchmark on a small model and a CPU: it runs, routes as told, and counts bytes as by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from dmax.benchmark import gpu, rig
from dmax.benchmark.rig import SMALL, TINY, build, failure
from dmax.benchmark.roofline import expected_distinct, expert_bytes, forward_bytes
from dmax.benchmark.routing import counted, counts_of_mean, pooled, prescribe, uniform
from dmax.benchmark.run import run_gpu
from dmax.benchmark.shapes import llada2_mini
from dmax.benchmark.steps import measure_steps, never_sure, step_times
from dmax.checkpoint import Checkpoint
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.models import LLaDA2MoeConfig

CPU = torch.device("cpu")
MINI = LLaDA2MoeConfig()
SECTIONS = "machine forwards steps batches contexts quantised speeds ratios".split()


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    return llada2_mini(torch.float32, CPU, **TINY)


def test_everything_runs_on_a_small_model() -> None:
    options = replace(SMALL, contexts=(128, 192), forwards=1, steps=2)
    shown = io.StringIO()
    record = run_gpu(options, CPU, console=Console(file=shown, width=200))
    json.dumps(record)
    assert list(record) == ["benchmark", "command", "environment", "settings", "notes", *SECTIONS]
    assert record["environment"]["device"] == "cpu" and "gpu" not in record["environment"]
    assert not [row for name in SECTIONS for row in record[name] if "error" in row]

    assert [row["experts"] for row in record["forwards"]] == [
        "fused_moe",
        "grouped_mm",
        "batched_mm",
        "eager",
    ] * 2
    assert [row["distinct"] for row in record["forwards"][::4]] == [
        8.5,
        pytest.approx(31.5, abs=0.6),
    ]
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
    tensors = [
        *model.parameters(),
        *(buffer for name, buffer in model.named_buffers() if "expert_bias" in name),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert sum(tensor.numel() for tensor in tensors) == 16_255_643_392


def test_a_gpu_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))
    with pytest.raises(InputError, match="needs 36 GiB of free GPU memory, this GPU has 24"):
        build(rig.FULL, torch.device("cuda"))


def test_too_few_steps() -> None:
    with pytest.raises(InputError, match="`steps` must be a whole number of at least 2"):
        replace(SMALL, steps=1)


def test_targets_belong_to_a_gpu_and_the_full_size(
    small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    steps = [_steps("engine", 4.0, of_floor=0.8), _steps("grouped_mm", 24.0)]
    quantised = [_steps("int8 experts", 3.0)]
    on_h100 = rig.Rig(small, rig.FULL, torch.device("cuda"), {"median": 3e12})
    rows = {row["name"]: row for row in gpu.ratios(on_h100, steps, quantised).rows}
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
    assert gpu.ratios(on_h100, [{"case": "engine", "error": "out of memory"}], []).rows == []


def _steps(case: str, ms: float, **more: float) -> dict[str, Any]:
    return {"case": case, "batch": 1, "step_ms": {"median": ms}, **more}


def test_failures_become_rows() -> None:
    assert failure(RuntimeError("CUDA out of memory.\nTried")) == {"error": "CUDA out of memory."}
    assert failure(torch.OutOfMemoryError()) == {"error": "OutOfMemoryError"}


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "distinct"), [(16, 102.0), (32, 163.3), (64, 222.4), (128, 251.6), (256, 255.9)]
)
def test_distinct_experts_of_uniform_routing(tokens: int, distinct: float) -> None:
    assert expected_distinct(256, 8, tokens) == pytest.approx(distinct, abs=0.05)


@pytest.mark.parametrize(
    ("distinct", "experts", "total"), [(163.3, 19_522, 20.83), (69.5, 8_308, 9.62)]
)
def test_bytes_of_a_forward(distinct: float, experts: float, total: float) -> None:
    parts = forward_bytes(MINI, distinct=distinct, context=1024)
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
    one = 3 * 512 * 2048
    assert expert_bytes(MINI, 2, None) == 2 * one
    assert expert_bytes(MINI, 2, "int8") == expert_bytes(MINI, 2, "fp8") == one + 4 * (1024 + 2048)
    assert expert_bytes(MINI, 2, "int4") == one / 2 + 2 * one / 128
    total = sum(forward_bytes(MINI, distinct=163.3, context=1024, quantization="fp8").values())
    assert total / 1e9 == pytest.approx(11.07, abs=0.05)


def test_bytes_of_quantised_experts_are_those_they_hold(small: Checkpoint) -> None:
    from dmax.models.quantization import quantize_experts

    for form in ("int8", "fp8", "int4"):
        model: Any = llada2_mini(torch.bfloat16, CPU, **TINY).model
        quantize_experts(model, form)  # type: ignore[arg-type]
        held = sum(
            each.numel() * each.element_size()
            for each in model.model.layers[1].mlp.experts.buffers()
        )
        assert held == model.config.num_experts * expert_bytes(model.config, 2, form)  # type: ignore[arg-type]


# --- routing --------------------------------------------------------------------------------------


def test_counts_have_the_mean_that_was_asked_for() -> None:
    assert counts_of_mean(69.5, 4) == [70, 69, 69, 70]
    assert sum(counts_of_mean(8.7, 100)) == 870


def test_pools_are_hit_whole_and_by_distinct_experts() -> None:
    table = pooled(256, 8, [69, 70], 32, torch.Generator().manual_seed(0))
    assert table.shape == (64, 8)
    first, second = table.split(32)
    assert (len(first.unique()), len(second.unique())) == (69, 70)
    assert set(first.unique().tolist()) != set(second.unique().tolist())
    assert all(len(set(row)) == 8 for row in table.tolist())


def test_uniform_choices_hit_as_many_as_expected() -> None:
    table = uniform(256, 8, 32 * 50, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 8 for row in table.tolist())
    mean = sum(len(block.unique()) for block in table.split(32)) / 50
    assert mean == pytest.approx(163.3, abs=2)


def test_a_model_reads_the_experts_it_is_told_to(small: Checkpoint) -> None:
    model: Any = small.model
    tokens, prompt = torch.zeros((1, 32), dtype=torch.long), torch.zeros((1, 96), dtype=torch.long)
    with torch.no_grad():
        with counted(model) as alike:
            model.model(input_ids=prompt)
        for distinct, expected in ((8.5, [8, 9]), (20, [20, 20])):
            prescribe(model, distinct, 2, 32)
            with counted(model) as found:
                model.model(input_ids=tokens)
            assert found == expected
        with counted(model) as found:
            model.model(input_ids=prompt)  # longer than what is prescribed
        assert found == alike


# --- steps ----------------------------------------------------------------------------------------


def test_every_block_takes_the_steps_it_is_told_to(small: Checkpoint) -> None:
    engine = Engine(
        small.model,
        mask_token_id=510,
        eos_token_ids=[511],
        block_length=32,
        max_batch_size=2,
        prefill_tokens=64,
    )
    requests = [
        Request(index, tuple(range(index, index + 64)), never_sure(96, 3)) for index in range(2)
    ]
    times = step_times(engine, requests)
    assert [is_first for _, is_first in times] == [True, False, False] * 3
    assert all(ms > 0 for ms, _ in times)


def test_steps_are_those_behind_the_first_block(small: Checkpoint) -> None:
    row = measure_steps(
        small,
        batch=1,
        context=128,
        new_tokens=64,
        steps=4,
        repeats=1,
        cuda_graphs=False,
        prefill_tokens=32,
    )
    assert row["tpf"] == 8 and row["peak_gib"] is None
    seconds = (
        3 * row["step_ms"]["low"] + row["first_step_ms"]["median"]
    ) / 1e3  # at least, for 32 tokens
    assert 32 / row["tokens_per_second"]["median"] >= seconds
