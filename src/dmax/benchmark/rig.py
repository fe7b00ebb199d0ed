"""The test rig of the GPU benchmark: LLaDA-2.0-mini with random weights on its device, and what the device can do.

`SMALL` is a shape of a few hundred thousand parameters, for seeing on a CPU that everything runs.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dmax.benchmark.measure import Spread
from dmax.benchmark.report import Row
from dmax.benchmark.roofline import forward_bytes
from dmax.benchmark.shapes import BLOCK_LENGTH, llada2_mini
from dmax.checkpoint import Checkpoint
from dmax.errors import InputError
from dmax.kernels.quant import Format
from dmax.params import check_number

ROOM_GIB = 36  # of the model, its cache and what a forward needs
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "mask_token_id": 510,
    "eos_token_id": 511,
    "pad_token_id": 511,
}


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What to measure.

    Attributes:
        distinct: experts that a block hits in a layer, on average: 69.5 is what others measured on
            LLaDA-2.0-mini.
        context: positions at the end of a completion, where nothing else is said.
        contexts: of the table of contexts.
        batch_sizes: of the table of batch sizes.
        new_tokens: of each completion.
        steps: denoising steps that every block takes.
        repeats: completions that are timed, behind two that warm up.
        forwards: timed for each row of the table of forwards.
        copy_bytes: size of the copy that measures bandwidth.
        changes: to the shape of LLaDA-2.0-mini.
    """

    distinct: float = 69.5
    context: int = 1024
    contexts: tuple[int, ...] = (1024, 4096, 8192, 16_384)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    new_tokens: int = 256
    steps: int = 5
    repeats: int = 3
    forwards: int = 30
    copy_bytes: int = 4 * 2**30
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `InputError` for too few steps or tokens to tell a block's first step from the others."""
        check_number("steps", self.steps, low=2, whole=True)
        check_number("new_tokens", self.new_tokens, low=2 * BLOCK_LENGTH, whole=True)


FULL = GpuOptions()
QUICK = replace(FULL, contexts=(1024, 8192), batch_sizes=(1, 8), repeats=1, forwards=10)
SMALL = GpuOptions(
    distinct=8.7,
    context=128,
    contexts=(128, 256),
    batch_sizes=(1, 2),
    new_tokens=64,
    steps=3,
    repeats=1,
    forwards=2,
    copy_bytes=2**20,
    changes=TINY,
)


@dataclass(slots=True)
class Rig:
    """The model on its device, and what the device can do.

    Attributes:
        checkpoint: the model.
        options: what to measure.
        device: where the model is.
        bandwidth: bytes per second of a copy, reading and writing counted.
    """

    checkpoint: Checkpoint
    options: GpuOptions
    device: torch.device
    bandwidth: Spread

    @property
    def on_gpu(self) -> bool:
        """Whether graphs and fused kernels are to be had."""
        return self.device.type == "cuda"

    def rebuild(self) -> None:
        """The model anew, for which the old one makes room."""
        del self.checkpoint
        self.free()
        self.checkpoint = build(self.options, self.device)

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def against_floor(
        self,
        row: Row,
        key: str,
        *,
        context: float,
        batch: int = 1,
        quantization: Format | None = None,
    ) -> Row:
        """`row` with the bytes of a forward over `row["distinct"]` experts, and how the time `key` compares to theirs.

        `floor_ms` is what reading the bytes takes at the bandwidth of a copy, `of_floor` its share
        of the time.
        """
        parts = forward_bytes(
            self.checkpoint.model.config,
            distinct=row["distinct"],
            context=context,
            batch=batch,
            quantization=quantization,
        )
        total = sum(parts.values())
        floor = total / self.bandwidth["median"] * 1e3
        return row | {
            "bytes": parts,
            "gb": total / 1e9,
            "floor_ms": floor,
            "of_floor": floor / row[key]["median"],
        }


def build(options: GpuOptions, device: torch.device) -> Checkpoint:
    """The model with random weights, drawn on the device; raises `InputError` without room for it."""
    if device.type == "cuda" and not options.changes:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < ROOM_GIB:
            raise InputError(
                f"LLaDA-2.0-mini needs {ROOM_GIB} GiB of free GPU memory, this GPU has {free:.0f}",
                hint="run on the CPU with --device cpu",
            )
    return llada2_mini(torch.bfloat16, device, **options.changes)


def failure(error: RuntimeError) -> Row:
    """What a row says that could not be measured: memory ran out, or no graph could be made."""
    return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
