"""One training step in which only shapes are computed: its memory, its products, its calls.

The loss of the recipe's own objective runs forward and backward on a model whose weights have
shapes and no numbers (PyTorch's fake tensors). So no formula has to follow the code: what the step
keeps for backward, what it holds at once and how many operations it takes are counted as it goes,
at full size, in seconds and without the memory. The batch is real, since which positions have a
label decides how many logits there are.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dmax import confidence
from dmax.errors import InputError
from dmax.models.backbone import decoder_layers
from dmax.training.objectives import Objective, ObjectiveModule

aten = torch.ops.aten
LARGEST_REAL = 2**20
"""Numbers of a tensor above which even what could be computed has a shape only."""


@dataclass(frozen=True, slots=True)
class StepCount:
    """What a step of one micro-batch on one GPU takes, weights and their gradients not included.

    Attributes:
        activations: bytes that wait for backward when the forward is over, logits not included.
        logits: bytes of logits that wait for backward; 0 if they are computed anew in chunks.
        working: bytes that the step needs beside those at its peak: a layer computed anew, a chunk
            of logits, a gradient that has just been made.
        flops: floating-point operations of all matrix products, those computed anew included.
        layer_calls: how often a forward runs through the layers.
        backward_calls: how often a backward does: a forward without gradient has none.
        kept: bytes of what the objective keeps beside the model from step to step.
    """

    activations: int
    logits: int
    working: int
    flops: int
    layer_calls: int
    backward_calls: int
    kept: int


def count_step(
    model: Any,
    objective: Objective,
    clean: Mapping[str, Tensor],
    *,
    autocast: torch.dtype | None = None,
) -> StepCount:
    """Count one forward and one backward of an objective.

    Args:
        model: made by `as_on_cpu`, with adapters or not, in training mode.
        objective: what the model is trained for.
        clean: the fields of a `CleanBatch`, real tensors on the CPU.
        autocast: what the products are computed in under autocast; None: without.

    Raises:
        InputError: the objective asks for numbers of the model's, and there are none.
    """
    calls: list[bool] = []  # whether each has a gradient

    def count_call(*_: Any) -> None:
        calls.append(torch.is_grad_enabled())

    tape = _Tape(model)
    with tape:
        begun = objective.start(model, torch.device("cpu"))
    kept = tape.bytes
    hook = decoder_layers(model)[0].register_forward_hook(count_call)  # not of what is kept
    try:
        with tape, in_one_piece():
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = ObjectiveModule(model, begun)(torch.Generator(), **clean)["loss"]
            layer_calls, backward_calls = len(calls), sum(calls)
            waiting, logits = tape.bytes, tape.logit_bytes
            _drop_weight_gradients(loss)
            loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        name = type(objective).__name__
        raise InputError(
            f"what {name} computes depends on numbers of the model, which an estimate has not"
        ) from error
    finally:
        hook.remove()
    return StepCount(
        activations=waiting - logits - kept,
        logits=logits,
        working=tape.peak - waiting,
        flops=tape.flops,
        layer_calls=layer_calls,
        backward_calls=backward_calls,
        kept=kept,
    )


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Choose tokens from all logits of a chunk at once, as on a GPU; a CPU takes them in parts."""
    before = confidence.CACHED
    confidence.CACHED = sys.maxsize
    try:
        yield
    finally:
        confidence.CACHED = before


def as_on_cpu(model: Any) -> Any:
    """Make a model of the meta device one whose weights pretend to be on the CPU.

    They still have no numbers. But what runs is what a CPU runs: on the meta device attention would
    take the way that keeps the most.
    """
    pretended: dict[int, Tensor] = {}  # weights that are tied stay so
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        if id(value) not in pretended:
                            pretended[id(value)] = _on_cpu(value)
                        tensors[name] = pretended[id(value)]
    return model


def _on_cpu(value: Tensor) -> Tensor:
    tensor = torch.empty_like(value, device="cpu")
    if isinstance(value, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=value.requires_grad)
    return tensor


def _drop_weight_gradients(loss: Tensor) -> None:
    """Let a weight's gradient go once it is made: where it stays is no matter of a step's shape."""
    waiting = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        inputs = [each for each, _ in node.next_functions]
        leaves = [place for place, each in enumerate(inputs) if hasattr(each, "variable")]
        if leaves:
            node.register_hook(partial(_without, frozenset(leaves)))
        new = {each for each in inputs if each is not None} - seen
        seen |= new
        waiting += new


def _without(places: frozenset[int], gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
    return tuple(None if place in places else each for place, each in enumerate(gradients))


class _Tape(TorchDispatchMode):
    """Runs what has no numbers by shape, what has some as it is, and keeps account of both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.logit_bytes = 0
        self.flops = 0
        self._vocab_size = model.config.vocab_size
        state = (*model.parameters(), *model.buffers())
        self._known = {value.untyped_storage()._cdata for value in state}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        result = _run(func, args, options)
        formula = PRODUCTS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **options, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._keep_account(value)
        return result

    def _keep_account(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        if storage._cdata in self._known:
            return
        is_logits = value.dim() > 1 and value.shape[-1] == self._vocab_size
        num_bytes = storage.nbytes()
        self._known.add(storage._cdata)
        self._add(num_bytes, is_logits)
        weakref.finalize(storage, self._forget, storage._cdata, num_bytes, is_logits)

    def _forget(self, key: int, num_bytes: int, is_logits: bool) -> None:
        self._known.discard(key)
        self._add(-num_bytes, is_logits)

    def _add(self, num_bytes: int, is_logits: bool) -> None:
        self.bytes += num_bytes
        self.logit_bytes += num_bytes * is_logits
        self.peak = max(self.peak, self.bytes)


def _run(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
    modes = [tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)]
    if func is aten.bincount.default and modes:
        return _even_counts(*args, **options)
    if func is aten.index.Tensor:
        args = (args[0], _as_places(args[1]))
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    shaped = SHAPES.get(func, func)
    try:
        with mode:
            result = shaped(*args, **options)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if modes:
            raise
        return func(*args, **options)
    if modes or _numbers(result) > LARGEST_REAL:
        return result
    return func(*args, **options)


def _numbers(result: Any) -> int:
    return max(
        (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), default=0
    )


def _as_places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices without masks, whose number of places only their values tell."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return places


def _even_counts(values: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
    """As if a router had sent every expert the same number of tokens."""
    each, more = divmod(values.numel(), minlength)
    return torch.full((minlength,), each).index_fill_(0, torch.arange(more), each + 1)


def _grouped_shape(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """PyTorch's own rule takes bfloat16 only, its products on a CPU take float32 too."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(offs), left.shape[0], right.shape[1])


SHAPES = {aten._grouped_mm.default: _grouped_shape}


def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Two products of every query with every key [B, H, S, d]."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, *__: Any, **___: Any) -> int:
    """Five products: the scores anew, and the gradients of all inputs and of the scores."""
    return 10 * query.numel() * key.shape[-2]


def _grouped(tokens: Tensor, weights: Tensor, *_: Any, **__: Any) -> int:
    """Tokens [N, D] with the matrices of their experts [E, D, I]; or gradients of the latter."""
    if weights.dim() == 3:
        return 2 * tokens.numel() * weights.shape[-1]
    return 2 * tokens.shape[0] * tokens.shape[1] * weights.shape[-1]


PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
}
