"""Compiled forwards: a graph for a single row, one for any other number, and what they decode."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import dense_decoder, engine_of, random_prompts, run
from torch._dynamo.testing import CompileCounter

from dmax.engine import runner
from dmax.engine.request import Request
from dmax.environment import lacks_compiler
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams

THRESHOLD = DecodingParams(strategy="threshold", threshold=0.9, max_new_tokens=40)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def requests(*lengths: int) -> list[Request]:
    prompts = random_prompts(*lengths)
    return [Request(index, prompt, THRESHOLD) for index, prompt in enumerate(prompts)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts graphs, which run as they are; a break in one is an error."""
    counter = CompileCounter()
    compile_ = torch.compile

    def without_breaks(encode: Callable[..., Any]) -> Any:
        return compile_(encode, backend=counter, fullgraph=True)

    monkeypatch.setattr(runner.torch, "compile", without_breaks)
    return counter


def test_two_graphs_serve_every_batch_and_length(
    golden: tuple[str, Any, dict[str, Any]], graphs: CompileCounter
) -> None:
    _, checkpoint, _ = golden
    engine = engine_of(checkpoint, compile_model=True)
    for lengths in ((9,), (3, 40, 17), (3, 20, 35, 60, 1), (70, 130), (5,)):
        batch = requests(*lengths)
        assert run(engine, *batch) == run(engine_of(checkpoint), *batch)
    assert graphs.frame_count == 2


def test_dense_decoders_compile_too(graphs: CompileCounter) -> None:
    checkpoint = dense_decoder(vocab_size=400)
    engine = engine_of(checkpoint, compile_model=True)
    for lengths in ((9,), (3, 40, 17), (70, 130)):
        batch = requests(*lengths)
        assert run(engine, *batch) == run(engine_of(checkpoint), *batch)
    assert graphs.frame_count == 2


def test_our_kernels_are_traced_into_one_graph() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("traced.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    norm_and_attend = ["_norm_kernel", "_prepare_kernel", "_attend_kernel", "_merge_kernel"]
    experts = ["_logits_kernel", "_select_kernel", "_gate_up_kernel", "_down_kernel"]
    layers = [*norm_and_attend, "_norm_kernel"] * 2  # the first has no experts
    assert json.loads(done.stdout) == [*layers, *experts, "_norm_kernel"]


# The compiler takes half a minute, so one model is enough.
@pytest.mark.parametrize("golden", ["llada2_moe_a"], indirect=True)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_code_decodes_the_same(golden: tuple[str, Any, dict[str, Any]]) -> None:
    _, checkpoint, _ = golden
    batch = requests(3, 40, 17)
    compiled = run(engine_of(checkpoint, compile_model=True), *batch)
    assert compiled == run(engine_of(checkpoint), *batch)


def test_a_missing_compiler_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        InputError, match="takes a C\\+\\+ compiler, and no-such-compiler is not here"
    ):
        LLM("tiny-dmax", device="cpu", compile_model=True)
    assert lacks_compiler(torch.device("meta")) is None  # another compiler makes its code
