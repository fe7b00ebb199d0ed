"""One optimiser step of the published training, in its plainest form (DMax at 82bc29e).

It shares nothing with `dmax.training`, so that the two can be compared. The published data set has
every sequence twice: once to learn from masks, once to learn from the model's own predictions. Both
iterations run [noisy | clean], 2L positions, for a rollout without gradient, which the first throws
away, and run it again for the loss. That is 8L positions for a pair; `dmax` runs 3L.

L positions of a sequence, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label of positions without loss."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence with its noise, a micro-batch by itself.

    Attributes:
        clean_ids: [L] int64, prompt, response and padding (EOS); L is a whole number of blocks.
        noisy_ids: [L] int64, the same with masks in the response and its padding.
        labels: [L] int64, the clean token where there is a loss, else `IGNORE`.
    """

    clean_ids: Tensor
    noisy_ids: Tensor
    labels: Tensor


def encode(
    tokenizer: Any, question: str, answer: str, *, length: int, block_length: int, eos: int
) -> tuple[Tensor, Tensor]:
    """A chat as clean ids and labels, [length] int64 each.

    The chat template renders the assistant's turn too, with the token that closes it. EOS fills the
    sequence up, and one block of it is labelled. The prompt is not.
    """
    user = {"role": "user", "content": question}
    chat = [user, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids[: len(prompt)] == prompt and len(ids) + block_length <= length
    clean_ids = torch.tensor(ids + [eos] * (length - len(ids)))
    labels = clean_ids.clone()
    labels[: len(prompt)] = IGNORE
    labels[len(ids) + block_length :] = IGNORE
    return clean_ids, labels


def step(
    model: Any,
    samples: Sequence[Sample],
    *,
    block_length: int,
    mask_token_id: int,
    eos_token_id: int,
    skips_unused_rollout: bool = False,
) -> Tensor:
    """Add the gradients of one step to the model's, and return the loss, a scalar.

    Every sequence is a micro-batch, in two iterations. The loss is the mean over its labels, and
    the step takes the mean over the micro-batches.
    """
    options = {"block_length": block_length, "eos_token_id": eos_token_id}
    losses = []
    for sample in samples:
        for learns_from_predictions in (False, True):
            noisy_ids = sample.noisy_ids
            if learns_from_predictions or not skips_unused_rollout:
                predicted_ids = rollout(model, sample, mask_token_id, **options)
                if learns_from_predictions:
                    noisy_ids = predicted_ids
            logits = noisy_logits(model, noisy_ids, sample.clean_ids, **options)
            loss = F.cross_entropy(logits, sample.labels, ignore_index=IGNORE)
            (loss / (2 * len(samples))).backward()
            losses.append(loss.detach())
    return torch.stack(losses).mean()


@torch.no_grad()
def rollout(model: Any, sample: Sample, mask_token_id: int, **options: int) -> Tensor:
    """The noisy sequence with the model's best token in place of every mask, [L] int64."""
    was_training = model.training
    model.eval()
    predicted = noisy_logits(model, sample.noisy_ids, sample.clean_ids, **options).argmax(dim=-1)
    model.train(was_training)
    return torch.where(sample.noisy_ids == mask_token_id, predicted, sample.noisy_ids)


def noisy_logits(
    model: Any, noisy_ids: Tensor, clean_ids: Tensor, *, block_length: int, eos_token_id: int
) -> Tensor:
    """Logits [L, V] of the noisy half of one forward over [noisy | clean]."""
    length = len(clean_ids)
    ids = torch.cat((noisy_ids, clean_ids))[None]  # [1, 2L]
    table = model.get_input_embeddings().weight  # [V, D]
    outputs = model(
        # The published class pads with EOS, and its row of the table gets no gradient.
        inputs_embeds=F.embedding(ids, table, padding_idx=eos_token_id),
        attention_mask=visibility(length, block_length)[None, None],
        position_ids=torch.arange(length).repeat(2)[None],
    )
    return outputs.logits[0, :length]


def visibility(length: int, block_length: int) -> Tensor:
    """Who sees whom in [noisy | clean], [2L, 2L] bool (block diffusion, arXiv 2503.09573)."""
    place = torch.arange(2 * length)
    block = place % length // block_length
    query_block = block[:, None]
    query_is_clean = (place >= length)[:, None]
    key_is_clean = place >= length
    own_block = (query_block == block) & (query_is_clean == key_is_clean)
    earlier_clean_blocks = (query_block > block) & key_is_clean
    return own_block | earlier_clean_blocks
