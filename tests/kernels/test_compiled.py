"""What Triton's compiler makes of the kernels for an H100, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
SHARED = 227 * 1024  # bytes that a program can have at most
REGISTERS = 255  # that a thread can have at most, and has if it spills


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="triton is not installed")
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "90"]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_fits_an_h100(kernels: list[dict[str, Any]]) -> None:
    assert {each["kernel"] for each in kernels} == {
        "_route_kernel", "_gate_up_kernel", "_down_kernel", "_tile_kernel", "_blend_kernel"
    }  # fmt: skip
    assert [each for each in kernels if each["shared"] > SHARED or each["registers"] >= REGISTERS] == []
    assert [each for each in kernels if each["spilled"]] == []


def test_products_run_on_tensor_cores_and_weights_come_in_wide_copies(kernels: list[dict[str, Any]]) -> None:
    products = [each for each in kernels if each["kernel"] in ("_gate_up_kernel", "_down_kernel", "_tile_kernel")]
    assert [each for each in products if not each["tensor_cores"]] == []
    for each in products:  # half a group of int4 weights is 64 bytes a row; the rest comes in lines of 16 bytes
        assert each["async_copies"] == ([8, 16] if each["case"].startswith("int4") else [16]), each
