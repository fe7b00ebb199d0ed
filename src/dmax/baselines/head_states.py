"""What the heads learn from: blocks in every state between masked and finished, with the answers measured in the model.

Responses are the model's own, decoded one token a step. All blocks of a response are denoised at
once, each behind its clean predecessors, which is what decoding shows the model. N blocks, L
positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dmax.confidence import candidates
from dmax.special_ids import SpecialIds
from dmax.training import noise
from dmax.training.clean_stream import IGNORE, CleanStream
from dmax.training.data import Collator, Encoded

Reveal = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From masked [N, L], logits [N, L, V] and the final tokens [N, L] to the masked positions to decode [N, L] bool."""
Example = dict[str, Tensor]
"""Examples for a head by the names that its loss takes; every tensor has a leading dimension N."""


class Blocks:
    """The blocks that a batch of responses fills, and the model's view of them in any state.

    Attributes:
        final: [N, L] int64, their final tokens; what follows EOS in the last block is EOS.
        masked: [N, L] bool, the positions to decode; none in blocks of padding.
    """

    def __init__(self, model: Any, examples: Sequence[Encoded], special_ids: SpecialIds) -> None:
        self.model = model
        self.special_ids = special_ids
        device = model.device
        batch = Collator(special_ids.block_length, special_ids.eos_token_ids[0], eos_labels=1)(
            examples
        )
        start = int(batch["start"])
        clean = batch["clean_ids"].to(device)
        self._stream = CleanStream(model, clean, special_ids.block_length)
        self._num_rows = len(clean)
        self.final = self._blocks(clean[:, start:])
        is_answered = self._blocks(batch["labels"][:, start:].to(device) != IGNORE).any(
            dim=1, keepdim=True
        )
        self.masked = self._blocks(batch["corruptible"][:, start:].to(device)) & is_answered

    def _blocks(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.special_ids.block_length)).flatten(0, 1)

    def denoise(self, masked: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits [N, L, V] of the blocks with `masked` [N, L] positions, the others `tokens` (None: the final ones)."""
        visible = self.final if tokens is None else tokens
        ids = visible.masked_fill(masked, self.special_ids.mask_token_id).view(self._num_rows, -1)
        return self._blocks(self._stream.denoise(self.model.get_input_embeddings()(ids)))

    def hidden_states(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, L, V], and the hidden states [N, L, D] that the model's head makes them from."""
        with _inputs_of(self.model.get_output_embeddings()) as seen:
            logits = self.denoise(masked)
        return logits, self._blocks(seen[0])


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module while the context is open."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def replay(blocks: Blocks, reveal: Reveal) -> Iterator[tuple[Tensor, Tensor]]:
    """Masked positions [N, L] and logits [N, L, V] at every step of decoding the blocks, in the order of `reveal`.

    Whatever is decoded gets its final token, so that blocks stay on the recorded way.
    """
    masked = blocks.masked
    while masked.any():
        logits = blocks.denoise(masked)
        yield masked, logits
        masked = masked & ~reveal(masked, logits, blocks.final)


def filter_examples(blocks: Blocks) -> Iterator[Example]:
    """Learn2PD's labels: at every step of the "extremely greedy" oracle, which predictions are final already.

    The oracle decodes exactly the masks whose likeliest token is the final one, or the most
    confident mask if none is. Each example has `confidence` [L], `right` [L] and `masked` [L].
    """
    mask_token_id = blocks.special_ids.mask_token_id

    def reveal(masked: Tensor, logits: Tensor, final: Tensor) -> Tensor:
        best = candidates(logits, 1, mask_token_id)
        right = masked & (best.ids[..., 0] == final)
        surest = torch.where(masked, best.probs[..., 0], float("-inf")).argmax(dim=1, keepdim=True)
        stuck = masked.any(dim=1, keepdim=True) & ~right.any(dim=1, keepdim=True)
        return right | torch.zeros_like(masked).scatter(1, surest, stuck)

    for masked, logits in replay(blocks, reveal):
        best = candidates(logits, 1, mask_token_id)
        right = best.ids[..., 0] == blocks.final
        yield _rows(
            {"confidence": best.probs[..., 0], "right": right, "masked": masked}, masked.any(dim=1)
        )


@torch.no_grad()
def dependency_examples(blocks: Blocks, generator: torch.Generator) -> Iterator[Example]:
    """DEMASK's labels: how far each masked position's likeliest token would move the distribution at the others.

        D_ij = TV(p(x_j | ctx), p(x_j | ctx, x_i)) = ½ Σ_v |p(v) - p'(v)|

    One state a block, a share ~ U(0, 1) of its positions masked, costs a forward and one more for
    each mask; those of all blocks run side by side. Each example has `hidden` [L, D], `dependency`
    [L, L] (i first) and `masked` [L].
    """
    shares = noise.mask_ratios(len(blocks.final), 0.0, 1.0, generator)
    drawn = torch.rand(blocks.final.shape, generator=generator) < shares[:, None]
    masked = blocks.masked & drawn.to(blocks.masked.device)
    logits, hidden = blocks.hidden_states(masked)
    tokens = candidates(logits, 1, blocks.special_ids.mask_token_id).ids[..., 0]
    before = logits.float().softmax(dim=-1)
    dependency = torch.zeros(*masked.shape, masked.shape[1], device=masked.device)
    for rank in range(1, int(masked.sum(dim=1).max()) + 1):
        told = masked & (
            masked.cumsum(dim=1) == rank
        )  # the next mask of every block that has one more
        after = (
            blocks.denoise(masked & ~told, torch.where(told, tokens, blocks.final))
            .float()
            .softmax(dim=-1)
        )
        distance = (after - before).abs().sum(dim=-1) / 2  # [N, L]
        dependency = torch.where(told[:, :, None], distance[:, None], dependency)
    yield _rows(
        {"hidden": hidden, "dependency": dependency, "masked": masked}, masked.sum(dim=1) > 1
    )


def _rows(example: Example, which: Tensor) -> Example:
    return {name: value[which].cpu() for name, value in example.items()}
