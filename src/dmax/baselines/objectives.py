"""Objectives of other methods, over the same batches and models as DMax's own.

Shapes: B sequences of L positions, L' of them in the noisy copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import block_causal, training_mask
from dmax.special_ids import reads_shifted
from dmax.training.clean_stream import CleanBatch, CleanStream, NoisyBatch
from dmax.training.noise import mask_tokens
from dmax.training.objectives import SEQUENCES, Loss, Objective, mean
from dmax.training.vocabulary import IGNORE, States, score


def certainty_loss(
    model: Any,
    batch: NoisyBatch,
    *,
    block_length: int,
    mask_token_id: int,
    weight: float,
    temperature: float,
    average: str = SEQUENCES,
) -> Loss:
    """Certainty-forcing distillation (dParallel, arXiv 2509.26488): be right, and sure of it.

        L = CE over masked positions + weight * mean entropy of softmax(logits / temperature)

    The entropy, in nats, is that of masked positions whose prediction is already right. The source
    trains on a model's own responses with half of each block masked.

    Args:
        model: as `oput_loss` takes it.
        batch: clean, masked and label ids.
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        weight: of the entropy.
        temperature: below 1 it sharpens what is forced.
        average: of both terms, as `dmax.training.objectives.mean` takes it.
    """
    clean = CleanStream(model, batch.clean_ids, block_length, batch.positions)
    states = clean.denoise(model.get_input_embeddings()(batch.noisy_ids))
    logits = states.logits().float()  # [B, L', V]
    labels = batch.labels.masked_fill(batch.noisy_ids != mask_token_id, IGNORE)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # [B, L']
    loss = mean(losses, labels, "masked", average)

    is_right = (logits.argmax(dim=-1) == labels) & (labels != IGNORE)
    # Of logarithms, which are finite where a probability rounds to 0: `entr` has no gradient there.
    log_probs = (logits / temperature).log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)  # [B, L']
    certainty = mean(entropy, labels, "right", average, weights=is_right.float()).total
    parts = loss.parts | {"entropy_right": certainty.detach()}
    return Loss(loss.total + weight * certainty, parts, loss.per_sequence)


@dataclass(frozen=True, slots=True)
class DParallelObjective(Objective):
    """dParallel's certainty-forcing distillation, `certainty_loss`.

    Attributes:
        certainty_weight: of the entropy of right predictions.
        certainty_temperature: of the softmax in that entropy.
    """

    decoding = "dparallel"

    certainty_weight: float
    certainty_temperature: float

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens."""
        batch, _ = self.masked(clean, generator)
        return certainty_loss(
            model,
            batch,
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            weight=self.certainty_weight,
            temperature=self.certainty_temperature,
            average=self.loss_average,
        )


def d2f_loss(
    model: Any,
    batch: NoisyBatch,
    ratios: Tensor,
    *,
    block_length: int,
    mask_token_id: int,
    average: str = SEQUENCES,
) -> Loss:
    """Discrete diffusion forcing (arXiv 2508.09192): recover masks after unfinished blocks.

        L = Σ_i w_i CE_i / Σ_i w_i over masked positions, w_i = 1 / ratio of its block

    There is one stream, and it is block-causal: a block sees the noisy blocks before it as they
    are, which is what a window of open blocks shows the model. Where the reading is shifted, so is
    the state before a block. Targets are the tokens of the data, best the model's own responses.
    The source has a bidirectional teacher's distribution instead.

    Args:
        model: a block-diffusion model.
        batch: masked and label ids of whole sequences, L' = L.
        ratios: [B, L] float32, the mask ratio of every position (`rising_ratios`).
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        average: as `dmax.training.objectives.mean` takes it.
    """
    length = batch.noisy_ids.shape[1]
    position = torch.arange(length, device=batch.noisy_ids.device)[None]  # [1, L]
    implementation = model.config._attn_implementation
    states = States.of(
        model,
        length,
        input_ids=batch.noisy_ids,
        attention_mask=training_mask(
            block_causal(block_length), position, position, implementation
        ),
        position_ids=position,
    )
    if reads_shifted(model.config):
        states = replace(states, values=before(states.values))
    counted = (batch.noisy_ids == mask_token_id) & (batch.labels != IGNORE)
    labels = batch.labels.masked_fill(~counted, IGNORE)
    weights = counted / ratios.to(labels.device).clamp(min=1e-3)
    return mean(score(states, labels).losses, labels, "masked", average, weights)


def before(states: Tensor) -> Tensor:
    """The states [B, L, D] one position earlier; the first position keeps its own."""
    return torch.cat((states[:, :1], states[:, :-1]), dim=1)


@dataclass(frozen=True, slots=True)
class D2FObjective(Objective):
    """Discrete diffusion forcing, `d2f_loss`."""

    decoding = "d2f"

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens, more of them from block to block."""
        low = self.mask_ratio_low
        high = self.mask_ratio_high
        ids = clean.clean_ids
        ratios = rising_ratios(clean.corruptible, clean.labels, self.block_length, low, high)
        noisy = mask_tokens(ids, clean.corruptible, ratios, self.mask_token_id, generator)
        return d2f_loss(
            model,
            NoisyBatch(ids, noisy, clean.labels),
            ratios,
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            average=self.loss_average,
        )


def rising_ratios(
    corruptible: Tensor, labels: Tensor, block_length: int, low: float, high: float
) -> Tensor:
    """Mask ratios that rise evenly from a response's first block to its last (D2F).

    They depend on nothing else in the batch, nor on how far it is padded.

    Args:
        corruptible: [B, L] bool, the response and its padding.
        labels: [B, L] int64, the last block is that of the last label, which may be an EOS.
        block_length: positions of a block.
        low: the ratio in the first block.
        high: the ratio in the last block, if it is not the first, and in the padding after it.

    Returns:
        [B, L] float32.
    """
    block = torch.arange(corruptible.shape[1], device=corruptible.device) // block_length  # [L]
    first = block[corruptible.int().argmax(dim=1)][:, None]  # [B, 1]
    last = (block * (labels != IGNORE)).amax(dim=1, keepdim=True)  # [B, 1]
    blocks_to_rise = (last - first).clamp(min=1)
    risen = ((block - first) / blocks_to_rise).clamp(0, 1)  # [B, L]
    return low + (high - low) * risen
