"""Triton's interpreter as a sanitizer: every access of every kernel is checked and counted.

Within `watch()` four kinds of faults of a kernel end its launch with a `Fault`:

- an access outside of the tensor that its pointer came from;
- a read of what nobody has written since `torch.empty` gave the memory;
- a write to what another program of the same launch has written, which a GPU may do in any order;
- a sum, difference or product of integers of fewer than 64 bits that has no room in them.

The interpreter also learns bfloat16 there: it has 16 bits without a meaning, so operations widen
them to float32 and round to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY = -1  # wrote an element; programs are numbered from 0
ATOMIC = -2  # any number of programs may write an element so
POISON = 0xFF  # NaN in every floating format, and -1
# What hands a pointer on to its result.
OF_POINTERS = (
    "create_addptr", "create_splat", "create_unsplat", "create_broadcast", "create_expand_dims",
    "create_reshape", "create_trans", "create_bitcast",
)  # fmt: skip
EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
# Tensors that several programs of a launch may write, by kernel and argument, and why.
SHARED: dict[tuple[str, str], str] = {
    ("_prepare_kernel", "keys"): "idle rows all write to the spare slot, which nobody reads",
    ("_prepare_kernel", "values"): "likewise",
}


class Fault(AssertionError):
    """What a kernel must not do."""


@dataclass(slots=True)
class Argument:
    """A tensor that a launch was given, and what its programs did with it.

    Attributes:
        name: of the kernel's parameter.
        begin: address of its first byte.
        end: address after its last byte.
        size: bytes of an element.
        written: [elements, size], whether somebody wrote a byte; None if all were before.
        writers: for each element, the program that wrote it; None until one does.
        read: bytes that all programs together asked for.
        stored: bytes that they wrote.
        times_read: how often each element was read, if that is counted.
    """

    name: str
    begin: int
    end: int
    size: int
    written: np.ndarray | None
    writers: np.ndarray | None = None
    read: int = 0
    stored: int = 0
    times_read: np.ndarray | None = None

    @property
    def num_elements(self) -> int:
        return (self.end - self.begin) // self.size


@dataclass(slots=True)
class Launch:
    """A kernel that ran, with its tensors by the names of its parameters."""

    kernel: str
    arguments: dict[str, Argument] = field(default_factory=dict)


class Memory(TorchDispatchMode):
    """Which bytes of memory from `torch.empty` have been written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, np.ndarray] = {}  # bytes, by the address of their storage
        self.kept: list[Tensor] = []  # so that no address is given twice
        self.is_launching = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.is_launching:
            return result
        name = function.overloadpacket.__name__
        if name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            self._poison(result)
        else:
            for parameter, value in zip(function._schema.arguments, args, strict=False):
                self._note(parameter, value)
            for parameter in function._schema.arguments:
                self._note(parameter, kwargs.get(parameter.name))
        return result

    def _poison(self, tensor: Tensor) -> None:
        """Nobody has written this tensor."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or not storage.nbytes():
            return
        value = 1 if tensor.dtype == torch.bool else POISON
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(value)
        self.written[storage.data_ptr()] = np.zeros(storage.nbytes(), np.bool_)
        self.kept.append(tensor)

    def _note(self, parameter: Any, value: Any) -> None:
        """An operation of PyTorch wrote this argument, if its schema says so."""
        if parameter.alias_info is None or not parameter.alias_info.is_write:
            return
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, Tensor) and (shadow := self.of(tensor)) is not None:
                shadow[:] = True

    def of(self, tensor: Tensor) -> np.ndarray | None:
        """For each byte of the tensor's span, whether it was written; None if all were."""
        shadow = self.written.get(tensor.untyped_storage().data_ptr())
        if shadow is None:
            return None
        begin = tensor.storage_offset() * tensor.element_size()
        return shadow[begin : begin + span(tensor)]


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


class Watch:
    """What is checked while kernels run, and what they did.

    Args:
        memory: knows what was written.

    Attributes:
        launches: every kernel that ran.
        counts_reads: whether to count how often each element is read.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.launches: list[Launch] = []
        self.counts_reads = False
        self._expected: Iterator[tuple[str, Tensor]] = iter(())
        self._prepared: set[str] = set()

    def launch(
        self, original: Callable[..., None], executor: Any, *args: Any, **kwargs: Any
    ) -> None:
        """In place of `GridExecutor.__call__`."""
        names = executor.arg_names
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = [(name, given[name]) for name in names if hasattr(given.get(name), "data_ptr")]
        self.launches.append(Launch(executor.fn.__name__))
        self._expected = iter(tensors)
        self._prepared.clear()
        self.memory.is_launching = True
        try:
            original(executor, *args, **kwargs)
        finally:
            self.memory.is_launching = False

    def prepare(self, original: Callable[[Any], Any], function: Any) -> Any:
        """In place of `_patch_lang`, which each call of a function of a kernel does all over."""
        if function.__module__ in self._prepared:
            return SimpleNamespace(restore=lambda: None)
        self._prepared.add(function.__module__)
        return original(function)

    def check_room(
        self, _: Callable[..., None], __: Any, left: Any, right: Any, operation: Callable[..., Any]
    ) -> None:
        """In place of `binary_op_sanitize_overflow_impl`.

        That takes ten operations for each one, and looks at their result when debugging only.
        """
        kind = left.dtype.scalar
        if kind.int_bitwidth >= 64:
            return
        name = operation.__name__
        wide = (each.handle.data.astype(np.int64) for each in (left, right))
        exact = EXACTLY[name](*wide)
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            kernel = self.launches[-1].kernel
            raise Fault(f"{kernel}: {kind} has no room for the result of `{name}`")

    def convert(self, original: Callable[[Any], Any], value: Any) -> Any:
        """In place of `_implicit_cvt`, which makes a pointer of a tensor: it remembers which."""
        converted = original(value)
        if isinstance(value, Tensor):
            name, tensor = next(self._expected)
            size = tensor.element_size()
            begin = value.data_ptr()
            shadow = self.memory.of(tensor)
            written = None if shadow is None else shadow.reshape(-1, size)
            argument = Argument(name, begin, begin + span(tensor), size, written)
            self.launches[-1].arguments[name] = argument
            converted.handle.attr["argument"] = argument
        return converted

    def pass_on(self, original: Callable[..., Any], builder: Any, *args: Any) -> Any:
        """In place of what makes pointers of pointers."""
        result = original(builder, *args)
        for each in args:
            if isinstance(each, TensorHandle) and "argument" in each.attr:
                result.attr["argument"] = each.attr["argument"]
        return result

    def load(
        self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any
    ) -> Any:
        argument, places = self._places("read", pointers, mask)
        self._check_written(argument, places)
        argument.read += places.size * argument.size
        if self.counts_reads:
            if argument.times_read is None:
                argument.times_read = np.zeros(argument.num_elements, np.int32)
            np.add.at(argument.times_read, places, 1)
        return original(builder, pointers, mask, *rest)

    def store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any,
        *rest: Any,
    ) -> Any:  # fmt: skip
        argument, places = self._places("written", pointers, mask)
        x, y, z = builder.grid_idx
        _, height, depth = builder.grid_dim
        self._write(argument, places, (x * height + y) * depth + z)
        return original(builder, pointers, value, mask, *rest)

    def atomic(
        self, original: Callable[..., Any], builder: Any, kind: Any, pointers: Any, value: Any,
        mask: Any, *rest: Any,
    ) -> Any:  # fmt: skip
        argument, places = self._places("written", pointers, mask)
        self._check_written(argument, places)
        argument.read += places.size * argument.size
        self._write(argument, places, ATOMIC)
        return original(builder, kind, pointers, value, mask, *rest)

    def exchange(
        self, original: Callable[..., Any], builder: Any, pointers: Any, *rest: Any
    ) -> Any:
        mask = TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
        argument, places = self._places("written", pointers, mask)
        self._check_written(argument, places)
        self._write(argument, places, ATOMIC)
        return original(builder, pointers, *rest)

    def _places(self, what: str, pointers: Any, mask: Any) -> tuple[Argument, np.ndarray]:
        """The tensor that is accessed, and the indices of its elements."""
        kernel = self.launches[-1].kernel
        argument: Argument | None = pointers.attr.get("argument")
        if argument is None:
            raise Fault(f"{kernel}: an address that came from no tensor is {what}")
        addresses, masks = np.broadcast_arrays(pointers.data, mask.data)
        offsets = addresses[masks].astype(np.int64) - argument.begin
        outside = (offsets < 0) | (offsets + argument.size > argument.end - argument.begin)
        if outside.any():
            place = offsets[outside][0] // argument.size
            raise Fault(
                f"{kernel}: element {place} of `{argument.name}` is {what}, which has "
                f"{argument.num_elements}"
            )
        return argument, offsets // argument.size

    def _check_written(self, argument: Argument, places: np.ndarray) -> None:
        if argument.written is None:
            return
        fresh = ~argument.written[places].all(axis=-1)
        if fresh.any():
            kernel = self.launches[-1].kernel
            place = places[fresh][0]
            raise Fault(f"{kernel}: element {place} of `{argument.name}` is read, nobody wrote it")

    def _write(self, argument: Argument, places: np.ndarray, program: int) -> None:
        kernel = self.launches[-1].kernel
        if argument.writers is None:
            argument.writers = np.full(argument.num_elements, NOBODY, np.int32)
        before = argument.writers[places]
        others = (before != NOBODY) & (before != program)
        if others.any() and (kernel, argument.name) not in SHARED:
            raise Fault(
                f"{kernel}: element {places[others][0]} of `{argument.name}` is written by "
                f"programs {before[others][0]} and {program}"
            )
        argument.writers[places] = program
        argument.stored += places.size * argument.size
        if argument.written is not None:
            argument.written[places] = True


@contextmanager
def watch() -> Iterator[Watch]:
    """Check what kernels do within, and give bfloat16 a meaning."""
    memory = Memory()
    seen = Watch(memory)

    def instead(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        stack.enter_context(
            patch.object(
                owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs)
            )
        )

    with ExitStack() as stack:
        instead(GridExecutor, "__call__", seen.launch)
        instead(interpreter, "_patch_lang", seen.prepare)
        instead(TritonSemantic, "binary_op_sanitize_overflow_impl", seen.check_room)
        instead(interpreter, "_implicit_cvt", seen.convert)
        for name in OF_POINTERS:
            instead(InterpreterBuilder, name, seen.pass_on)
        instead(InterpreterBuilder, "create_masked_load", seen.load)
        instead(InterpreterBuilder, "create_masked_store", seen.store)
        instead(InterpreterBuilder, "create_atomic_rmw", seen.atomic)
        instead(InterpreterBuilder, "create_atomic_cas", seen.exchange)
        instead(InterpreterBuilder, "cast_impl", cast)
        instead(InterpreterBuilder, "create_fp_to_fp", convert_float)
        for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"):
            instead(InterpreterBuilder, name, in_float32)
        stack.enter_context(memory)
        yield seen


# --- bfloat16 -------------------------------------------------------------------------------------


def widened(handle: Any) -> Any:
    """A handle of bfloat16 as float32; any other as it is."""
    if not isinstance(handle, TensorHandle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(handle: Any) -> Any:
    """A handle of float32 as bfloat16: to nearest, and to even between two. A NaN stays one."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    data = np.where(np.isnan(handle.data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
    return TensorHandle(data, tl.bfloat16)


def in_float32(original: Callable[..., Any], builder: Any, *args: Any) -> Any:
    """An operation whose operands may be bfloat16; a result of that type is rounded to it."""
    if not any(widened(each) is not each for each in args):
        return original(builder, *args)
    result = original(builder, *(widened(each) for each in args))
    is_number = result.data.dtype == np.float32
    stays = original.__name__ == "create_dot" and args[2].dtype.scalar == tl.float32
    return rounded(result) if is_number and not stays else result


def cast(original: Callable[..., Any], builder: Any, source: Any, target: Any) -> Any:
    """In place of `cast_impl`."""
    source = widened(source)
    if target.scalar != tl.bfloat16:
        if source.dtype.scalar == target.scalar:
            return source
        return original(builder, source, target)
    if source.dtype.scalar != tl.float32:
        source = original(builder, source, tl.float32)
    return rounded(source)


def convert_float(
    original: Callable[..., Any], builder: Any, source: Any, target: Any, rounding: Any
) -> Any:
    """In place of `create_fp_to_fp`."""
    source = widened(source)
    if tl.bfloat16 == target.scalar and source.dtype.scalar == tl.float32:
        return rounded(source)
    if source.dtype.scalar == target.scalar:
        return source
    return original(builder, source, target, rounding)
