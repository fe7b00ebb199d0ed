"""What a model is trained for: masked diffusion, uniform noise, and on-policy uniform training.

Every loss is a pure function of (model, batch), and every objective draws the noise for its loss.
The clean half of the training sequence is run once (`CleanStream`), and each noisy copy attends to
it. On-policy uniform training needs two noisy copies, and the logits of the first one are its
rollout: a step runs 3L tokens, where the published code runs 2 x (2L + 2L).

Shapes: B sequences of L positions, L' of them in the noisy copy, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.training.clean_stream import IGNORE, Batch, CleanBatch, CleanStream
from dmax.training.noise import mask_ratios, mask_tokens, random_tokens
from dmax.training.rollout import roll_out, rollout_error


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
    batch: Batch,
    *,
    block_length: int,
    mask_token_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
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
        temperature: of the rollout; 0 takes the most probable tokens (`roll_out`).
        generator: random source of the rollout.

    Returns:
        The loss; its `parts` have `rollout_error`, the share of wrong predictions.
    """
    embed = model.get_input_embeddings()
    is_masked = batch.noisy_ids == mask_token_id
    clean = CleanStream(model, batch.clean_ids, block_length)

    # 1. The masked stream, x^(m).
    masked_logits = clean.denoise(embed(batch.noisy_ids))  # [B, L', V]

    # 2. The rollout takes the place of the masks (3).
    predicted = roll_out(masked_logits, mask_token_id, temperature, generator)  # [B, L']
    predicted_ids = torch.where(is_masked, predicted, batch.noisy_ids)

    # 3. The predicted stream, x^(p).
    predicted_logits = clean.denoise(embed(predicted_ids))  # [B, L', V]

    # 4. Both streams are to give the clean tokens (4-6).
    masked_loss = cross_entropy(masked_logits, batch.labels, "masked")
    predicted_loss = cross_entropy(predicted_logits, batch.labels, "predicted")
    error = rollout_error(predicted, batch.labels, is_masked)
    return mean_loss(masked_loss, predicted_loss, rollout_error=error)


def mdlm_loss(model: Any, batch: Batch, *, block_length: int) -> Loss:
    """Masked block diffusion: recover the clean tokens from masks (eq. 1).

    Like the published code, all labelled positions count, masked or not, without a 1/t weight.
    """
    clean = CleanStream(model, batch.clean_ids, block_length)
    logits = clean.denoise(model.get_input_embeddings()(batch.noisy_ids))
    return cross_entropy(logits, batch.labels, "masked")


def uniform_loss(model: Any, batch: Batch, random_ids: Tensor, *, block_length: int) -> Loss:
    """Uniform diffusion: recover the clean tokens from masks and from random tokens (eq. 2).

    The paper's baseline has random tokens where on-policy training has the model's own (A19 in
    docs/paper.md). `random_ids` [B, L'] int64 are the clean ids with random ones among them.
    """
    embed = model.get_input_embeddings()
    clean = CleanStream(model, batch.clean_ids, block_length)
    masked_logits = clean.denoise(embed(batch.noisy_ids))
    random_logits = clean.denoise(embed(random_ids))
    masked_loss = cross_entropy(masked_logits, batch.labels, "masked")
    random_loss = cross_entropy(random_logits, batch.labels, "random")
    return mean_loss(masked_loss, random_loss)


def cross_entropy(
    logits: Tensor, labels: Tensor, stream: str, weights: Tensor | None = None
) -> Loss:
    """The mean cross-entropy of one stream over its labelled positions.

    Args:
        logits: [B, L', V], any float dtype; the loss is computed in float32.
        labels: [B, L'] int64, the clean tokens, or `IGNORE`.
        stream: its name in the loss.
        weights: [B, L'] float32, of every position in the mean; None: labelled ones count alike.
    """
    if weights is None:
        weights = (labels != IGNORE).float()
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    weighted = losses.view(labels.shape) * weights
    mean = weighted.sum() / weights.sum().clamp(min=1e-6)
    per_sequence = weighted.detach().sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)  # [B]
    return Loss(mean, {f"loss_{stream}": mean.detach()}, {stream: per_sequence})


def mean_loss(first: Loss, second: Loss, **parts: Tensor) -> Loss:
    """The mean of the losses of two streams, with further parts to log."""
    total = (first.total + second.total) / 2
    both = first.parts | second.parts
    return Loss(total, both | parts, first.per_sequence | second.per_sequence)


@dataclass(frozen=True, slots=True)
class Objective(ABC):
    """A training objective: it draws noise for clean sequences and returns a loss.

    Subclasses are dataclasses of their settings. Each field is set by the training argument or
    special id of its name.

    Attributes:
        decoding: the strategy that decodes a model trained so.
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        mask_ratio_low: the lowest share of response tokens that are masked.
        mask_ratio_high: the highest share.
    """

    decoding: ClassVar[str]

    block_length: int
    mask_token_id: int
    mask_ratio_low: float
    mask_ratio_high: float

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The objective with those of the settings that it has fields for."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: settings[name] for name in names if name in settings})

    @abstractmethod
    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Draw noise, the same for the same state of the generator, and return the loss."""

    def masked(self, clean: CleanBatch, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """The batch with masks, and the share of them in every sequence, [B] float32."""
        ids = clean.clean_ids
        ratios = mask_ratios(len(ids), self.mask_ratio_low, self.mask_ratio_high, generator)
        noisy = mask_tokens(ids, clean.corruptible, ratios, self.mask_token_id, generator)
        return Batch(ids, noisy[:, clean.start :], clean.labels[:, clean.start :]), ratios


@dataclass(frozen=True, slots=True)
class MDLM(Objective):
    """Masked block diffusion, `mdlm_loss`."""

    decoding = "threshold"

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens."""
        batch, _ = self.masked(clean, generator)
        return mdlm_loss(model, batch, block_length=self.block_length)


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
        noisy = random_ids[:, clean.start :]
        return uniform_loss(model, batch, noisy, block_length=self.block_length)


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
        )
