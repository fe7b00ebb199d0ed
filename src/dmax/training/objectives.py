"""Training objectives as pure functions of (model, batch): MDLM, uniform noise and OPUT.

B sequences, L positions, V vocabulary, D hidden. The network is trained on [noisy | clean]
(`attention.noisy_clean`). The clean half sees only clean tokens, so its keys and values do not
depend on the noise: it is run once, into a cache, and any number of noisy streams attend to it.
OPUT needs two, the masked one and the one with the model's own predictions, and the logits of the
first *are* the rollout; 3L tokens a step instead of the published 2 x (2L + 2L).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.training.clean_stream import IGNORE, Batch, CleanStream

Rollout = Literal["argmax", "sample", "soft", "spd"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss to minimise, and what it is made of.

    Attributes:
        total: scalar, with gradient.
        parts: scalars without gradient, by name.
        per_sequence: [B] float32 mean loss of each sequence, by name, without gradient.
    """

    total: Tensor
    parts: dict[str, Tensor]
    per_sequence: dict[str, Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over labelled positions, of the batch (scalar) and of each sequence [B] (float32)."""
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    loss = loss.view(labels.shape)
    counted = labels != IGNORE
    return loss.sum() / counted.sum().clamp(min=1), loss.sum(dim=1).detach() / counted.sum(
        dim=1
    ).clamp(min=1)


def mdlm_loss(model: Any, batch: Batch, *, block_length: int, mask_token_id: int) -> Loss:
    """Masked block diffusion: recover the clean tokens from masks (paper eq. 5's L_mask alone).

    Like the published code, all labelled positions count, masked or not, without a 1/t weight.
    """
    clean = CleanStream(model, batch.clean_ids, block_length)
    logits = clean.denoise(model.get_input_embeddings()(batch.noisy_ids))
    loss, each = cross_entropy(logits, batch.labels)
    return Loss(loss, {"loss_masked": loss.detach()}, {"masked": each})


def uniform_loss(
    model: Any, batch: Batch, random_ids: Tensor, *, block_length: int, mask_token_id: int
) -> Loss:
    """The uniform-noise baseline: masks, and random vocabulary tokens in place of on-policy ones (paper eq. 2).

    `random_ids` [B, L'] int64: the clean ids with random replacements (`noise.random_tokens`).
    """
    clean = CleanStream(model, batch.clean_ids, block_length)
    embed = model.get_input_embeddings()
    labels = batch.labels
    masked, each_masked = cross_entropy(clean.denoise(embed(batch.noisy_ids)), labels)
    random, each_random = cross_entropy(clean.denoise(embed(random_ids)), labels)
    parts = {"loss_masked": masked.detach(), "loss_random": random.detach()}
    return Loss((masked + random) / 2, parts, {"masked": each_masked, "random": each_random})


def oput_loss(
    model: Any,
    batch: Batch,
    *,
    block_length: int,
    mask_token_id: int,
    rollout: Rollout = "argmax",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Loss:
    """On-policy uniform training: recover the clean tokens from masks *and* from the model's own predictions.

        x^(p)_i = x^(m)_i where it is not MASK, else x̂_i ~ p_θ(· | x^(m)), without gradient           (3)
        L = L_mask + L_pred = -Σ_i log p_θ(x_0^i | x^(m)) - Σ_i log p_θ(x_0^i | x^(p))                (4-6)

    Both sums run over all labelled positions; as in the published code they are means, and we halve
    the sum, so that the learning rate means the same as for `mdlm_loss`.

    Args:
        model: any block-diffusion model with `base_model`, `get_input_embeddings` and
            `forward(inputs_embeds, ...)`.
        batch: clean, masked and label ids.
        block_length: block size of the diffusion.
        mask_token_id: MASK, never predicted by the rollout.
        rollout: how x̂ enters the second stream. `argmax` (the published recipe), `sample` (eq. 3
            as written), `soft`: the very blends of prediction and mask that soft parallel decoding
            will feed (`dmax.blend`), or `spd`: those blends for the confident prefix of each
            block's masks alone, as one of its steps promotes it at a threshold drawn from U(0, 1)
            per sequence; the other masks stay.
        temperature: of the sampling rollout.
        generator: random source of the rollout.

    Returns:
        The loss; `parts` adds `rollout_error`, the share of predicted tokens that differ from the
        clean ones.
    """
    embed = model.get_input_embeddings()
    noisy = batch.noisy_ids
    labels = batch.labels
    was_masked = noisy == mask_token_id
    clean = CleanStream(model, batch.clean_ids, block_length)

    # 1. the masked stream: M_θ(x^(m))
    masked_logits = clean.denoise(embed(noisy))  # [B, L', V]
    masked, each_masked = cross_entropy(masked_logits, labels)

    # 2. the on-policy rollout, from the same logits, without gradient
    predicted, confidence = roll_out(
        masked_logits.detach(), mask_token_id, rollout, temperature, generator
    )
    promoted = was_masked
    if rollout == "spd":
        thresholds = torch.rand(len(noisy), 1, generator=generator).to(noisy.device)
        promoted = confident_prefix(was_masked, confidence, thresholds, block_length)
    is_soft = rollout in ("soft", "spd")
    soft = SoftTokens(promoted, predicted[..., None], confidence[..., None]) if is_soft else None

    # 3. the predicted stream: M_θ(x^(p))
    inputs = embed_tokens(embed, torch.where(promoted, predicted, noisy), soft, mask_token_id)
    predicted_loss, each_predicted = cross_entropy(clean.denoise(inputs), labels)

    wrong = (predicted != labels) & was_masked & (labels != IGNORE)
    error = wrong.sum() / (was_masked & (labels != IGNORE)).sum().clamp(min=1)
    parts = {
        "loss_masked": masked.detach(),
        "loss_predicted": predicted_loss.detach(),
        "rollout_error": error,
    }
    return Loss(
        (masked + predicted_loss) / 2, parts, {"masked": each_masked, "predicted": each_predicted}
    )


def confident_prefix(
    masked: Tensor, confidence: Tensor, threshold: Tensor, block_length: int
) -> Tensor:
    """The masks of each block [B, L] bool before its first one below the threshold [B, 1], all shapes as in a batch."""
    low = (masked & (confidence < threshold)).unflatten(1, (-1, block_length))
    return masked & (low.cumsum(dim=-1) == 0).flatten(1)


@torch.no_grad()
def roll_out(
    logits: Tensor,
    mask_token_id: int,
    rollout: Rollout,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """One parallel prediction of every position: tokens [B, L] int64 and their probabilities [B, L] float32."""
    logits = logits.float().index_fill(
        -1, torch.tensor([mask_token_id], device=logits.device), float("-inf")
    )
    if rollout == "sample":
        drawn = torch.multinomial(
            (logits / temperature).softmax(-1).flatten(0, 1), 1, generator=generator
        )
        tokens = drawn.view(logits.shape[:-1])
    else:
        tokens = logits.argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
