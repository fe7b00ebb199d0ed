"""Compiles the Triton kernels for an NVIDIA GPU that need not be there; prints JSON lines.

    python tools/compile_kernels.py 90                # compute capability 9.0: H100, H200
    python tools/compile_kernels.py 80 "32 tokens"    # only what has that in its name
    PYTHONPATH=.triton python tools/compile_kernels.py 90    # with the Triton in that folder

The wrappers of `dmax.kernels` are called as they are, with tensors that have no data; a driver that
names the GPU stands in for the real one, and launches end after the compiler. Sizes are those of
LLaDA-2.0-mini. A line has what a program takes of the GPU, and what the loops do that read weights
or keys and values (`machine_code.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from machine_code import (
    accesses_before_wait,
    disassemble,
    programs_at_once,
    read_code,
    resources,
    streaming_loops,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dmax.blend import SoftTokens
from dmax.confidence import LARGEST, Candidates, GumbelNoise
from dmax.decoding import get_strategy
from dmax.engine.blocks import OpenBlocks
from dmax.kernels import (
    blend_triton,
    block_attention_triton,
    decide_triton,
    lm_head_triton,
    moe_triton,
    norm_triton,
    router_triton,
)
from dmax.kernels.quant import FP8
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

VOCABULARY = 157_184
HIDDEN = 2048
INNER = 512
EXPERTS = 256
CHOSEN = 8
MASK = 156_895
KEY_VALUE_HEADS = 4
HEAD_SIZE = 128
BF16 = torch.bfloat16
FORMATS = ("bf16", "int8", "fp8", "int4")
FP8_FROM = 89  # compute capability


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(rows: int, columns: int, form: str) -> moe_triton.Stored:
    """Stacked matrices [E, rows, columns]."""
    if form == "bf16":
        return new(EXPERTS, rows, columns), None, 0
    if form == "int4":
        packed = new(EXPERTS, rows, columns // 4, dtype=torch.int16)
        return packed, new(EXPERTS, rows, columns // 128), 128
    values = new(EXPERTS, rows, columns, dtype=torch.int8 if form == "int8" else FP8)
    return values, new(EXPERTS, rows, 1, dtype=torch.float32), 0


def experts(num_tokens: int, form: str) -> None:
    index = new(num_tokens, CHOSEN, dtype=torch.int64)
    routing = router_triton.route(index, new(num_tokens, CHOSEN), EXPERTS, CHOSEN + 1)
    gate_up = weight(2 * INNER, HIDDEN, form)
    down = weight(HIDDEN, INNER, form)
    shared = new(INNER, HIDDEN), new(INNER, HIDDEN), new(HIDDEN, INNER)
    moe_triton.expert_terms(new(num_tokens, HIDDEN), routing, gate_up, down, shared, True)


def lm_head(num_tokens: int, k: int) -> None:
    hidden = new(num_tokens, HIDDEN)
    noise = noise_of(num_tokens // 32)
    tiles = lm_head_triton.top_k_of_tiles(hidden, new(VOCABULARY, HIDDEN), k, MASK, LARGEST, noise)
    lm_head_triton.merge(tiles)


def noise_of(num_blocks: int) -> GumbelNoise:
    seeds = new(num_blocks, dtype=torch.int64)
    return GumbelNoise(seeds, new(num_blocks, dtype=torch.float32), seeds, seeds, 32)


def noise() -> None:
    lm_head_triton.add_noise(new(32, VOCABULARY, dtype=torch.float32), noise_of(1))


def open_blocks(k: int) -> OpenBlocks:
    """Two blocks that SPD decodes with k candidates, after their first step."""
    strategy = get_strategy(DecodingParams("spd", top_k=k))
    special_ids = SpecialIds(MASK, (0,), 0, 32)
    embed = torch.nn.Embedding(VOCABULARY, HIDDEN, device="meta", dtype=BF16)
    blocks = OpenBlocks(strategy, 2, special_ids, embed, torch.device("meta"))
    blocks.feedback["ids"] = new(2, 32, k, dtype=torch.int64)
    blocks.feedback["probs"] = new(2, 32, k, dtype=torch.float32)
    return blocks


def blend(k: int) -> None:
    blocks = open_blocks(k)
    candidates = (blocks.feedback["ids"], blocks.feedback["probs"])
    soft = SoftTokens(blocks.active, *candidates, masked=blocks.masked)
    rows = new(1, dtype=torch.int64)
    blend_triton.embed_soft(new(VOCABULARY, HIDDEN), blocks.tokens, soft, MASK, rows)


def decide(k: int, options: dict[str, bool]) -> None:
    strategy: Any = get_strategy(DecodingParams("spd", top_k=k, options=options))
    ids = new(1, 32, k, dtype=torch.int64)
    probs = new(1, 32, k, dtype=torch.float32)
    predicted = Candidates(ids, probs, new(1, 32, dtype=torch.bool))
    rows = new(1, dtype=torch.int64)
    decide_triton.decide(open_blocks(k), rows, predicted, **strategy.fused()[1])


def attention(num_rows: int, num_heads: int = 16) -> None:
    store = new(num_rows, 4096, KEY_VALUE_HEADS, HEAD_SIZE)
    numbers = new(num_rows, dtype=torch.int64)
    heads = new(num_rows, 32, num_heads + 2 * KEY_VALUE_HEADS, HEAD_SIZE)
    norm = new(HEAD_SIZE)
    turn = new(1, 4096, 1, HEAD_SIZE // 2)
    block_attention_triton.block_attention(
        heads, (norm, norm), 1e-6, (turn, turn), store, store,
        numbers, numbers, numbers, HEAD_SIZE**-0.5,
    )  # fmt: skip


def router(num_tokens: int) -> None:
    bias = new(EXPERTS, dtype=torch.float32)
    idle = new(num_tokens // 32, dtype=torch.bool)
    router_triton.route_tokens(
        new(num_tokens, HIDDEN), new(EXPERTS, HIDDEN), bias, idle, CHOSEN + 1, CHOSEN,
        num_groups=8, num_kept_groups=4, scaling=2.5,
    )  # fmt: skip


def norm(num_tokens: int) -> None:
    terms = new(num_tokens, CHOSEN + 1, HIDDEN)
    norm_triton.add_rms_norm(new(num_tokens, HIDDEN), terms, new(HIDDEN), 1e-6)


def cases(formats: Sequence[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    for form in formats:
        for num_tokens in (32, 512):
            yield f"{form} experts, {num_tokens} tokens", partial(experts, num_tokens, form)
    yield "bf16 experts, 64 tokens", partial(experts, 64, "bf16")
    for num_tokens, k in ((32, 1), (32, 4), (64, 1), (512, 4)):
        yield f"head, {num_tokens} tokens, top {k}", partial(lm_head, num_tokens, k)
    for k in (1, 4):
        yield f"blend of {k}", partial(blend, k)
        yield f"decision, top {k}", partial(decide, k, {})
    yield "decision for any position", partial(decide, 1, {"prefix_only": False})
    for num_rows in (1, 64):
        yield f"attention, {num_rows} rows", partial(attention, num_rows)
    yield "attention of 32 heads", partial(attention, 1, 32)  # LLaDA-2.0-flash
    yield "noise", noise
    for num_tokens in (32, 64, 512):
        yield f"router, {num_tokens} tokens", partial(router, num_tokens)
    yield "norm", partial(norm, 32)


def facts(name: str, kernel: Any) -> dict[str, Any]:
    """Of a compiled kernel: what a program takes of the GPU, and what its loops do."""
    cubin: bytes = kernel.asm["cubin"]
    code = read_code(disassemble(cubin))
    is_streaming = "cp.async" in kernel.asm["ptx"]
    taken = resources(cubin)
    warps = kernel.metadata.num_warps
    shared = kernel.metadata.shared
    return {
        "kernel": name,
        "triton": triton.__version__,
        "warps": warps,
        "stages": kernel.metadata.num_stages,
        "shared": shared,
        **taken,
        "programs": programs_at_once(taken["registers"], warps, shared),
        "before_wait": accesses_before_wait(code),
        "loops": list(streaming_loops(code)) if is_streaming else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capability", type=int, help="of the GPU, 80 or more: 90 for 9.0")
    parser.add_argument("part", nargs="?", default="", help="of the names of what is compiled")
    given = parser.parse_args()
    if given.capability < 80:
        parser.error(
            "the kernels are for compute capability 8.0 and later; "
            f"give 80 or more, got {given.capability}"
        )
    has_fp8 = given.capability >= FP8_FROM
    formats = [form for form in FORMATS if form != "fp8" or has_fp8]
    chosen = [(name, call) for name, call in cases(formats) if given.part in name]
    if not chosen:
        names = "; ".join(name for name, _ in cases(formats))
        parser.error(f"nothing has {given.part!r} in its name; there are: {names}")
    driver.set_active(AbsentGPU(given.capability))
    run = JITFunction.run
    compiled = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    with TemporaryDirectory() as folder:  # code in a cache may come from sources that have changed
        triton.knobs.cache.dir = folder
        for case, call in chosen:
            call()
            for name, kernel in compiled:
                print(json.dumps({"case": case} | facts(name, kernel)), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main()
