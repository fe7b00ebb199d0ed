"""On-policy training on the blends that decoding feeds, which is ours and not DMax's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.decoding.spd import prefix
from dmax.training.clean_stream import CleanBatch, CleanStream, NoisyBatch
from dmax.training.objectives import SEQUENCES, Loss, Objective, halves, mean, rollout_error
from dmax.training.rollout import draw
from dmax.training.vocabulary import score


def soft_oput_loss(
    model: Any,
    batch: NoisyBatch,
    thresholds: Tensor,
    *,
    block_length: int,
    mask_token_id: int,
    average: str = SEQUENCES,
) -> Loss:
    """`oput_loss` whose second stream is what soft parallel decoding feeds after one step.

    In every block the confident prefix of the masks, or the leftmost one, is fed as blends of
    prediction and mask. The masks after it stay. At a threshold of 0 all masks become blends.

    Args:
        model: as `oput_loss` takes it.
        batch: clean, masked and label ids.
        thresholds: [B, 1] float32, the confidence from which a sequence's masks are decoded.
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        average: as `dmax.training.objectives.mean` takes it.

    Returns:
        The loss, with the parts of `oput_loss`.
    """
    embed = model.get_input_embeddings()
    is_masked = batch.noisy_ids == mask_token_id
    clean = CleanStream(model, batch.clean_ids, block_length, batch.positions)
    states = clean.denoise(embed(batch.noisy_ids))
    masked = score(states, batch.labels, predicts=is_masked, mask_token_id=mask_token_id)

    decoded = decoded_masks(is_masked, masked.confidence, thresholds, block_length)
    predicted_ids = torch.where(decoded, masked.tokens, batch.noisy_ids)
    soft = SoftTokens(decoded, masked.tokens[..., None], masked.confidence[..., None])
    inputs = embed_tokens(embed, predicted_ids, soft, mask_token_id)
    predicted = score(clean.denoise(inputs), batch.labels)

    return halves(
        mean(masked.losses, batch.labels, "masked", average),
        mean(predicted.losses, batch.labels, "predicted", average),
        rollout_error=rollout_error(masked.tokens, batch.labels, is_masked),
    )


def decoded_masks(
    masked: Tensor, confidence: Tensor, thresholds: Tensor, block_length: int
) -> Tensor:
    """The masks that one step of decoding replaces, if it decodes all blocks at once.

    Args:
        masked: [B, L] bool.
        confidence: [B, L] float32.
        thresholds: [B, 1] float32.
        block_length: positions of a block, a divisor of L.

    Returns:
        [B, L] bool.
    """
    blocks = (-1, block_length)
    threshold = thresholds.expand_as(confidence).reshape(blocks)[:, :1]  # [B * blocks, 1]
    decoded = prefix(masked.reshape(blocks), confidence.reshape(blocks), threshold)
    return decoded.view(masked.shape)


@dataclass(frozen=True, slots=True)
class SoftOPUT(Objective):
    """On-policy uniform training on blends, `soft_oput_loss`.

    Attributes:
        rollout: "soft" turns all masks into blends. "spd" draws a threshold from U(0, 1) for each
            sequence, and masks stay where decoding at that threshold would leave them.
    """

    decoding = "spd"

    rollout: str

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Mask tokens; the model itself draws the rest of the noise."""
        batch, ratios = self.masked(clean, generator)
        device = clean.clean_ids.device
        thresholds = torch.zeros(len(ratios), 1, device=device)
        if self.rollout == "spd":
            thresholds = draw(thresholds.shape, generator, device)
        return soft_oput_loss(
            model,
            batch,
            thresholds,
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            average=self.loss_average,
        )
