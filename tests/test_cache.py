"""BlockCache: in-place blocks, commits, released slots."""

from __future__ import annotations

import pytest
import torch

from dmax.cache import BlockCache
from dmax.errors import InputError


def block(value: float, rows: int = 1, length: int = 4) -> torch.Tensor:
    return torch.full((rows, 2, length, 3), value)  # [B, G, L, d]


def test_blocks_are_overwritten_until_committed() -> None:
    cache = BlockCache(1, 1, 12, 2, 3)
    for value in (1.0, 2.0):
        keys, _ = cache.write_at([0], 4).update(block(value), block(-value), 0)
        assert keys.shape == (1, 2, 4, 3)
        assert (keys == value).all()
    cache.commit([0], 4)
    keys, values = cache.write_at([0], 4).update(block(3.0), block(-3.0), 0)
    assert keys[0, 0, :, 0].tolist() == [2] * 4 + [3] * 4
    assert values[0, 1, :, 2].tolist() == [-2] * 4 + [-3] * 4


def test_rows_stand_at_their_own_positions() -> None:
    cache = BlockCache(1, 3, 12, 2, 3)
    cache.commit([0, 2], 4)
    cache.commit([0], 4)  # four more
    assert cache.lengths == [8, 0, 4]
    window = cache.write_at([2, 0], 4)
    assert window.positions.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    window.update(block(5.0, rows=2), block(5.0, rows=2), 0)
    assert cache.keys[0][2, 4:8].eq(5).all()
    assert cache.keys[0][0, 8:].eq(5).all()
    assert cache.keys[0][1].eq(0).all()


def test_reading_in_order_and_gathered_agree() -> None:
    cache = BlockCache(1, 2, 8, 2, 3)
    torch.manual_seed(0)
    new = torch.randn(2, 2, 4, 3)
    straight, _ = cache.write_at([0, 1], 4).update(new, new, 0)
    swapped, _ = cache.write_at([1, 0], 4).update(new.flip(0), new.flip(0), 0)
    assert torch.equal(straight, swapped.flip(0))


def test_what_is_read_can_be_written_elsewhere() -> None:
    cache = BlockCache(2, 3, 12, 2, 3)
    for layer in range(2):
        cache.write_at([1], 4).update(block(layer + 1.0), block(-layer - 1.0), layer)
    keys, values = cache.read(1, 1, 4)
    assert keys[:, 2, 1, 0].tolist() == [1, 2] and values[:, 2, 1, 0].tolist() == [-1, -2]
    cache.commit([2], 8)
    cache.write(2, keys, values)
    assert cache.lengths == [0, 0, 11]
    written = [store[2, 8:11].unique().tolist() for store in (*cache.keys, *cache.values)]
    assert written == [[1], [2], [-1], [-2]]


def test_a_released_slot_is_empty() -> None:
    cache = BlockCache(1, 2, 8, 2, 3)
    cache.commit([0, 1], 8)
    cache.release(0)
    assert cache.lengths == [0, 8]


def test_overflow_is_refused() -> None:
    cache = BlockCache(1, 1, 8, 2, 3)
    cache.commit([0], 8)
    with pytest.raises(ValueError, match="exceed the capacity 8"):
        cache.write_at([0], 4)


def test_more_memory_than_there_is_is_refused_before_any_is_taken() -> None:
    with pytest.raises(InputError, match=r"keys and values of 65536 sequences .* GiB, cpu has "):
        BlockCache(32, 65536, 2**20, 8, 128)
