"""Device and dtype suit the machine, wrong names get the valid ones; the record is complete."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dmax
from dmax import environment as module
from dmax.environment import (
    environment,
    on_device,
    select_device,
    select_dtype,
    sum_in_float32,
)
from dmax.errors import InputError, did_you_mean

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_an_error_reads_as_message_then_hint() -> None:
    error = InputError("`threshold` must lie in [0, 1], got 1.5", hint="0.5 is the paper's setting")
    assert (
        str(error) == "`threshold` must lie in [0, 1], got 1.5\n\nhint: 0.5 is the paper's setting"
    )
    assert (error.message, error.hint) == (
        "`threshold` must lie in [0, 1], got 1.5",
        "0.5 is the paper's setting",
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_without_hint_is_its_message() -> None:
    assert str(InputError("no prompt given")) == "no prompt given"
    assert InputError("unknown task 'x'", did_you_mean("x", ["gsm8k"])).hint is None


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("treshold", iter(["spd", "threshold"])) == "did you mean `threshold`?"


def test_auto_takes_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == CUDA


@pytest.mark.parametrize("device", ["cpu", CPU])
def test_a_device_that_is_asked_for_is_taken(device: Any) -> None:
    assert select_device(device) == CPU


@pytest.mark.parametrize("device", [1.5, {}, 10**400, None])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(InputError, match="unknown device .*; choose from auto"):
        select_device(device)


def test_an_unknown_device_is_answered_with_the_choices() -> None:
    with pytest.raises(
        InputError, match=re.escape("unknown device 'cdua'; choose from auto, cpu, cuda, mps")
    ) as error:
        select_device("cdua")
    assert error.value.hint == "did you mean `cuda`?"


def test_a_device_this_machine_lacks_is_said_to_be_missing() -> None:
    for device in ("cuda:99", "meta"):
        with pytest.raises(InputError, match=f"device '{device}' is not available on this machine"):
            select_device(device)


def test_a_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(chosen.append(device)))
    with on_device(torch.device("cuda", 1)), on_device(CPU):
        assert chosen == [torch.device("cuda", 1)]


def test_a_gpu_sums_products_of_16_bits_in_float32() -> None:
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, True)
        sum_in_float32(CPU)
        assert all(getattr(matmul, name) for name in names)
        sum_in_float32(CUDA)
        assert not any(getattr(matmul, name) for name in names)
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_dtype_on_a_gpu_is_what_it_computes_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select_dtype("auto", CUDA) is dtype


def test_auto_dtype_on_a_cpu_is_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmax.environment._cpu_has_bfloat16", lambda: False)
    assert select_dtype("auto", CPU) is torch.float32
    monkeypatch.setattr("dmax.environment._cpu_has_bfloat16", lambda: True)
    assert select_dtype("auto", CPU) is torch.bfloat16
    assert select_dtype("bfloat16", CPU) is torch.bfloat16
    assert select_dtype(torch.bfloat16, CPU) is torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat61", "int8", torch.int64])
def test_an_unknown_dtype_is_answered_with_the_choices(dtype: Any) -> None:
    with pytest.raises(InputError, match="choose from auto, float32, bfloat16, float16"):
        select_dtype(dtype, CPU)


def test_the_record_is_json_with_versions() -> None:
    record = json.loads(json.dumps(environment()))
    assert record.keys() >= {
        "date",
        "dmax",
        "commit",
        "python",
        "torch",
        "transformers",
        "cpu",
        "cores",
        "threads",
    }
    assert record["device"] == "cpu"
    assert record["dmax"] in (
        dmax.__version__,
        None,
    )  # None: run from a checkout that is not installed
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()


def test_the_record_names_a_gpu_and_its_power_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, uuid="1b2c")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        module, "_output", lambda command: "700.00" if "--id=GPU-1b2c" in command else None
    )
    record = environment("cuda")
    assert (record["gpu"], record["gpu_memory_gib"], record["gpu_power_limit_w"]) == (
        "NVIDIA H100",
        80.0,
        700.0,
    )


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("git", 5)])
def test_missing_or_hanging_programs_leave_a_gap(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert environment()["commit"] is None
