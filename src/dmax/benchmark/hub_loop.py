"""The loop of the published checkpoints' own `generate`, kept as the reference that the engine is measured against.

It has no cache of keys and values: every step runs the whole prefix and the open block under the
block-causal mask and makes logits of all positions. One sequence at a time. Apart from where it
computes, it decides as the engine does. L block length, P positions up to the end of the open
block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.blend import SoftTokens, embed_tokens
from dmax.checkpoint import Checkpoint


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    prompt_ids: Sequence[int],
    *,
    threshold: float,
    soft: bool,
    max_new_tokens: int,
    stop_confidence: float = 0.9,
) -> tuple[tuple[int, ...], int]:
    """Greedy decoding, with `soft` by SPD (arXiv 2604.08302), else by threshold (LLaDA-2.0).

    Returns:
        The completion, cut at the first EOS and at the limit, and the number of forwards.
    """
    model: Any = checkpoint.model
    special_ids = checkpoint.special_ids
    mask_id = special_ids.mask_token_id
    ends = set(special_ids.eos_token_ids)
    length = special_ids.block_length
    prompt = len(prompt_ids)
    embed = model.get_input_embeddings()
    forwards = 0
    total = -(-(prompt + max_new_tokens) // length) * length
    x = torch.full((1, total), mask_id)
    x[0, :prompt] = torch.tensor(prompt_ids)
    positions = torch.arange(total)
    visible = dense_mask(block_causal(length), positions, positions)[
        None, None
    ]  # [1, 1, total, total]
    for start in range(prompt // length * length, total, length):
        end = start + length
        block = x[0, start:end]  # a view: writing it writes x
        active = positions[start:end] >= prompt
        masked = active.clone()
        feed = None
        for _ in range(length):
            embeds = torch.cat(
                (embed(x[:, :start]), embed_tokens(embed, block[None], feed, mask_id)), dim=1
            )  # [1, P, D]
            mask = visible[..., :end, :end]
            logits = model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions[None, :end]
            ).logits  # [1, P, V]
            tokens, confidence = best(logits[0, -length:].float(), mask_id)
            forwards += 1
            commit = select(masked, confidence, threshold, leftmost=soft)
            edit = soft & active & ~masked
            changed = commit | (edit & (tokens != block))
            block[:] = torch.where(commit | edit, tokens, block)
            masked = masked & ~commit
            if soft:
                feed = SoftTokens(
                    (active & ~masked)[None], tokens[None, :, None], confidence[None, :, None]
                )
            sure = not changed.any() or bool((confidence >= stop_confidence)[active].all())
            if not masked.any() and (sure or not soft):
                break
        if ends & set(block[active].tolist()):
            break
    completion = x[0, prompt:end].tolist()
    stop = next((index for index, token in enumerate(completion) if token in ends), len(completion))
    return tuple(completion[: min(stop, max_new_tokens)]), forwards


def best(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Most probable token other than MASK of each position of logits [L, V], and its probability, MASK's share in."""
    probs = logits.softmax(dim=-1)
    tokens = logits.index_fill(-1, torch.tensor([mask_id]), float("-inf")).argmax(dim=-1)
    return tokens, probs.gather(-1, tokens[:, None])[:, 0]


def select(masked: Tensor, confidence: Tensor, threshold: float, *, leftmost: bool) -> Tensor:
    """Masks [L] to decode: all confident ones or the best; with `leftmost` the confident prefix or the first."""
    low = confidence < threshold
    chosen = masked & ((masked & low).cumsum(0) == 0 if leftmost else ~low)
    if chosen.any() or not masked.any():
        return chosen
    first = masked.int().argmax() if leftmost else torch.where(masked, confidence, -1.0).argmax()
    return torch.zeros_like(masked).index_fill(0, first, True)
