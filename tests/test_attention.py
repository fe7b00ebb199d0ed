"""Attention: visibility against a naive reading of the paper's figure, masks, and our `sdpa`."""

from __future__ import annotations

import pytest
import torch
from flex import flex_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dmax.attention import (
    ATTENTION_FUNCTIONS,
    Predicate,
    Staircase,
    best_for_training,
    block_causal,
    dense_mask,
    flex_from_dense,
    noisy_clean,
    prepare_mask,
    sdpa_attention_forward,
    without_flex,
)
from dmax.checkpoint import load_checkpoint

BATCH = 2
HEADS = 6
GROUPS = 2
QUERIES = 5
KEYS = 40
SIZE = 16


def square(predicate: Predicate, length: int) -> Tensor:
    return dense_mask(predicate, torch.arange(length), torch.arange(length))


def materialized(mask: BlockMask) -> Tensor:
    """What the kernel computes: the predicate, but only inside the tiles of the block mask."""
    rows, columns = mask.BLOCK_SIZE
    tiles = mask.to_dense()[0, 0].bool().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    predicate = create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
    return predicate & tiles[: mask.seq_lengths[0], : mask.seq_lengths[1]]


@settings(deadline=None)
@given(length=st.integers(1, 40), block_length=st.integers(1, 12))
def test_block_causal_equals_its_specification(length: int, block_length: int) -> None:
    visible = square(block_causal(block_length), length)
    for query in range(length):
        end = (query // block_length + 1) * block_length  # the end of its own block
        assert visible[query].tolist() == [key < end for key in range(length)]


@settings(deadline=None)
@given(blocks=st.integers(1, 5), block_length=st.integers(1, 8))
def test_noisy_clean_equals_its_specification(blocks: int, block_length: int) -> None:
    length = blocks * block_length
    visible = square(noisy_clean(block_length, length), 2 * length)
    for query in range(2 * length):
        block = query % length // block_length
        own = range(block * block_length, (block + 1) * block_length)
        before = range(length, length + block * block_length)  # clean blocks strictly before
        clean_own = range(length + own.start, length + own.stop)
        sees = {*before, *own} if query < length else {*before, *clean_own}
        assert {key for key in range(2 * length) if visible[query, key]} == sees


def test_block_length_one_is_causal_and_a_single_block_is_bidirectional() -> None:
    assert torch.equal(square(block_causal(1), 9), torch.ones(9, 9, dtype=torch.bool).tril())
    assert square(block_causal(16), 9).all()


@pytest.mark.parametrize("length", [1, 32, 96, 127, 128, 130, 300])
@pytest.mark.parametrize("block_length", [4, 32])
def test_flex_equals_dense_block_causal(length: int, block_length: int) -> None:
    predicate = block_causal(block_length)
    mask = flex_mask(predicate, length, length, "cpu")
    assert torch.equal(materialized(mask), square(predicate, length))


@pytest.mark.parametrize(
    ("length", "block_length"), [(8, 4), (64, 32), (96, 32), (128, 16), (160, 32), (132, 12)]
)
def test_flex_equals_dense_noisy_clean(length: int, block_length: int) -> None:
    predicate = noisy_clean(block_length, length)
    mask = flex_mask(predicate, 2 * length, 2 * length, "cpu")
    assert torch.equal(materialized(mask), square(predicate, 2 * length))


@pytest.mark.parametrize(("length", "kept"), [(512, 10), (1024, 36)])
def test_flex_skips_invisible_tiles(length: int, kept: int) -> None:
    """At tile size 128 a block-causal mask of n tile rows keeps n(n + 1) / 2 tiles."""
    assert flex_mask(block_causal(32), length, length, "cpu").to_dense().sum() == kept


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(deadline=None, max_examples=15)
@given(
    masks=st.sampled_from([1, 3]),
    queries=st.integers(1, 140),
    past=st.integers(0, 140),
    seed=st.integers(0, 2**31),
)
def test_dense_masks_mean_the_same_to_flex(masks: int, queries: int, past: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = past + queries
    visible = torch.rand(masks, 1, queries, keys, generator=generator) < 0.5
    visible[..., 0] = True
    query, key, value = (
        torch.randn(3, 2, n, 16, generator=generator) for n in (queries, keys, keys)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible
    )
    found = flex_attention(query, key, value, block_mask=flex_from_dense(visible))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_dense_mask_takes_any_index_shapes() -> None:
    """Per-sequence positions, as a batch of blocks at different places needs them."""
    query = torch.tensor([[4, 5, 6, 7], [0, 1, 2, 3]])
    visible = dense_mask(block_causal(4), query, torch.arange(10).expand(2, 10))
    assert visible.shape == (2, 4, 10)
    assert visible[0].sum(dim=-1).tolist() == [8] * 4
    assert visible[1].sum(dim=-1).tolist() == [4] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_gets_the_mask_that_it_would_make_itself(dtype: torch.dtype) -> None:
    visible = torch.tensor([[True, False], [False, False]])[None, None]
    query, key, value = torch.randn(3, 1, 2, 2, 8).to(dtype)
    mask = prepare_mask(visible, dtype, "sdpa")
    assert mask.dtype == dtype and torch.equal(mask == 0, visible)
    assert torch.equal(prepare_mask(mask, dtype, "sdpa"), mask)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(query, key, value, mask), attend(query, key, value, visible))
    assert prepare_mask(visible, dtype, "eager").isfinite().all()


# ---- our `sdpa` against transformers': the same numbers, without repeated keys and values -------


class Layer(nn.Module):
    num_key_value_groups = HEADS // GROUPS
    is_causal = False


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    # Heads come last, as projections and caches have them.
    shapes = ((QUERIES, HEADS), (KEYS, GROUPS), (KEYS, GROUPS))
    return [
        torch.randn(BATCH, *shape, SIZE).to(dtype).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


def make_mask(dtype: torch.dtype) -> Tensor:
    visible = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.5
    visible[0, 0, 0] = False  # sees nothing
    return prepare_mask(visible, dtype, "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_sdpa_equals_that_of_transformers(dtype: torch.dtype, masked: bool) -> None:
    found = []
    for function in (ALL_ATTENTION_FUNCTIONS["sdpa"], ATTENTION_FUNCTIONS["sdpa"]):
        inputs = make_inputs(dtype)
        mask = make_mask(dtype) if masked else None
        output, _ = function(Layer(), *inputs, mask, scaling=0.3, is_causal=False)
        output.float().square().sum().backward()
        found.append([output, *(each.grad for each in inputs)])
    assert torch.equal(found[0][0], found[1][0])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=2e-2)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_staircase_equals_the_end_of_a_dense_mask(num_blocks: int) -> None:
    torch.manual_seed(0)
    length, before = 4, 8
    size = before + num_blocks * length
    query = torch.randn(BATCH, HEADS, num_blocks * length, SIZE)
    key, value = torch.randn(2, BATCH, GROUPS, size, SIZE)
    visible = square(block_causal(length), size)[None, None, before:]
    expected, _ = sdpa_attention_forward(Layer(), query, key, value, visible, scaling=0.3)
    stairs = Staircase(length)
    assert prepare_mask(stairs, torch.float32, "sdpa") is stairs
    actual, _ = sdpa_attention_forward(Layer(), query, key, value, stairs, scaling=0.3)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_other_devices_use_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    record = lambda *inputs, **options: calls.append(options)  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    query, key, value = (each.to("meta") for each in make_inputs(torch.float32))
    sdpa_attention_forward(Layer(), query, key, value, None, scaling=0.3, is_causal=False)
    assert calls == [{"scaling": 0.3, "dropout": 0.0, "is_causal": False}]


# ---- which implementation ------------------------------------------------------------------------


def test_training_uses_flex_attention_on_a_gpu_only() -> None:
    assert best_for_training(torch.device("cuda", 3)) == "flex_attention"
    assert best_for_training(torch.device("cpu")) is None


@pytest.mark.parametrize("implementation", ["flex_attention", "eager"])
def test_decoding_during_training_does_without_flex(implementation: str) -> None:
    model = load_checkpoint(
        "tiny-base", dtype="auto", device="cpu", attn_implementation=implementation
    ).model

    def decode() -> None:
        with without_flex(model):
            meanwhile = model.config._attn_implementation
            assert meanwhile == ("sdpa" if implementation == "flex_attention" else "eager")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        decode()
    assert model.config._attn_implementation == implementation
