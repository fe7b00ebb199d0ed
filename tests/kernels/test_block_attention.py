"""Attention over the cache in place: the kernels against the model's own way, in a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made import Made
from torch import Tensor

from dmax.checkpoint import new_checkpoint
from dmax.engine.batch import Batch
from dmax.engine.runner import ModelRunner
from dmax.kernels import can_fuse, using
from dmax.models import LLaDA2MoeConfig
from dmax.special_ids import SpecialIds

L, SLOTS, CAPACITY, VOCABULARY = 8, 3, 320, 40
IDS = SpecialIds(VOCABULARY - 1, (0,), 0, L)
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
}  # fmt: skip
Place = tuple[int, int, int]
"""Slot, where it is written in the cache, and where it stands in its sequence."""
AFTER_A_PREFIX: list[Place] = [(1, 136, 136)]
CASES: dict[str, list[Place]] = {
    "the first block": [(0, 0, 0)],
    "a block after a long prefix": AFTER_A_PREFIX,
    "a finished block and the open one after it": [(2, 296, 296), (2, 304, 304)],
    "sequences in different states": [(1, 64, 64), (0, 0, 0), (1, 72, 72), (2, 200, 200)],
    "branches of a block": [(0, 24, 24), (0, 32, 24), (0, 40, 24)],
}


def model(**changes: Any) -> Any:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} | changes
    config = LLaDA2MoeConfig(
        vocab_size=VOCABULARY, mask_token_id=VOCABULARY - 1, eos_token_id=0, block_length=L,
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=1,
        num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    made = new_checkpoint(config, experts_implementation="eager").model
    for name, weight in made.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return made


def run(
    made: Any, places: list[Place], device: torch.device, stale: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states of the rows, and the cache afterwards.

    `stale` is what stands where nothing was written.
    """
    runner = ModelRunner(made.to(device), IDS, SLOTS, CAPACITY)
    generator, stores = torch.Generator().manual_seed(1), [*runner.cache.keys, *runner.cache.values]
    for store in stores:
        store.copy_(torch.randn(store.shape, generator=generator))
        for slot in range(SLOTS):
            bases = [base for own, _, base in places if own == slot]
            store[slot, max(bases, default=0) :] = stale
    embeds = torch.randn(len(places), L, 32, generator=generator).to(device)
    batch = Batch.of([(*place, row, -1) for row, place in enumerate(places)], [], L).to(device)
    hidden = runner.forward(batch, embeds, hidden_states=True).hidden_states
    assert hidden is not None
    return hidden.cpu(), [store.cpu() for store in stores]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> torch.device:
    """The device where the kernels of attention run, and from now on do so; no others do."""

    def can_fuse_here(*tensors: Tensor) -> bool:
        with using("triton"):
            return can_fuse(*tensors)

    monkeypatch.setattr("dmax.engine.runner.can_fuse", can_fuse_here)
    return triton_device


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_model_without_them(case: str, request: pytest.FixtureRequest) -> None:
    made = model()
    rows = CASES[case]
    expected, caches = run(made, rows, torch.device("cpu"))
    actual, written = run(made, rows, request.getfixturevalue("kernels"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(written, caches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"num_attention_heads": 3, "num_key_value_heads": 1},
        {"num_attention_heads": 18, "num_key_value_heads": 1},  # more queries than a program holds
        {"head_dim": 24},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": YARN},  # which scales cosine and sine, too
    ],
    ids=str,
)
def test_shapes_of_heads(changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    made = model(**changes)
    expected, _ = run(made, AFTER_A_PREFIX, torch.device("cpu"))
    actual, _ = run(made, AFTER_A_PREFIX, request.getfixturevalue("kernels"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_stands_after_a_row_is_never_read(request: pytest.FixtureRequest) -> None:
    made, rows = model(), CASES["sequences in different states"]
    expected, _ = run(made, rows, torch.device("cpu"))
    actual, _ = run(made, rows, request.getfixturevalue("kernels"), stale=float("nan"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processors", [1, 4, 12])  # one share, two, up to four of six
def test_keys_may_go_in_any_number_of_shares(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    made = model()
    rows = [(0, 0, 0), (2, 304, 304)]
    expected, _ = run(made, rows, torch.device("cpu"))  # before kernels take the CPU's tensors, too
    kernels = request.getfixturevalue("kernels")
    from dmax.kernels import block_attention_triton

    monkeypatch.setattr(block_attention_triton, "multiprocessors", lambda _: processors)
    monkeypatch.setattr(block_attention_triton, "SHARES", 2)  # merged at a time
    actual, _ = run(made, rows, kernels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def exactly(
    heads: Tensor, norms: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor],
    keys: Tensor, values: Tensor, places: list[Place],
) -> Tensor:  # fmt: skip
    """What `block_attention` computes, in float64 and written down from the formulas."""
    num_rows, length, _, size = heads.shape
    shared = keys.shape[2]
    num_heads = heads.shape[2] - 2 * shared
    x = heads.double()
    query, key, new_values = x.split((num_heads, shared, shared), dim=2)

    def turned(x: Tensor, weight: Tensor, base: int) -> Tensor:  # [L, heads, d]
        normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        cos, sin = (each[0, base : base + length].double() for each in rotary)  # [L, 1, turning]
        half = cos.shape[-1] // 2
        first, second, rest = normal.split((half, half, size - 2 * half), dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        return torch.cat((torch.cat((first, second), dim=-1) * cos + swapped * sin, rest), dim=-1)

    keys, values = keys.double(), values.double()
    for row, (slot, start, base) in enumerate(places):
        keys[slot, start : start + length] = turned(key[row], norms[1], base)
        values[slot, start : start + length] = new_values[row]
    outputs = []
    for row, (slot, start, base) in enumerate(places):
        seen = [*range(base), *range(start, start + length)]
        q = turned(query[row], norms[0], base).unflatten(1, (shared, -1))  # [L, G, share, d]
        scores = torch.einsum("lgsd,kgd->lgsk", q, keys[slot, seen]) * size**-0.5
        mixed = torch.einsum("lgsk,kgd->lgsd", scores.softmax(-1), values[slot, seen])
        outputs.append(mixed.reshape(length, num_heads * size))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_kernels_compute_the_formulas(
    triton_device: torch.device, dtype: torch.dtype, tolerance: float
) -> None:
    """Over 1,536 positions, in 24 shares; a branch of another sequence; and a first block."""
    from dmax.kernels import block_attention_triton

    torch.manual_seed(0)
    places = [(0, 1536, 1536), (1, 88, 72), (2, 0, 0)]
    keys, values = torch.randn(2, 3, 1600, 1, 16).to(dtype)
    heads = torch.randn(3, L, 2 + 2, 16).to(dtype)
    norms = (torch.rand(16).to(dtype), torch.rand(16).to(dtype))
    angles = torch.arange(1600.0)[None, :, None, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    turn = torch.tensor([-1.0, -1.0, 1.0, 1.0]) * angles.sin()
    rotary = (angles.cos().to(dtype), turn.to(dtype))
    expected = exactly(heads, norms, rotary, keys, values, places)
    here = [each.to(triton_device) for each in (heads, *norms, *rotary, keys, values)]
    slots, starts, bases = torch.tensor(places, device=triton_device).T
    actual = block_attention_triton.block_attention(
        here[0], (here[1], here[2]), 1e-6, (here[3], here[4]), here[5], here[6],
        slots, starts, bases, 16**-0.5,
    )  # fmt: skip
    torch.testing.assert_close(actual.cpu().double(), expected, atol=tolerance, rtol=tolerance)


def without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels of attention do nothing; for models on a CPU, as what they give is anything."""
    from dmax.kernels import block_attention_triton

    class Launch:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    for name in ("_prepare_kernel", "_attend_kernel", "_merge_kernel"):
        monkeypatch.setattr(block_attention_triton, name, Launch())


@pytest.mark.usefixtures("kernels")
def test_a_step_in_place_makes_neither_mask_nor_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    without_launches(monkeypatch)
    runner = ModelRunner(model(), IDS, SLOTS, CAPACITY)
    batch = Batch.of([(1, 136, 136, 0, -1)], [], L)
    embeds = torch.zeros(1, L, 32)
    runner.forward(batch, embeds)  # the first step computes the rotations of all positions
    with Made() as made:
        runner.forward(batch, embeds)
    assert not made.shapes.keys() & {"cos", "sin", "ge", "lt", "bitwise_or", "where"}
    shapes = set().union(*made.shapes.values())
    assert [shape for shape in shapes if batch.span in shape or CAPACITY in shape] == []


def prefill(
    made: Any, device: torch.device, lengths: list[int], prompts: Tensor
) -> tuple[Tensor, ...]:
    """Keys and values of all layers after prompts in slots 1, 0, … that hold `lengths` already."""
    runner = ModelRunner(made.to(device), IDS, SLOTS, CAPACITY)
    generator, slots = torch.Generator().manual_seed(1), list(range(len(prompts)))[::-1]
    stores = (*runner.cache.keys, *runner.cache.values)
    for store in stores:
        store.copy_(torch.randn(store.shape, generator=generator))
    for slot, length in zip(slots, lengths, strict=True):
        runner.cache.commit([slot], length)
    for chunk in prompts.split(2 * L, dim=1):
        runner.prefill(slots, chunk.to(device))
    return tuple(store.cpu() for store in stores)


@pytest.mark.parametrize("lengths", [[136], [200, 0]], ids=str)
def test_prompts_in_place_equal_those_under_a_mask(
    lengths: list[int], request: pytest.FixtureRequest
) -> None:
    made = model()
    prompts = torch.randint(VOCABULARY - 1, (len(lengths), 3 * L))
    expected = prefill(made, torch.device("cpu"), lengths, prompts)
    actual = prefill(made, request.getfixturevalue("kernels"), lengths, prompts)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_long_prompts_make_nothing_as_large_as_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    without_launches(monkeypatch)
    start, size = 15_872, 512
    runner = ModelRunner(model(), IDS, 1, start + size)
    runner.cache.commit([0], start)
    tokens = torch.zeros(1, size, dtype=torch.long)
    with Made() as made:
        runner.prefill([0], tokens)
    assert made.largest < size * (start + size) / 10


def test_shares_fill_a_gpu_once_and_are_no_larger_than_what_they_sum_up() -> None:
    from dmax.kernels.block_attention_triton import default_tile, keys_of_a_share, max_shares

    at_once, heads, length, size = 132 * default_tile(torch.bfloat16).at_once, 4, 32, 128
    for num_rows in range(1, 70):
        programs = 2 * num_rows * heads
        assert programs * max_shares(programs, at_once) <= max(programs, at_once)
    for share in (1, 4, 16):  # query heads for each key head
        for itemsize in (2, 4):
            least = keys_of_a_share(length * share, size, itemsize)
            results = length * share * (size + 2) * 4
            assert results <= least * 2 * size * itemsize < results + 64 * 2 * size * itemsize


def test_one_request_compiles_each_kernel_once() -> None:
    """From 32 to 16,384 positions: there were 94 variants of one kernel, and 63 of another."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("variants.py")), "32", "16352"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    variants = json.loads(told.stdout)
    assert variants == {"_prepare_kernel": 1, "_attend_kernel": 1, "_merge_kernel": 1}


def test_weights_that_are_elsewhere_are_left_to_the_twin(kernels: torch.device) -> None:
    made = model().to(kernels)
    assert ModelRunner(made, IDS, SLOTS, CAPACITY).reads_in_place
    norm = made.model.layers[1].attention.key_layernorm
    for elsewhere in (torch.float64, "meta"):  # of another dtype, or offloaded
        norm.to(elsewhere)
        assert not ModelRunner(made, IDS, SLOTS, CAPACITY).reads_in_place
