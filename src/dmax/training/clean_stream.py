"""The clean half of block-diffusion training: run once, and read by any number of noisy streams.

Training shows the network [noisy | clean], two copies of every sequence (DMax, section 3.1). Clean
positions never see noisy ones, so their keys and values do not depend on the noise. The first noisy
stream runs beside the clean half in one forward, and later ones read what that forward recorded.

Shapes: B sequences of L positions, L' of them in the noisy copy, V vocabulary, D hidden size,
G key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmax.attention import Mask, noisy_clean, training_mask
from dmax.special_ids import reads_shifted
from dmax.training.vocabulary import IGNORE, States

Layers = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [B, G, L, d] by the index of their layer."""


@dataclass(frozen=True, slots=True)
class CleanBatch:
    """Sequences before any noise, as the collator makes them.

    Attributes:
        clean_ids: [B, L] int64, prompt, response and padding (EOS); L is a whole number of blocks.
        labels: [B, L] int64, the token to predict, or `IGNORE`.
        corruptible: [B, L] bool, where noise may fall: the response and its padding.
        progress: the share of the training that is done.
    """

    clean_ids: Tensor
    labels: Tensor
    corruptible: Tensor
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class NoisyBatch:
    """Clean sequences, and a noisy copy of L' positions of each.

    Attributes:
        clean_ids: [B, L] int64, prompt, response and padding (EOS); L is a whole number of blocks.
        noisy_ids: [B, L'] int64, positions of the same sequences, some of them corrupted.
        labels: [B, L'] int64, the clean token where there is a loss, else `IGNORE`.
        positions: [B, L'] int64, where the noisy copies stand, whole blocks in a row; None: they
            are the last L' positions.
        places: [B, L'] int64, how many noisy blocks before its own each position sees in place of
            clean ones, as decoding several open blocks shows them; None: none.
    """

    clean_ids: Tensor
    noisy_ids: Tensor
    labels: Tensor
    positions: Tensor | None = None
    places: Tensor | None = None


def noisy_positions(clean: CleanBatch, block_length: int) -> Tensor:
    """The blocks of every sequence that noise and loss can reach, [B, L'] int64.

    A sequence's begin with the block that holds the end of its prompt, and L' covers the most
    labelled blocks that one of them has. Where a sequence has fewer, they count on, beyond L too.
    """
    length = clean.clean_ids.shape[1]
    position = torch.arange(length, device=clean.clean_ids.device)
    first = clean.corruptible.int().argmax(dim=1) // block_length * block_length  # [B]
    behind_last = ((clean.labels != IGNORE) * (position + 1)).amax(dim=1)  # [B]
    num_blocks = -(-(behind_last - first) // block_length)  # [B]
    most = int(num_blocks.max().clamp(min=1)) * block_length
    return first[:, None] + torch.arange(most, device=position.device)


def take(values: Tensor, positions: Tensor, beyond: int = 0) -> Tensor:
    """Values [B, L] at positions [B, L'], and `beyond` at positions that are not there."""
    length = values.shape[1]
    taken = values.gather(1, positions.clamp(max=length - 1))
    return taken.masked_fill(positions >= length, beyond)


class CleanStream:
    """Clean sequences as context, with gradient, for the noisy streams that are denoised in it.

    Args:
        model: a block-diffusion model with `base_model` and `forward(inputs_embeds, …)`.
        clean_ids: [B, L] int64; L is a whole number of blocks.
        block_length: positions that are decoded together.
        positions: of the noisy streams, as `NoisyBatch` has them.
        places: the same.
    """

    def __init__(
        self,
        model: Any,
        clean_ids: Tensor,
        block_length: int,
        positions: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        self._model = model
        self._clean_ids = clean_ids[:, :-block_length]  # nobody sees the last block
        self._block_length = block_length
        self._noisy = positions
        self._places = places
        self._layers: Layers = {}
        self._shift = reads_shifted(model.config)
        self._clean: Tensor | None = None  # [B, L - block, D or V], where the reading is shifted

    def denoise(self, inputs_embeds: Tensor) -> States:
        """What the model makes of a noisy copy, given as embeddings [B, L', D].

        The first call runs [noisy | clean] and records the clean half's keys and values.
        """
        length = inputs_embeds.shape[1]
        end = self._clean_ids.shape[1] + self._block_length
        position = torch.arange(end, device=inputs_embeds.device)[None]  # [1, L]
        noisy = position[:, -length:] if self._noisy is None else self._noisy  # [1 or B, L']
        clean = position[:, : -self._block_length].expand(len(noisy), -1)
        # What counts on beyond the end has no label, and a model may have no positions there.
        within = noisy.clamp(max=end - 1)
        records = not self._layers
        if records:
            context = self._model.get_input_embeddings()(self._clean_ids)  # [B, L, D]
            inputs_embeds = torch.cat((inputs_embeds, context), dim=1)
        states = States.of(
            self._model,
            inputs_embeds.shape[1] if self._shift else length,
            inputs_embeds=inputs_embeds,
            attention_mask=self._mask(noisy, clean, records),
            position_ids=torch.cat((within, clean), dim=1) if records else within,
            past_key_values=ContextCache(self._layers, clean.shape[1], records),
        )
        return self._shifted(states, noisy) if self._shift else states

    def _shifted(self, states: States, noisy: Tensor) -> States:
        """The states of a noisy copy, each in the place of the position after it.

        What stands before a block is clean, where it is not a noisy block that this one sees.
        """
        length = noisy.shape[1]
        if self._clean is None:
            self._clean = states.values[:, length:]
        both = torch.cat((states.values[:, :length], self._clean), dim=1)
        index = torch.arange(length, device=noisy.device)
        follows_noisy = index % self._block_length > 0
        if self._places is not None:
            follows_noisy = follows_noisy | (self._places > 0)
        last = self._clean.shape[1] - 1  # positions beyond the end of a sequence have no label
        clean_before = torch.where(noisy > 0, length + (noisy - 1).clamp(max=last), index)
        before = torch.where(follows_noisy, index - 1, clean_before)  # [1 or B, L'], into both
        before = before.expand(len(both), -1)[..., None].expand(-1, -1, both.shape[2])
        return replace(states, values=both.gather(1, before))

    def _mask(self, noisy: Tensor, clean: Tensor, records: bool) -> Mask:
        """Who sees whom: [noisy | clean] among themselves, or noisy ones [clean | noisy]."""
        offset = clean.shape[1] + self._block_length + noisy.shape[1]  # above all positions
        visible = noisy_clean(self._block_length, offset)
        if self._places is not None:
            noisy = noisy - offset * self._places
            clean = clean.expand(len(noisy), -1)
        implementation = self._model.config._attn_implementation
        if records:
            both = torch.cat((noisy, offset + clean), dim=1)
            return training_mask(visible, both, both, implementation)
        keys = torch.cat((offset + clean, noisy), dim=1)
        return training_mask(visible, noisy, keys, implementation)


class ContextCache:
    """Keys and values of the clean half, kept with their gradient for later forwards to attend to.

    The forward that records them sees only itself. The others see the recorded positions before
    their own, and add nothing. Repeating either one changes nothing, which gradient checkpointing
    relies on. It is no dataclass, because FSDP hands copies of those to a layer.

    Attributes:
        layers: what is recorded, the same dictionary for all forwards.
        length: how many positions are recorded, the last ones of the first forward.
        records: whether this is the cache of the first forward.
    """

    def __init__(self, layers: Layers, length: int, records: bool) -> None:
        self.layers = layers
        self.length = length
        self.records = records

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions stand before new ones; some models ask for it and do without."""
        return 0 if self.records else self.length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """All that is visible to new keys and values [B, G, L', d] of a layer, theirs included."""
        if self.records:
            start = key.shape[2] - self.length
            self.layers.setdefault(layer_idx, (key[:, :, start:], value[:, :, start:]))
            return key, value
        recorded_key, recorded_value = self.layers[layer_idx]  # [B, G, L, d]
        return torch.cat((recorded_key, key), dim=2), torch.cat((recorded_value, value), dim=2)
