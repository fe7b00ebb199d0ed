"""The sanitizer finds each kind of fault, in kernels that are made to have it, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import is_interpreted

if not is_interpreted():
    pytest.skip("kernels are not interpreted here", allow_module_level=True)

import triton
import triton.language as tl
from sanitizer import Watch, rounded, widened
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

BLOCK = 8


@triton.jit
def _copy_kernel(source, target, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def _overlapping_kernel(target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(target + place, place)


@triton.jit
def _counting_kernel(counter):  # type: ignore[no-untyped-def]
    tl.atomic_add(counter, 1)


@triton.jit
def _scale_kernel(x, y, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * tl.load(y + at))


@triton.jit
def _far_kernel(x, out, step):  # type: ignore[no-untyped-def]
    tl.store(out, tl.load(x) * step)


def copy(source: torch.Tensor, target: torch.Tensor, size: int) -> None:
    kernel: Any = _copy_kernel
    kernel[(triton.cdiv(size, BLOCK),)](source, target, size, BLOCK=BLOCK)


def test_a_kernel_without_faults() -> None:
    source = torch.arange(20)
    target = torch.empty(20, dtype=torch.int64)
    copy(source, target, 20)
    assert torch.equal(target, source)
    copy(target, torch.empty_like(target), 20)  # a kernel has written it


def test_a_read_outside_of_a_tensor() -> None:
    """The memory behind it belongs to the same allocation, and could be read."""
    source = torch.zeros(40)[:19]
    with pytest.raises(InterpreterError, match="element 19 of `source` is read, which has 19"):
        copy(source, torch.empty(20), 20)


def test_a_write_outside_of_a_tensor() -> None:
    target = torch.zeros(40)[:19]
    with pytest.raises(InterpreterError, match="element 19 of `target` is written, which has 19"):
        copy(torch.zeros(20), target, 20)


def test_a_read_of_what_nobody_wrote() -> None:
    source = torch.empty(20)
    copy(torch.zeros(12), source, 12)
    with pytest.raises(InterpreterError, match="element 12 of `source` is read, nobody wrote it"):
        copy(source, torch.empty(20), 20)
    source.zero_()  # PyTorch has written it
    copy(source, torch.empty(20), 20)


def test_what_pytorch_reads_of_an_empty_tensor_is_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == -1).all()


def test_two_programs_that_write_one_address() -> None:
    kernel: Any = _overlapping_kernel
    target = torch.empty(BLOCK + 7, dtype=torch.int32)
    with pytest.raises(
        InterpreterError, match="element 7 of `target` is written by programs 0 and 1"
    ):
        kernel[(2,)](target, BLOCK=BLOCK)
    kernel[(1,)](target, BLOCK=BLOCK)  # another launch may


@pytest.mark.parametrize(("step", "fits"), [(3, True), (-4, True), (4, False), (-5, False)])
def test_a_product_that_has_no_room(step: int, fits: bool) -> None:
    kernel: Any = _far_kernel
    x = torch.tensor([2**29], dtype=torch.int32)
    out = torch.empty_like(x)
    if fits:
        kernel[(1,)](x, out, step)
        assert out.item() == 2**29 * step
    else:
        with pytest.raises(InterpreterError, match="_far_kernel: int32 has no room for the .*mul"):
            kernel[(1,)](x, out, step)


def test_programs_may_share_what_they_add_to() -> None:
    kernel: Any = _counting_kernel
    counter = torch.zeros(1, dtype=torch.int32)
    kernel[(5,)](counter)
    assert counter.item() == 5
    with pytest.raises(InterpreterError, match="element 0 of `counter` is read, nobody wrote it"):
        kernel[(1,)](torch.empty(1, dtype=torch.int32))


def test_bytes_are_counted_for_each_tensor(watched: Watch) -> None:
    watched.counts_reads = True
    copy(torch.zeros(20, dtype=torch.int16), torch.empty(20, dtype=torch.int16), 20)
    (launch,) = watched.launches
    source = launch.arguments["source"]
    target = launch.arguments["target"]
    assert launch.kernel == "_copy_kernel"
    assert (source.read, source.stored) == (40, 0)
    assert (target.read, target.stored) == (0, 40)
    assert source.times_read is not None and source.times_read.tolist() == [1] * 20


# --- bfloat16 -------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_as_pytorch_rounds_it() -> None:
    wide = torch.cat(
        (torch.randn(1000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan, 0.0]))
    )
    bits = rounded(TensorHandle(wide.numpy(), tl.float32))
    expected = wide.bfloat16()
    found = torch.from_numpy(widened(bits).data)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_operations_on_bfloat16() -> None:
    x = torch.randn(BLOCK, dtype=torch.bfloat16)
    y = torch.randn(BLOCK, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    kernel: Any = _scale_kernel
    kernel[(1,)](x, y, out, BLOCK=BLOCK)
    assert torch.equal(out, x * y)
