"""Objectives of rival methods, over the same batches and models as DMax's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.training.clean_stream import IGNORE, Batch, CleanStream
from dmax.training.objectives import Loss, cross_entropy


def certainty_loss(
    model: Any,
    batch: Batch,
    *,
    block_length: int,
    mask_token_id: int,
    weight: float = 2.0,
    temperature: float = 0.5,
) -> Loss:
    """Certainty-forcing distillation (dParallel, arXiv 2509.26488): be right about the masks, and sure where right.

        L = CE over masked positions + weight * mean entropy of softmax(logits / temperature), in
        nats,
            over the masked positions whose prediction is already right

    Meant for a model's own responses and half of each block masked; `temperature` below 1 sharpens
    what is forced.
    """
    logits = CleanStream(model, batch.clean_ids, block_length).denoise(
        model.get_input_embeddings()(batch.noisy_ids)
    )
    labels = batch.labels
    labels = labels.masked_fill(batch.noisy_ids != mask_token_id, IGNORE)
    loss = cross_entropy(logits, labels, "masked")
    right = (logits.argmax(dim=-1) == labels) & (labels != IGNORE)
    entropy = torch.special.entr((logits.float() / temperature).softmax(dim=-1)).sum(
        dim=-1
    )  # [B, L']
    certainty = (entropy * right).sum() / right.sum().clamp(min=1)
    parts = loss.parts | {"entropy_right": certainty.detach()}
    return Loss(loss.total + weight * certainty, parts, loss.per_sequence)


def d2f_loss(
    model: Any, batch: Batch, ratios: Tensor, *, block_length: int, mask_token_id: int
) -> Loss:
    """Discrete diffusion forcing (arXiv 2508.09192): recover the masks of every block behind *unfinished* ones.

        L = Σ_i w_i CE_i / Σ_i w_i over masked positions, w_i = 1 / ratio of its block

    One stream, block-causal: a block sees the noisy blocks before it as they are, which is what a
    window of open blocks shows the model. Targets are the tokens of the data, best the model's own
    responses, where the source has a bidirectional teacher's distribution.

    Args:
        model: as in `oput_loss`.
        batch: noisy ids with a mask ratio that rises from block to block (`noise.rising_ratios`).
        ratios: [B, L] float32, those ratios.
        block_length: block size of the diffusion.
        mask_token_id: MASK.
    """
    position = torch.arange(batch.noisy_ids.shape[1], device=batch.noisy_ids.device)
    causal = dense_mask(block_causal(block_length), position, position)[None, None]  # [1, 1, L, L]
    logits = model(
        input_ids=batch.noisy_ids, attention_mask=causal, position_ids=position[None]
    ).logits
    counted = (batch.noisy_ids == mask_token_id) & (batch.labels != IGNORE)
    labels = batch.labels.masked_fill(~counted, IGNORE)
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    weights = counted / ratios.to(loss.device).clamp(min=1e-3)
    weighted = loss.view(labels.shape) * weights
    total = weighted.sum() / weights.sum().clamp(min=1e-6)
    each = weighted.detach().sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)
    return Loss(total, {"loss_masked": total.detach()}, {"masked": each})
