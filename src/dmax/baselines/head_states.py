"""What heads learn from: blocks in every state from masked to finished, with the answers.

The answers are measured in the model, on its own responses, decoded one token a step. All blocks
of a response are denoised at once, each after clean predecessors, as decoding shows them to the
model.

Shapes: B responses, N blocks, L positions of a block, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dmax.confidence import candidates
from dmax.decoding.selection import most_confident
from dmax.errors import InputError
from dmax.records.encoding import Encoded
from dmax.special_ids import SpecialIds, reads_shifted
from dmax.training.clean_stream import CleanStream
from dmax.training.data import Collator
from dmax.training.noise import mask_ratios
from dmax.training.vocabulary import IGNORE

Reveal = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Which masks to decode [N, L], from masked [N, L], logits [N, L, V] and final tokens [N, L]."""
Example = dict[str, Tensor]
"""Examples for a head by the names that its loss takes; each tensor has N rows."""


def by_length(examples: Iterable[Encoded]) -> list[Encoded]:
    """Examples in the order of their lengths, so that those of a batch need little padding."""
    return sorted(examples, key=lambda each: len(each["prompt_ids"]) + len(each["response_ids"]))


class Blocks:
    """The blocks that a batch of responses fills, and the model's view of them in any state.

    Attributes:
        special_ids: those of the checkpoint.
        final: [N, L] int64, their final tokens; after the first EOS of a response all are EOS.
        masked: [N, L] bool, the positions to decode; none in blocks that are all padding.
    """

    def __init__(self, model: Any, examples: Sequence[Encoded], special_ids: SpecialIds) -> None:
        self.model = model
        self.special_ids = special_ids
        length = special_ids.block_length
        batch = Collator(length, special_ids.eos_token_ids[0], eos_labels=1)(examples)
        start = int(batch["corruptible"].int().argmax(dim=1).min()) // length * length
        clean = batch["clean_ids"].to(model.device)
        labels = batch["labels"].to(model.device)
        corruptible = batch["corruptible"].to(model.device)

        self._stream = CleanStream(model, clean, length)
        self._num_responses = len(clean)
        self.final = self._blocks(clean[:, start:])
        has_labels = self._blocks(labels[:, start:] != IGNORE).any(dim=1, keepdim=True)  # [N, 1]
        self.masked = self._blocks(corruptible[:, start:]) & has_labels

    def _blocks(self, values: Tensor) -> Tensor:
        """The blocks of all responses, [B, blocks * L, …] to [N, L, …]."""
        return values.unflatten(1, (-1, self.special_ids.block_length)).flatten(0, 1)

    def denoise(self, masked: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits [N, L, V] of the blocks in a state.

        Args:
            masked: [N, L] bool, what is still masked.
            tokens: [N, L] int64, what stands at the other positions; None: the final tokens.
        """
        visible = self.final if tokens is None else tokens
        ids = visible.masked_fill(masked, self.special_ids.mask_token_id)
        embeds = self.model.get_input_embeddings()(ids.view(self._num_responses, -1))
        return self._blocks(self._stream.denoise(embeds).logits())

    def hidden_states(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, L, V], and the hidden states [N, L, D] that the model makes them from.

        Raises:
            InputError: the model's reading is shifted within a forward that makes its logits.
        """
        if reads_shifted(self.model.config) and not getattr(self.model, "has_linear_head", False):
            raise InputError(
                f"{type(self.model).__name__} with `shift` does not show the hidden states that a "
                "head learns from",
                hint="train a head of the kind learn2pd",
            )
        with _inputs_of(self.model.get_output_embeddings()) as inputs:
            logits = self.denoise(masked)
        return logits, self._blocks(inputs[0])


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module while the context is open."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


@torch.no_grad()
def replay(blocks: Blocks, reveal: Reveal) -> Iterator[tuple[Tensor, Tensor]]:
    """Masked positions [N, L] and logits [N, L, V] at every step of decoding, ordered by `reveal`.

    Whatever is decoded gets its final token, so that blocks keep to the recorded responses.
    """
    masked = blocks.masked
    while masked.any():
        logits = blocks.denoise(masked)
        yield masked, logits
        masked = masked & ~reveal(masked, logits, blocks.final)


def filter_examples(blocks: Blocks) -> Iterator[Example]:
    """Learn2PD's labels: which predictions are already final, at every step of its oracle.

    The "extremely greedy" oracle decodes exactly the masks whose most probable token is the final
    one, or the most confident mask if there is none. Each example has `confidence` [L], `right`
    [L] and `masked` [L].
    """
    mask_token_id = blocks.special_ids.mask_token_id

    def reveal(masked: Tensor, logits: Tensor, final: Tensor) -> Tensor:
        best = candidates(logits, 1, mask_token_id)
        right = masked & (best.ids[..., 0] == final)
        is_stuck = ~right.any(dim=1, keepdim=True)  # [N, 1]
        return right | (most_confident(masked, best.probs[..., 0]) & is_stuck)

    for masked, logits in replay(blocks, reveal):
        best = candidates(logits, 1, mask_token_id)
        right = best.ids[..., 0] == blocks.final
        example = {"confidence": best.probs[..., 0], "right": right, "masked": masked}
        yield _rows(example, masked.any(dim=1))


@torch.no_grad()
def dependency_examples(blocks: Blocks, generator: torch.Generator) -> Iterator[Example]:
    """DEMASK's labels: how far the most probable token of one mask moves the others' distributions.

        D_ij = TV(p(x_j | ctx), p(x_j | ctx, x_i)) = ½ Σ_v |p(v) - p'(v)|

    A block is seen in one state, with a share ~ U(0, 1) of its positions masked. That takes one
    forward and one more for each mask; all blocks go through them side by side. Each example has
    `hidden` [L, D], `dependency` [L, L] (i first) and `masked` [L].
    """
    shares = mask_ratios(len(blocks.final), 0.0, 1.0, generator)
    drawn = torch.rand(blocks.final.shape, generator=generator) < shares[:, None]
    masked = blocks.masked & drawn.to(blocks.masked.device)
    logits, hidden = blocks.hidden_states(masked)
    tokens = candidates(logits, 1, blocks.special_ids.mask_token_id).ids[..., 0]
    before = logits.float().softmax(dim=-1)

    dependency = torch.zeros(*masked.shape, masked.shape[1], device=masked.device)
    for rank in range(1, int(masked.sum(dim=1).max()) + 1):
        told = masked & (masked.cumsum(dim=1) == rank)  # the next mask of every block with one more
        logits = blocks.denoise(masked & ~told, torch.where(told, tokens, blocks.final))
        after = logits.float().softmax(dim=-1)
        distance = (after - before).abs().sum(dim=-1) / 2  # [N, L]
        dependency = torch.where(told[:, :, None], distance[:, None], dependency)
    example = {"hidden": hidden, "dependency": dependency, "masked": masked}
    yield _rows(example, masked.sum(dim=1) > 1)


def _rows(example: Example, which: Tensor) -> Example:
    """Some of the rows, on the CPU."""
    return {name: value[which].cpu() for name, value in example.items()}
