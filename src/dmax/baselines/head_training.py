"""Fit the heads of Learn2PD and DEMASK to what was recorded in the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.baselines.head_states import (
    Blocks,
    Example,
    by_length,
    dependency_examples,
    filter_examples,
)
from dmax.baselines.heads import (
    KINDS,
    Head,
    Kind,
    Tensors,
    dependency_logits,
    filter_logits,
    shapes,
)
from dmax.errors import InputError, did_you_mean
from dmax.params import LARGEST_SEED, check_number
from dmax.records.encoding import Encoded
from dmax.special_ids import SpecialIds
from dmax.training.data import check_examples
from dmax.training.finite import check_weights, first_not_finite

MOST = {
    "max_steps": 10_000_000,
    "batch_size": 65_536,
    "record_batch_size": 65_536,
    "inner_size": 4_096,
}
HELD_OUT = 0.1  # share of the examples that say how good a head is, the last ones


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """How a head is trained.

    Attributes:
        kind: learn2pd or demask.
        max_steps: how many steps AdamW takes.
        learning_rate: of the first step; it falls to 0 along a cosine.
        batch_size: recorded states in a step.
        record_batch_size: responses that are recorded together.
        inner_size: K of DEMASK's head.
        seed: of states, initial weights and batches.
    """

    kind: str = ""
    max_steps: int = 2000
    learning_rate: float = 3e-3
    batch_size: int = 256
    record_batch_size: int = 16
    inner_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `InputError` naming the field that is wrong."""
        if self.kind not in KINDS:
            hint = did_you_mean(self.kind, KINDS)
            raise InputError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}", hint)
        check_number("learning_rate", self.learning_rate, low=0, above_low=True)
        check_number("seed", self.seed, low=0, high=LARGEST_SEED, whole=True)
        for name, most in MOST.items():
            check_number(name, getattr(self, name), low=1, high=most, whole=True)


def filter_loss(tensors: Tensors, examples: Example) -> Tensor:
    """Learn2PD: binary cross-entropy of "this prediction is final", mean over masked positions."""
    logits = filter_logits(tensors, examples["confidence"])  # [B, L]
    masked = examples["masked"]
    right = examples["right"][masked].float()
    return F.binary_cross_entropy_with_logits(logits[masked], right)


def dependency_loss(tensors: Tensors, examples: Example) -> Tensor:
    """DEMASK: cross-entropy against total variations, mean over pairs of masks.

    It is least at their conditional mean.
    """
    logits = dependency_logits(tensors, examples["hidden"])  # [B, L, L]
    masked = examples["masked"]
    itself = torch.eye(masked.shape[1], dtype=torch.bool)
    pairs = masked[:, :, None] & masked[:, None] & ~itself  # [B, L, L]
    return F.binary_cross_entropy_with_logits(logits[pairs], examples["dependency"][pairs])


LOSSES: dict[Kind, Callable[[Tensors, Example], Tensor]] = {
    "learn2pd": filter_loss,
    "demask": dependency_loss,
}


def record(
    model: Any, examples: Sequence[Encoded], special_ids: SpecialIds, config: HeadConfig
) -> Example:
    """States of the responses with their labels, in an order drawn at random.

    Args:
        model: the model that a head is for.
        examples: its own responses, decoded one token a step.
        special_ids: those of its checkpoint.
        config: how the head is trained.
    """
    check_weights(model)
    check_examples(examples, model.config.vocab_size, special_ids.mask_token_id)
    generator = torch.Generator().manual_seed(config.seed)
    ordered = by_length(examples)
    found = list[Example]()
    for first in range(0, len(ordered), config.record_batch_size):
        with torch.no_grad():
            chosen = ordered[first : first + config.record_batch_size]
            blocks = Blocks(model, chosen, special_ids)
        if config.kind == "learn2pd":
            found += filter_examples(blocks)
        else:
            found += dependency_examples(blocks, generator)
    states = {name: torch.cat([example[name] for example in found]) for name in found[0]}
    order = torch.randperm(len(states["masked"]), generator=generator)
    return {name: value[order] for name, value in states.items()}


def fit(
    states: Example,
    config: HeadConfig,
    *,
    model_digest: str,
    hidden_size: int,
    sample: Tensor | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Head:
    """The head that minimises the loss of its kind over the recorded states.

    The last tenth of the states is not learnt from; it says how good the head is.

    Args:
        states: what `record` returns.
        config: how the head is trained.
        model_digest: of the model's weights (`checkpoint.weights_digest`).
        hidden_size: D of the model.
        sample: `heads.weights_sample` of the model, by which its head is known to belong to it.
        report: told how the loss falls.
    """
    kind = cast(Kind, config.kind)
    head_loss = LOSSES[kind]
    length = states["masked"].shape[1]
    generator = torch.Generator().manual_seed(config.seed)
    tensors = _initial(shapes(kind, length, hidden_size, config.inner_size), generator)
    count = len(states["masked"])
    learnt = max(1, count - int(HELD_OUT * count))
    batch_size = min(config.batch_size, learnt)

    optimizer = torch.optim.AdamW(tensors.values(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_steps)
    for step in range(config.max_steps):
        rows = torch.randint(learnt, (batch_size,), generator=generator)
        loss = head_loss(tensors, {name: value[rows] for name, value in states.items()})
        _check_finite(step + 1, {"loss": loss.detach()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == config.max_steps:
            report(f"step {step + 1}: loss {loss.item():.4f}")

    tensors = {name: value.detach() for name, value in tensors.items()}
    _check_finite(config.max_steps, tensors)
    if learnt < count:
        held_out = head_loss(tensors, {name: value[learnt:] for name, value in states.items()})
        report(f"{learnt} states learnt, loss {held_out.item():.4f} on {count - learnt} others")
    return Head(kind, model_digest, length, hidden_size, config.max_steps, tensors, sample)


def _check_finite(step: int, tensors: Tensors) -> None:
    found = first_not_finite(tensors.items())
    if found is not None:
        name, value = found
        raise InputError(
            f"step {step}: `{name}` is not finite but {value}; nothing was saved",
            hint="lower `learning_rate`",
        )


def _initial(wanted: dict[str, tuple[int, ...]], generator: torch.Generator) -> Tensors:
    """Matrices of entries ~ N(0, 1 / inputs), vectors of zeros."""
    made: Tensors = {}
    for name, shape in wanted.items():
        made[name] = torch.zeros(shape)
        if len(shape) == 2:
            made[name] = torch.randn(shape, generator=generator) / shape[0] ** 0.5
        made[name].requires_grad_()
    return made
