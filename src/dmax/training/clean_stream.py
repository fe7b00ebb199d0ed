"""The clean half of block-diffusion training: run once, and read by any number of noisy streams.

Training shows the network [noisy | clean], two copies of every sequence (DMax, section 3.1). Clean
positions never see noisy ones, so their keys and values do not depend on the noise.

Shapes: B sequences of L positions, L' of them in the noisy copy, V vocabulary, D hidden size,
G key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmax.attention import dense_mask, noisy_clean

IGNORE = -100
"""The label of positions without loss."""
Layers = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [B, G, L, d] by the index of their layer."""


@dataclass(frozen=True, slots=True)
class CleanBatch:
    """Sequences before any noise, as the collator makes them.

    Attributes:
        clean_ids: [B, L] int64, prompt, response and padding (EOS); L is a whole number of blocks.
        labels: [B, L] int64, the token to predict, or `IGNORE`.
        corruptible: [B, L] bool, where noise may fall: the response and its padding.
        start: where the noisy copy begins, the first position of a block. All that stands before
            it is prompt in every sequence, so it has no noise and no loss.
    """

    clean_ids: Tensor
    labels: Tensor
    corruptible: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Clean sequences, and the noisy copy of their last L' positions; L' = L if all are noisy.

    Attributes:
        clean_ids: [B, L] int64, prompt, response and padding (EOS); L is a whole number of blocks.
        noisy_ids: [B, L'] int64, the end of the same sequences with some positions corrupted.
        labels: [B, L'] int64, the clean token where there is a loss, else `IGNORE`.
    """

    clean_ids: Tensor
    noisy_ids: Tensor
    labels: Tensor


class CleanStream:
    """One forward over clean sequences, with gradient, and what noisy streams make of it.

    Args:
        model: a block-diffusion model with `base_model` and `forward(inputs_embeds, …)`.
        clean_ids: [B, L] int64; L is a whole number of blocks.
        block_length: positions that are decoded together.
    """

    def __init__(self, model: Any, clean_ids: Tensor, block_length: int) -> None:
        length = clean_ids.shape[1]
        self._model = model
        self._visible = noisy_clean(block_length, length)
        self._positions = torch.arange(length, device=clean_ids.device)
        self._clean = length + self._positions  # [L], where the clean half is in [noisy | clean]
        recorded: Layers = {}
        # The clean half is context only, so the backbone runs without its output layer.
        model.base_model(
            input_ids=clean_ids,
            attention_mask=dense_mask(self._visible, self._clean, self._clean)[None, None],
            position_ids=self._positions[None],
            past_key_values=ContextCache(recorded, records=True),
        )
        self._context = ContextCache(recorded, records=False)

    def denoise(self, inputs_embeds: Tensor) -> Tensor:
        """Logits [B, L', V] of a noisy copy of the last L' positions, given as [B, L', D]."""
        noisy = self._positions[-inputs_embeds.shape[1] :]
        keys = torch.cat((self._clean, noisy))
        mask = dense_mask(self._visible, noisy, keys)  # [L', L + L']
        outputs = self._model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask[None, None],
            position_ids=noisy[None],
            past_key_values=self._context,
        )
        return outputs.logits


@dataclass
class ContextCache:
    """Keys and values of one forward, kept with their gradient for other forwards to attend to.

    The forward that records them sees only itself. The others see the recorded positions before
    their own, and add nothing. Repeating either one changes nothing, which gradient checkpointing
    relies on.

    Attributes:
        layers: what is recorded, the same dictionary for all forwards.
        records: whether this is the cache of the first forward.
    """

    layers: Layers
    records: bool

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """All that is visible to new keys and values [B, G, L', d] of a layer, theirs included."""
        if self.records:
            self.layers.setdefault(layer_idx, (key, value))
            return key, value
        recorded_key, recorded_value = self.layers[layer_idx]  # [B, G, L, d]
        return torch.cat((recorded_key, key), dim=2), torch.cat((recorded_value, value), dim=2)
