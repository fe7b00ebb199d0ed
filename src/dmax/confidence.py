"""From logits to the most probable tokens and their probabilities, under the rules of decoding.

MASK is never a candidate. But the probability that the model gives it counts against all others, as
in the published code (A9 in docs/paper.md): a position that would rather stay masked is not
confident. Infinite logits become the largest finite ones: +inf still wins, and a position where all
are -inf becomes uniform.

With a temperature T the first candidate is a sample of softmax(logits / T): the largest of
logits + T g, for independent Gumbel noise g, which no small T overflows. Its probability is that of
softmax(logits), MASK included, so that thresholds mean the same at every temperature. The most
probable others follow it.

The noise of a token is a function of four numbers: the seed of its request, its position in the
sequence, the step of its block, and its id. Nothing is drawn ahead or kept. So a completion depends
on its own seed and not on its neighbours, its slot or the number of rows, and a CUDA graph can hold
a step with noise. The random bits are those of Philox 4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) with the seed as key. The counter (v // 4, position, step, 0)
gives a word to each of four tokens v. Triton has the same bits (`tl.philox`), and two logarithms
that round in their own way.

Shapes: B blocks, L positions of a block, V vocabulary, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max / 4
"""What infinite logits are clamped to: the difference of two of them stays finite."""

CACHED = 2**17
"""Logits that a CPU works on at once, so that they and their softmax stay in its cache."""

WORD = 2**32 - 1
"""The largest word of Philox."""


@dataclass(frozen=True, slots=True, eq=False)
class GumbelNoise:
    """The noise of B blocks, times the temperature of each; it is made as far as it is asked for.

    Attributes:
        seeds: [B] int64, at least 0.
        temperatures: [B] float32; a block with 0 has no noise.
        starts: [B] int64, the position of each block in its sequence.
        steps: [B] int64, forwards already spent on each block.
        block_length: L.
        first: where among the B * L positions it begins.
    """

    seeds: Tensor
    temperatures: Tensor
    starts: Tensor
    steps: Tensor
    block_length: int
    first: int = 0

    def behind(self, num_positions: int) -> GumbelNoise:
        """The noise of the positions behind the next ones."""
        return replace(self, first=self.first + num_positions)

    def added_to(self, values: Tensor) -> Tensor:
        """Values [..., V] of the next positions with their noise, in the same dtype."""
        from dmax.kernels import can_fuse  # some of them import this file

        if can_fuse(values):
            from dmax.kernels import lm_head_triton

            return lm_head_triton.add_noise(values, self)
        index = torch.arange(values.shape[:-1].numel(), device=values.device) + self.first
        block = index // self.block_length
        position = (self.starts[block] + index % self.block_length)[:, None]
        step = self.steps[block, None]
        vocab_size = values.shape[-1]
        four = torch.arange(-(-vocab_size // 4), device=values.device)
        words = philox(self.seeds[block, None], four, position, step, torch.zeros_like(step))
        noise = gumbel(words).flatten(1)[:, :vocab_size]
        return values + (self.temperatures[block, None] * noise).view_as(values)


class Candidates(NamedTuple):
    """The most probable tokens of every position.

    Attributes:
        ids: [..., k] int64, tokens other than MASK, best first (the drawn one, if there is noise);
            ties go to the lowest id.
        probs: [..., k] float32 (float64 for float64 logits), their softmax probabilities; MASK
            takes part in the softmax.
        broken: [...] bool, the position's logits held a NaN; its ids and probabilities mean
            nothing.
    """

    ids: Tensor
    probs: Tensor
    broken: Tensor

    @property
    def tokens(self) -> Tensor:
        """[...] int64, the best token of every position."""
        return self.ids[..., 0]

    @property
    def confidence(self) -> Tensor:
        """[...] float32, its probability."""
        return self.probs[..., 0]

    def view(self, *shape: int) -> Candidates:
        """The same candidates with other leading dimensions, such as [B, L, k] for [N, k]."""
        ids = self.ids.view(*shape, -1)
        probs = self.probs.view(*shape, -1)
        return Candidates(ids, probs, self.broken.view(shape))


def concatenate(parts: list[Candidates]) -> Candidates:
    """The candidates of several groups of positions, one group after the other."""
    if len(parts) == 1:
        return parts[0]
    return Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def candidates(
    logits: Tensor, k: int, mask_token_id: int, noise: GumbelNoise | None = None
) -> Candidates:
    """The k most probable tokens of logits [..., V], or a drawn one and k - 1 others.

    At most V - 1 are given.
    """
    if logits.device.type != "cpu":
        return _candidates(logits, k, mask_token_id, noise)
    rows = max(1, CACHED // logits.shape[-1])
    parts = []
    for part in logits.flatten(0, -2).split(rows):
        parts.append(_candidates(part, k, mask_token_id, noise))
        noise = noise and noise.behind(rows)
    return concatenate(parts).view(*logits.shape[:-1])


def _candidates(
    logits: Tensor, k: int, mask_token_id: int, noise: GumbelNoise | None
) -> Candidates:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    finite = logits.to(dtype).clamp(-LARGEST, LARGEST)  # a copy of our own; a NaN stays
    shares = finite.softmax(dim=-1, dtype=precision(logits))
    finite[..., mask_token_id].fill_(float("-inf"))
    ids = choose(finite, k, noise)
    probs = shares.gather(-1, ids).to(dtype)
    return Candidates(ids, probs, probs[..., 0].isnan())


def choose(finite: Tensor, k: int, noise: GumbelNoise | None) -> Tensor:
    """Ids [..., k] of finite logits [..., V] with MASK's at -inf, which are overwritten."""
    if noise is not None:
        drawn = noise.added_to(finite).argmax(dim=-1, keepdim=True)
        finite.scatter_(-1, drawn, float("inf"))
    return take_best(finite, min(k, finite.shape[-1] - 1))


def precision(logits: Tensor) -> torch.dtype:
    """The dtype of the softmax: float32 for logits of 16 bits, else float64 where there is one.

    The confidence is fed back into the model. With exact logits, rounding it would be the largest
    error of a step.
    """
    has_few_bits = logits.dtype.itemsize < 4
    return torch.float32 if has_few_bits or logits.device.type == "mps" else torch.float64


def take_best(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row of [..., M], best first.

    Ties go to the lowest index, which `torch.topk` does not promise. A row with a NaN gives indices
    in range. With k > 1, `values` is overwritten.
    """
    found: list[Tensor] = []
    for _ in range(k):
        if found:
            values.scatter_(-1, found[-1], float("-inf"))
        found.append(values.argmax(dim=-1, keepdim=True))  # the first of several maxima
    return torch.cat(found, dim=-1)


def philox(seed: Tensor, *counter: Tensor) -> Tensor:
    """Four random words of each counter, [..., 4] int64 below 2^32, by Philox 4x32-10.

    Args:
        seed: [...] int64, at least 0.
        counter: four words, [...] int64 below 2^32; all broadcast.
    """
    key_0, key_1 = seed & WORD, seed >> 32
    word_0, word_1, word_2, word_3 = counter
    for _ in range(10):
        # Products have 64 bits, which wrap around the sign: the bits are right all the same. Bits
        # above a word go before they are multiplied.
        product_0 = word_0 * 0xD2511F53
        product_2 = word_2 * 0xCD9E8D57
        word_0 = ((product_2 >> 32) ^ word_1 ^ key_0) & WORD
        word_2 = ((product_0 >> 32) ^ word_3 ^ key_1) & WORD
        word_1 = product_2
        word_3 = product_0
        key_0 = key_0 + 0x9E3779B9
        key_1 = key_1 + 0xBB67AE85
    return torch.stack((word_0, word_1 & WORD, word_2, word_3 & WORD), dim=-1)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(1 - u)), finite float32, with u = (words + 1/2) / 2^32.

    Large noise, which decides an argmax, comes from a small u, where float32 tells all words apart.
    There a series is exact to float32, and log(1 - u) would not be. Where 1 - u would round to 0,
    the noise is at its smallest, -2.8.
    """
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    exponential = torch.where(u < 2.0**-6, series, -(1 - u).log())
    return -exponential.log()
