"""What a model is trained for: masked diffusion, uniform noise, and on-policy uniform training.

Every loss is a pure function of (model, batch), and every objective draws the noise for its loss.
The clean half of the training sequence is run once (`CleanStream`), and each noisy copy attends to
it. On-policy uniform training needs two noisy copies, and what the first one predicts is its
rollout: a step runs 3L tokens in two forwards, where the published code runs 2 x (2L + 2L) in four.

Shapes: B sequences of L positions, L' of them in the noisy copy, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dmax.training.clean_stream import CleanBatch, CleanStream, NoisyBatch, noisy_positions, take
from dmax.training.noise import mask_ratios, mask_tokens, random_tokens
from dmax.training.vocabulary import IGNORE, score

if TYPE_CHECKING:
    from dmax.training.data import Collator

SEQUENCES = "sequences"
AVERAGES = (SEQUENCES, "labels")
"""What a loss can be averaged over (`mean`)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss to minimise, and what it is made of.

    Attributes:
        total: scalar, with gradient.
        parts: scalars without gradient, by the name they are logged under.
        per_sequence: [B] float32 mean loss of each sequence, without gradient, by stream.
    """

    total: Tensor
    parts: dict[str, Tensor]
    per_sequence: dict[str, Tensor]


def oput_loss(
    model: Any,
    batch: NoisyBatch,
    *,
    block_length: int,
    mask_token_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    average: str = SEQUENCES,
) -> Loss:
    """On-policy uniform training: recover the clean tokens from masks and from own predictions.

        x^(p)_i = x^(m)_i where it is not MASK, else x̂_i ~ p_θ(· | x^(m)), without gradient     (3)
        p^(m) = M_θ(x^(m)),   p^(p) = M_θ(x^(p))                                                 (4)
        L_mask = -Σ_i log p^(m)(x_0^i),   L_pred = -Σ_i log p^(p)(x_0^i)                         (5)
        L = L_mask + L_pred                                                                      (6)

    Both sums run over all labelled positions, masked or not. As in the published code they are
    means. Their sum is halved, so that a learning rate means what it means for `mdlm_loss`.

    Args:
        model: a block-diffusion model with `base_model`, `get_input_embeddings` and
            `forward(inputs_embeds, …)`.
        batch: clean, masked and label ids.
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        temperature: of the rollout; 0 takes the most probable tokens (`pick`).
        generator: random source of the rollout.
        average: as `mean` takes it.

    Returns:
        The loss; its `parts` have `rollout_error`, the share of wrong predictions.
    """
    embed = model.get_input_embeddings()
    is_masked = batch.noisy_ids == mask_token_id
    clean = CleanStream(model, batch.clean_ids, block_length, batch.positions, batch.places)

    # 1. The masked stream x^(m), and what it says in place of the masks.
    masked = score(
        clean.denoise(embed(batch.noisy_ids)),
        batch.labels,
        predicts=is_masked,
        mask_token_id=mask_token_id,
        temperature=temperature,
        generator=generator,
    )

    # 2. The rollout x^(p) (3).
    predicted_ids = torch.where(is_masked, masked.tokens, batch.noisy_ids)

    # 3. The predicted stream.
    predicted = score(clean.denoise(embed(predicted_ids)), batch.labels)

    # 4. Both streams are to give the clean tokens (4-6).
    return halves(
        mean(masked.losses, batch.labels, "masked", average),
        mean(predicted.losses, batch.labels, "predicted", average),
        rollout_error=rollout_error(masked.tokens, batch.labels, is_masked),
    )


def mdlm_loss(
    model: Any, batch: NoisyBatch, *, block_length: int, average: str = SEQUENCES
) -> Loss:
    """Masked block diffusion: recover the clean tokens from masks (eq. 1).

    Like the published code, all labelled positions count, masked or not, without a 1/t weight.
    """
    clean = CleanStream(model, batch.clean_ids, block_length, batch.positions)
    states = clean.denoise(model.get_input_embeddings()(batch.noisy_ids))
    return mean(score(states, batch.labels).losses, batch.labels, "masked", average)


def uniform_loss(
    model: Any,
    batch: NoisyBatch,
    random_ids: Tensor,
    *,
    block_length: int,
    average: str = SEQUENCES,
) -> Loss:
    """Uniform diffusion: recover the clean tokens from masks and from random tokens (eq. 2).

    The paper's baseline has random tokens where on-policy training has the model's own (A19 in
    docs/paper.md). `random_ids` [B, L'] int64 are the clean ids with random ones among them.
    """
    embed = model.get_input_embeddings()
    labels = batch.labels
    clean = CleanStream(model, batch.clean_ids, block_length, batch.positions)
    masked = score(clean.denoise(embed(batch.noisy_ids)), labels)
    random = score(clean.denoise(embed(random_ids)), labels)
    return halves(
        mean(masked.losses, labels, "masked", average),
        mean(random.losses, labels, "random", average),
    )


def mean(
    losses: Tensor, labels: Tensor, stream: str, average: str, weights: Tensor | None = None
) -> Loss:
    """The mean loss of one stream.

    Args:
        losses: [B, L'], of every position.
        labels: [B, L'] int64, the clean tokens, or `IGNORE`.
        stream: its name in the loss.
        average: "sequences" is the mean over each sequence's labels, and then over the sequences,
            as in the published code, where it does not matter which ones share a batch. "labels"
            is one mean over all labels of the batch.
        weights: [B, L'] float32, of every position in the mean; None: labelled ones count alike.
    """
    if weights is None:
        weights = (labels != IGNORE).to(losses.dtype)
    weighted = losses * weights
    per_sequence = weighted.sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)  # [B]
    if average == SEQUENCES:
        total = per_sequence.mean()
    else:
        total = weighted.sum() / weights.sum().clamp(min=1e-6)
    return Loss(total, {f"loss_{stream}": total.detach()}, {stream: per_sequence.detach()})


def halves(first: Loss, second: Loss, **parts: Tensor) -> Loss:
    """Half the sum of the losses of two streams, with further parts to log."""
    total = (first.total + second.total) / 2
    both = first.parts | second.parts
    return Loss(total, both | parts, first.per_sequence | second.per_sequence)


def rollout_error(predicted: Tensor, labels: Tensor, is_masked: Tensor) -> Tensor:
    """The share of labelled masks whose prediction is not the clean token, a scalar.

    Args:
        predicted: [B, L] int64, tokens of a rollout.
        labels: [B, L] int64, the clean tokens, or `IGNORE`.
        is_masked: [B, L] bool.
    """
    counted = is_masked & (labels != IGNORE)
    wrong = counted & (predicted != labels)
    return wrong.sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True, slots=True)
class Objective(ABC):
    """A training objective: it draws noise for clean sequences and returns a loss.

    Subclasses are dataclasses of their settings. Each field is set by the training argument or
    special id of its name.

    Attributes:
        decoding: the strategy that decodes a model trained so; None: as the model before.
        collator: makes batches of examples; None: as all others do.
        batch: what a batch is.
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        mask_ratio_low: the lowest share of response tokens that are masked.
        mask_ratio_high: the highest share.
        loss_average: "sequences" or "labels", as `mean` takes it.
    """

    decoding: ClassVar[str | None]
    collator: ClassVar[type[Collator] | None] = None
    batch: ClassVar[type[CleanBatch]] = CleanBatch

    block_length: int
    mask_token_id: int
    mask_ratio_low: float
    mask_ratio_high: float
    loss_average: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The objective with those of the settings that it has fields for."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: settings[name] for name in names if name in settings})

    def start(self, network: Any, device: torch.device) -> Self:
        """The objective of a run, with what it keeps of the network as training begins.

        A run that is resumed asks for it before it loads the weights of a checkpoint. `network` may
        have adapters, or no weights yet on ranks above 0 (`dmax.training.sharding`).
        """
        return self

    @abstractmethod
    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Draw noise, the same for the same state of the generator, and return the loss."""

    def masked(self, clean: CleanBatch, generator: torch.Generator) -> tuple[NoisyBatch, Tensor]:
        """The batch with masks, and the share of them in every sequence, [B] float32.

        The noisy copies begin and end with the blocks of the responses.
        """
        ids = clean.clean_ids
        ratios = mask_ratios(len(ids), self.mask_ratio_low, self.mask_ratio_high, generator)
        masked = mask_tokens(ids, clean.corruptible, ratios, self.mask_token_id, generator)
        positions = noisy_positions(clean, self.block_length)
        noisy = take(masked, positions)
        labels = take(clean.labels, positions, beyond=IGNORE)
        return NoisyBatch(ids, noisy, labels, positions), ratios


class ObjectiveModule(nn.Module):
    """A network and its objective as one module, whose forward is the loss.

    An objective runs the network several times and calls methods of it. `DistributedDataParallel`,
    FSDP2 and `torch.compile` want one forward of the outermost module, and this is it.

    Args:
        network: a block-diffusion model, or one with adapters of `peft`.
        objective: what it is trained for.
        compiled: compile the loss with `torch.compile`.
    """

    def __init__(self, network: nn.Module, objective: Objective, *, compiled: bool = False) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self._loss = torch.compile(_loss) if compiled else _loss

    def forward(
        self, generator: torch.Generator, block_length: int | None = None, **clean: Any
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            generator: random source of the noise, on the device of the network.
            block_length: in place of the objective's.
            clean: the fields of the objective's batch.

        Returns:
            `loss`, a scalar with gradient, and the parts to log, scalars without.
        """
        network: Any = self.network
        if hasattr(network, "get_base_model"):  # adapters of peft stand within its layers
            network = network.get_base_model()
        objective = self.objective
        if block_length not in (None, objective.block_length):
            objective = replace(objective, block_length=block_length)
        loss = self._loss(objective, network, objective.batch(**clean), generator)
        return {"loss": loss.total, **loss.parts}


def _loss(objective: Objective, *arguments: Any) -> Loss:
    return objective.loss(*arguments)


@dataclass(frozen=True, slots=True)
class MDLM(Objective):
    """Masked block diffusion, `mdlm_loss`."""

    decoding = "threshold"

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens."""
        batch, _ = self.masked(clean, generator)
        return mdlm_loss(model, batch, block_length=self.block_length, average=self.loss_average)


@dataclass(frozen=True, slots=True)
class Uniform(Objective):
    """The uniform-noise baseline of the paper, `uniform_loss`."""

    decoding = "spd"

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens in one stream, and draw random ones at the same ratios in the other."""
        batch, ratios = self.masked(clean, generator)
        random_ids = random_tokens(
            clean.clean_ids,
            clean.corruptible,
            ratios,
            model.config.vocab_size,
            self.mask_token_id,
            generator,
        )
        assert batch.positions is not None
        noisy = take(random_ids, batch.positions)
        return uniform_loss(
            model, batch, noisy, block_length=self.block_length, average=self.loss_average
        )


@dataclass(frozen=True, slots=True)
class OPUT(Objective):
    """DMax's on-policy uniform training, `oput_loss`.

    Attributes:
        rollout: "argmax", as the published code has it, or "sample", as equation 3 is written.
        rollout_temperature: of the samples.
    """

    decoding = "spd"

    rollout: str
    rollout_temperature: float

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens; the model itself draws the rest of the noise."""
        batch, _ = self.masked(clean, generator)
        return oput_loss(
            model,
            batch,
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            temperature=self.rollout_temperature if self.rollout == "sample" else 0.0,
            generator=generator,
            average=self.loss_average,
        )
