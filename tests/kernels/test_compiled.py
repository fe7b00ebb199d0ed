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
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    lines = output(tmp_path_factory.mktemp("triton"), "compile_kernels.py", "90")
    return [json.loads(line) for line in lines]


def test_every_kernel_fits_an_h100(compiled: list[dict[str, Any]]) -> None:
    assert {each["kernel"] for each in compiled} == {
        "_route_kernel", "_gate_up_kernel", "_down_kernel", "_tile_kernel", "_blend_kernel",
        "_select_kernel", "_prepare_kernel", "_attend_kernel", "_merge_kernel", "_norm_kernel",
    }  # fmt: skip
    assert [each for each in compiled if each["shared"] > SHARED] == []
    assert [each for each in compiled if each["registers"] >= REGISTERS] == []
    assert [each for each in compiled if each["spilled"]] == []


def test_products_run_on_tensor_cores_and_weights_come_in_wide_copies(
    compiled: list[dict[str, Any]],
) -> None:
    names = ("_gate_up_kernel", "_down_kernel", "_tile_kernel", "_attend_kernel")
    products = [each for each in compiled if each["kernel"] in names]
    assert [each for each in products if not each["tensor_cores"]] == []
    for each in products:
        # Half a group of int4 weights is 64 bytes a row; the rest comes in lines of 16 bytes.
        sizes = [8, 16] if each["case"].startswith("int4") else [16]
        assert each["async_copies"] == sizes, each


def test_experts_compile_for_an_a100(tmp_path: Path) -> None:
    lines = output(tmp_path, "compile_kernels.py", "80", "experts, 32 tokens")
    compiled = [json.loads(line) for line in lines]
    names = {each["kernel"] for each in compiled}
    assert names == {"_route_kernel", "_gate_up_kernel", "_down_kernel"}
    formats = {each["case"].partition(" ")[0] for each in compiled}
    assert formats == {"bf16", "int8", "int4"}  # later cards have fp8
    products = [each for each in compiled if each["kernel"] != "_route_kernel"]
    assert [each for each in products if each["tensor_cores"] != "mma"] == []
    assert [each for each in products if not each["async_copies"]] == []


def test_a_step_has_few_kernels(tmp_path: Path) -> None:
    """A kernel takes a GPU a microsecond or two; a step has three milliseconds to read weights."""
    pattern = re.compile(r"(with\w*) Triton (\d+) kernels, (\d+) of each layer")
    told = [pattern.match(line) for line in output(tmp_path, "count_kernels.py")]
    found = {match[1]: (int(match[2]), int(match[3])) for match in told if match}
    in_all, of_each_layer = found["without"]
    assert in_all > 1000 and of_each_layer > 50
    in_all, of_each_layer = found["with"]
    # 518 when comparisons of bools saved some: `a & ~b` reads better and is two kernels.
    assert in_all <= 535 and of_each_layer <= 21
