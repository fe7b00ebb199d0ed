"""What Triton's compiler makes of the kernels for an H100, on a machine that has none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
SHARED = 227 * 1024  # bytes that a program can have at most
REGISTERS = 255  # that a thread can have at most, and has if it spills


def output(cache: Path, tool: str, *arguments: str) -> list[str]:
    """What a program prints that has Triton's compiler, not its interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(
        command,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in output(tmp_path_factory.mktemp("triton"), "compile_kernels.py", "90")
    ]


def test_every_kernel_fits_an_h100(kernels: list[dict[str, Any]]) -> None:
    assert {each["kernel"] for each in kernels} == {
        "_route_kernel", "_gate_up_kernel", "_down_kernel", "_tile_kernel", "_blend_kernel", "_select_kernel",
        "_prepare_kernel", "_attend_kernel", "_merge_kernel", "_norm_kernel",
    }  # fmt: skip
    assert [
        each for each in kernels if each["shared"] > SHARED or each["registers"] >= REGISTERS
    ] == []
    assert [each for each in kernels if each["spilled"]] == []


def test_products_run_on_tensor_cores_and_weights_come_in_wide_copies(
    kernels: list[dict[str, Any]],
) -> None:
    names = ("_gate_up_kernel", "_down_kernel", "_tile_kernel", "_attend_kernel")
    products = [each for each in kernels if each["kernel"] in names]
    assert [each for each in products if not each["tensor_cores"]] == []
    for each in (
        products
    ):  # half a group of int4 weights is 64 bytes a row; the rest comes in lines of 16 bytes
        assert each["async_copies"] == ([8, 16] if each["case"].startswith("int4") else [16]), each


def test_experts_compile_for_an_a100(tmp_path: Path) -> None:
    kernels = [
        json.loads(line)
        for line in output(tmp_path, "compile_kernels.py", "80", "experts, 32 tokens")
    ]
    assert {each["kernel"] for each in kernels} == {
        "_route_kernel",
        "_gate_up_kernel",
        "_down_kernel",
    }
    assert {each["case"].partition(" ")[0] for each in kernels} == {
        "bf16",
        "int8",
        "int4",
    }  # fp8 is of later ones
    products = [each for each in kernels if each["kernel"] != "_route_kernel"]
    assert [
        each for each in products if each["tensor_cores"] != "mma" or not each["async_copies"]
    ] == []


def test_a_step_has_few_kernels(tmp_path: Path) -> None:
    """Each takes a GPU a microsecond or two, whatever it does; a step has three milliseconds to read weights."""
    lines = output(tmp_path, "count_kernels.py")
    told = [
        re.match(r"(with\w*) Triton (\d+) kernels, (\d+) of each layer", line) for line in lines
    ]
    found = {match[1]: (int(match[2]), int(match[3])) for match in told if match}
    in_all, of_each_layer = found["without"]
    assert in_all > 1000 and of_each_layer > 50
    in_all, of_each_layer = found["with"]
    assert in_all <= 520 and of_each_layer <= 21
