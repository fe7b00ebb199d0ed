"""DMax decoding in its plainest form: the loop of the published checkpoints, which has no cache.

Every step runs the whole prefix and the open block under the block-causal mask, and makes logits of
all positions. There is one sequence at a time. The loop decides as the engine does, and tests hold
the two together; the engine only computes less.

It computes what the published loop computes and takes the most probable token. The published
threshold loop draws one instead, even at temperature 0 (D12 in docs/paper.md).

P positions up to the end of the open block, L block length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmax.attention import block_causal, dense_mask
from dmax.blend import SoftTokens, embed_tokens
from dmax.checkpoint import Checkpoint

Predict = Callable[[Checkpoint, Tensor, SoftTokens | None], tuple[Tensor, Tensor]]
"""How `decode_block` runs the model; see `predict_anew`."""


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    prompt_ids: Sequence[int],
    *,
    threshold: float,
    soft: bool,
    max_new_tokens: int,
    stop_confidence: float = 0.9,
    predict: Predict | None = None,
) -> tuple[tuple[int, ...], int]:
    """Decode greedily: with `soft` by SPD (arXiv 2604.08302), else by threshold (LLaDA-2.0).

    Args:
        checkpoint: the model.
        prompt_ids: the prompt.
        threshold: confidence from which a masked position is decoded.
        soft: decode by SPD.
        max_new_tokens: where the completion ends at the latest.
        stop_confidence: of SPD.
        predict: what runs the model; None: without a cache.

    Returns:
        The completion, cut at the first EOS and at the limit, and the number of forwards.
    """
    predict = predict or predict_anew
    length = checkpoint.special_ids.block_length
    ends = set(checkpoint.special_ids.eos_token_ids)
    prompt = len(prompt_ids)
    num_blocks = -(-(prompt + max_new_tokens) // length)
    tokens = torch.full((num_blocks * length,), checkpoint.special_ids.mask_token_id)
    tokens[:prompt] = torch.tensor(prompt_ids)

    forwards = 0
    for block in range(prompt // length, num_blocks):
        end = (block + 1) * length
        active = torch.arange(end - length, end) >= prompt  # the prompt's tail is never written
        forwards += decode_block(
            checkpoint, predict, tokens[:end], active, threshold, soft, stop_confidence
        )
        if ends & set(tokens[prompt:end].tolist()):
            break

    completion = tokens[prompt:end].tolist()
    stop = next((place for place, token in enumerate(completion) if token in ends), len(completion))
    return tuple(completion[: min(stop, max_new_tokens)]), forwards


def decode_block(
    checkpoint: Checkpoint,
    predict: Predict,
    tokens: Tensor,
    active: Tensor,
    threshold: float,
    soft: bool,
    stop_confidence: float,
) -> int:
    """Decode the last block of `tokens` [P] in place, where `active` [L]; gives its forwards."""
    block = tokens[-len(active) :]  # a view: writing it writes `tokens`
    masked = active
    feed = None
    for forwards in range(1, len(active) + 1):
        best, confidence = predict(checkpoint, tokens, feed)

        promoted = select(masked, confidence, threshold, prefix_only=soft)  # [L] bool
        revised = active & ~masked & soft  # SPD may change what it has decoded before
        changed = promoted | (revised & (best != block))
        block[:] = torch.where(promoted | revised, best, block)
        masked = masked & ~promoted

        if soft:  # decoded tokens are fed back as blends with MASK (equations 8-10)
            decoded = active & ~masked
            feed = SoftTokens(decoded[None], best[None, :, None], confidence[None, :, None])
        is_sure = bool((confidence >= stop_confidence)[active].all())
        has_converged = not soft or is_sure or not changed.any()
        if has_converged and not masked.any():
            return forwards
    return len(active)


def predict_anew(
    checkpoint: Checkpoint, tokens: Tensor, feed: SoftTokens | None
) -> tuple[Tensor, Tensor]:
    """Run the model over everything; what `best_tokens` makes of the open block.

    Args:
        checkpoint: the model.
        tokens: all positions up to the end of the open block.
        feed: what goes in place of the open block's decoded tokens; None: the tokens.
    """
    model: Any = checkpoint.model
    length = checkpoint.special_ids.block_length
    embed = model.get_input_embeddings()
    prefix = embed(tokens[None, :-length])
    block = embed_tokens(embed, tokens[None, -length:], feed, checkpoint.special_ids.mask_token_id)
    positions = torch.arange(len(tokens))
    visible = dense_mask(block_causal(length), positions, positions)  # [P, P]

    output = model(
        inputs_embeds=torch.cat((prefix, block), dim=1),  # [1, P, D]
        attention_mask=visible[None, None],
        position_ids=positions[None],
    )
    return best_tokens(output.logits[0, -length:], checkpoint.special_ids.mask_token_id)


def best_tokens(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Of each position of a block [L, V] the best token and its probability, [L].

    MASK is never the best token, but it keeps its share of the probability.
    """
    logits = logits.float()
    without_mask = logits.index_fill(-1, torch.tensor([mask_token_id]), -torch.inf)
    best = without_mask.argmax(dim=-1)
    confidence = logits.softmax(dim=-1).gather(-1, best[:, None])[:, 0]
    return best, confidence


def select(masked: Tensor, confidence: Tensor, threshold: float, *, prefix_only: bool) -> Tensor:
    """Masked positions [L] to decode: the confident ones, or at least the best one.

    With `prefix_only` they are the confident prefix (section 3.2): the masked positions before the
    first that is not confident, or at least the first one.
    """
    confident = masked & (confidence >= threshold)
    if prefix_only:
        before_doubt = (masked & ~confident).cumsum(0) == 0
        confident = confident & before_doubt
    if confident.any() or not masked.any():
        return confident

    place = masked.int().argmax() if prefix_only else confidence.where(masked, -1.0).argmax()
    return torch.zeros_like(masked).index_fill(0, place, True)
