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

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
PINNED = ROOT / ".triton"  # the Triton of GPU machines, where `make test-triton` puts it
SHARED = 227 * 1024  # bytes that a program can have at most
REGISTERS = 254  # that a thread may have; with 255 it spills
BANDWIDTH = 3.35  # TB/s of an H100's memory, by its data sheet
IN_FLIGHT = 140 * 1024  # bytes of copies on their way to a multiprocessor, or more
TOKENS = 3.7  # that an expert has, of the 16 in a tile; others are not copied
MAX_KERNELS = 230  # of a step; a divided product is two
MAX_KERNELS_PER_LAYER = 11
MARGIN = 1.5  # of a loop's ceiling over it, so that reading decides, not arithmetic

Compiled = list[dict[str, Any]]


def output(tool: str, *arguments: str, triton: Path | None = None) -> list[str]:
    """What a program prints that has Triton's compiler, not its interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if tool == "compile_kernels.py":
        environment["DMAX_PDL"] = "1"  # which adds two instructions to each kernel
    if triton is not None:
        paths = (str(triton), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module", params=["installed", "pinned"])
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """What the compiler of each Triton makes for an H100."""
    triton = PINNED if request.param == "pinned" else None
    if triton is not None and not triton.is_dir():
        pytest.skip("`make test-triton` puts the Triton of GPU machines beside the installed one")
    return [json.loads(line) for line in output("compile_kernels.py", "90", triton=triton)]


def loops(compiled: Compiled, form: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Loops that read weights, or keys and values, of kernels whose case begins with `form`."""
    return [
        (f"{each['case']}: {each['kernel']}", loop)
        for each in compiled
        if each["case"].startswith(form)
        for loop in each["loops"]
    ]


def test_every_kernel_fits_an_h100(compiled: Compiled) -> None:
    assert {each["kernel"] for each in compiled} == {
        "_route_kernel", "_gate_up_kernel", "_down_kernel", "_tile_kernel", "_blend_kernel",
        "_select_kernel", "_prepare_kernel", "_attend_kernel", "_merge_kernel", "_norm_kernel",
        "_decide_kernel", "_merge_tiles_kernel", "_add_noise_kernel", "_logits_kernel",
    }  # fmt: skip
    assert [each for each in compiled if each["shared"] > SHARED] == []
    assert [each for each in compiled if each["registers"] > REGISTERS] == []
    assert [each for each in compiled if each["spilled"]] == []


def test_every_kernel_that_reads_much_has_a_loop_that_streams(compiled: Compiled) -> None:
    names = {
        "_gate_up_kernel", "_down_kernel", "_tile_kernel", "_attend_kernel", "_logits_kernel",
    }  # fmt: skip
    assert {each["kernel"] for each in compiled if each["loops"]} == names
    assert [each for each in compiled if each["kernel"] in names and not each["loops"]] == []


def test_kernels_that_start_early_touch_nothing_before_they_may(compiled: Compiled) -> None:
    """Programmatic dependent launch; some part of every kernel reads what one before it wrote."""
    early = {each["kernel"] for each in compiled if each["before_wait"] is not None}
    assert early == {
        "_norm_kernel", "_blend_kernel", "_decide_kernel", "_prepare_kernel", "_attend_kernel",
        "_merge_kernel", "_tile_kernel", "_merge_tiles_kernel", "_logits_kernel", "_select_kernel",
        "_route_kernel", "_gate_up_kernel", "_down_kernel",
    }  # fmt: skip
    assert [each for each in compiled if each["before_wait"]] == []


def test_loops_run_on_tensor_cores_and_keep_to_registers(compiled: Compiled) -> None:
    assert [name for name, loop in loops(compiled) if not loop["tensor"]] == []
    assert [name for name, loop in loops(compiled) if loop["local"]] == []


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8", "int4", "head", "attention"])
def test_loops_are_bound_by_memory(compiled: Compiled, form: str) -> None:
    """Few tokens: a block, or two. With more tokens, products take longer than reading."""
    few = [(name, loop) for name, loop in loops(compiled, form) if " 512 tokens" not in name]
    assert few
    slow = {
        name: loop["ceilings"]
        for name, loop in few
        if min(loop["ceilings"].values()) < MARGIN * BANDWIDTH
    }
    converting = [name for name, loop in loops(compiled, form) if loop["conversions"]]
    narrow = [name for name, loop in loops(compiled, form) if loop["copies"] != [16]]
    assert slow == {}
    assert converting == []
    assert narrow == []


def test_experts_keep_enough_copies_on_their_way(compiled: Compiled) -> None:
    """Of weights and of the tokens that there are; the last of the stages is at work."""
    experts = [each for each in compiled if "experts, 32 tokens" in each["case"] and each["loops"]]
    assert len(experts) == 8
    in_flight = {}
    for each in experts:
        ahead = each["stages"] - 1
        of_weights = max(loop["streamed_bytes"] for loop in each["loops"]) * each["warps"] * ahead
        of_tokens = (each["shared"] - of_weights) * TOKENS / 16
        name = f"{each['case']}: {each['kernel']}"
        in_flight[name] = each["programs"] * (of_weights + of_tokens)
    assert {name: size for name, size in in_flight.items() if size < IN_FLIGHT} == {}


def test_experts_compile_for_an_a100() -> None:
    lines = output("compile_kernels.py", "80", "experts, 32 tokens")
    compiled = [json.loads(line) for line in lines]
    names = {each["kernel"] for each in compiled}
    assert names == {"_route_kernel", "_gate_up_kernel", "_down_kernel"}
    formats = {each["case"].partition(" ")[0] for each in compiled}
    assert formats == {"bf16", "int8", "int4"}  # later cards have fp8
    products = [each for each in compiled if each["kernel"] != "_route_kernel"]
    assert [each for each in products if not each["loops"]] == []
    assert [name for name, loop in loops(products) if not loop["tensor"]] == []
    assert [each for each in compiled if each["before_wait"] is not None] == []


def test_a_step_has_few_kernels() -> None:
    """A kernel takes a GPU two microseconds or more; a step has three milliseconds for weights."""
    pattern = re.compile(r"(with\w*) Triton (\d+) kernels, (\d+) of each layer")
    told = [pattern.match(line) for line in output("count_kernels.py")]
    found = {match[1]: (int(match[2]), int(match[3])) for match in told if match}
    in_all, of_each_layer = found["without"]
    assert in_all > 1000 and of_each_layer > 50
    in_all, of_each_layer = found["with"]
    assert in_all <= MAX_KERNELS and of_each_layer <= MAX_KERNELS_PER_LAYER


def test_a_prompt_takes_no_more_memory_when_it_is_longer() -> None:
    """A mask of 16,384 positions for 512 of them, and repeated keys, took 141 MiB beside the 23."""
    rows = [line.strip("| ").split(" | ") for line in output("count_prefill_bytes.py")[2:]]
    mask, blocks, kernels = zip(*(map(int, row[1:]) for row in rows), strict=True)
    assert mask[-1] > 6 * mask[0]
    assert max(*blocks, *kernels) <= mask[0]
