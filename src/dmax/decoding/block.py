"""One step of an open block: what a strategy sees, what it may decide, and what no decision breaks.

B blocks, L positions of a block, V vocabulary, k candidates. A strategy turns the logits of a
forward into a `Decision`. `apply` turns the decision into the block's next contents and enforces,
once for every strategy, that blocks progress, end, stay free of MASK and leave the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dmax.blend import Embed
from dmax.confidence import LARGEST, Candidates, GumbelNoise, candidates, precision

State = dict[str, Tensor]
"""What a strategy remembers of blocks; every tensor has a leading dimension B."""


@dataclass(frozen=True, slots=True)
class View:
    """What a strategy may read.

    Attributes:
        tokens: [B, L] int64, the mask id where nothing is decoded yet.
        masked: [B, L] bool, not decoded yet; a status, never inferred from ids.
        active: [B, L] bool, masked when the block was opened; the rest, the end of the prompt, is
            never written.
        step: [B] int64, forwards already spent on the block.
        max_steps: [B] int64, forwards that it may take.
        mask_token_id: MASK.
        embed: from token ids to embeddings, for strategies that mix embeddings of their own.
        noise: what tokens are drawn with, where blocks have a temperature; None: all are greedy.
        must_progress: [B] bool; False for a block that may wait for the one before it. None: all
            must.
    """

    tokens: Tensor
    masked: Tensor
    active: Tensor
    step: Tensor
    max_steps: Tensor
    mask_token_id: int
    embed: Embed | None = None
    noise: GumbelNoise | None = None
    must_progress: Tensor | None = None

    @property
    def decoded(self) -> Tensor:
        """[B, L] bool, positions that were decoded and may be revised."""
        return self.active & ~self.masked


@dataclass(eq=False)
class Output:
    """What the model says of B blocks, computed as far as a strategy asks for it.

    Most strategies need the best tokens only, so the whole vocabulary is often never written down.

    Attributes:
        source: logits [B, L, V] of the model, any float dtype, never written to; or a function that
            makes them when they are wanted.
        mask_token_id: MASK.
        candidates: gives the k best tokens under the noise without logits (a fused head), if there
            is such a thing.
        hidden_states: [B, L, D] of the last layer, where the engine provides them.
    """

    source: Tensor | Callable[[], Tensor]
    mask_token_id: int
    candidates: Callable[[int, GumbelNoise | None], Candidates] | None = None
    hidden_states: Tensor | None = None
    _best: dict[tuple[int, GumbelNoise | None], Candidates] = field(
        default_factory=dict, init=False
    )

    def top(self, k: int, noise: GumbelNoise | None = None) -> Candidates:
        """The k most probable tokens of every position, [B, L, k]; see `dmax.confidence`."""
        if (k, noise) not in self._best:
            if self.candidates is None:
                found = candidates(self.raw, k, self.mask_token_id, noise)
            else:
                found = self.candidates(k, noise)
            self._best[k, noise] = found
        return self._best[k, noise]

    @property
    def broken(self) -> Tensor:
        """[B] bool, the row's logits held a NaN."""
        best = next(iter(self._best.values()), None) or self.top(1)
        return best.broken.any(dim=1)

    @cached_property
    def logits(self) -> Tensor:
        """[B, L, V] float32, MASK's at -inf, the others finite."""
        logits = self._finite.clone()
        logits[..., self.mask_token_id].fill_(float("-inf"))
        return logits

    @cached_property
    def probs(self) -> Tensor:
        """[B, L, V] float32, softmax of the logits, MASK's included."""
        probs = self._finite.softmax(dim=-1, dtype=precision(self.raw))
        return probs.to(self._finite.dtype)

    @cached_property
    def raw(self) -> Tensor:
        """[B, L, V], the logits as the model made them."""
        return self.source() if callable(self.source) else self.source

    @cached_property
    def _finite(self) -> Tensor:
        wide = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
        return wide.nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a strategy wants. `apply` ignores whatever it has no right to.

    Attributes:
        tokens: [B, L] int64, proposed ids.
        promote: [B, L] bool, masked positions to decode.
        revise: [B, L] bool, decoded positions to overwrite; None: none.
        remask: [B, L] bool, decoded positions to mask again; None: none.
        soft: [B, L, k], what the next forward reads as blends at decoded positions; None: it reads
            token ids. A strategy gives it at every step or never.
        embeds: [B, L, D], what the next forward reads, for mixtures that `soft` cannot express.
        done: [B] bool, the block has converged; None: it has once no mask is left.
        confidence: [B, L] float32, probability of the proposed tokens, for events and traces.
    """

    tokens: Tensor
    promote: Tensor
    revise: Tensor | None = None
    remask: Tensor | None = None
    soft: Candidates | None = None
    embeds: Tensor | None = None
    done: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    """Blocks after a decision.

    Attributes:
        tokens: [B, L] int64.
        masked: [B, L] bool.
        written: [B, L] bool, positions that took a token, be it the one they had.
        done: [B] bool, the block is finished.
        forced: [B] bool, the strategy promoted nothing, so the leftmost mask was decoded.
        capped: [B] bool, the cap on steps closed the block before it had converged.
        invalid: [B] bool, the strategy proposed MASK for a position it wrote.
    """

    tokens: Tensor
    masked: Tensor
    written: Tensor
    done: Tensor
    forced: Tensor
    capped: Tensor
    invalid: Tensor


def predict(view: View, output: Output, top_k: int = 1) -> Candidates:
    """The token of every position and its probability, followed by the next best tokens.

    Greedy rows take the most probable token; ties go to the lowest id. With a temperature T > 0
    the token is a sample of softmax(logits / T). Its confidence is that of softmax(logits) at every
    temperature (see `dmax.confidence`).

    Args:
        view: the blocks.
        output: the model's output for them.
        top_k: distinct tokens wanted, at most V - 1 are given.

    Returns:
        [B, L, k] candidates, the chosen token first.
    """
    return output.top(top_k, view.noise)


def leftmost(positions: Tensor) -> Tensor:
    """The first True of each row of [B, L] bool, and nothing else; rows without one stay empty."""
    return positions & (positions.cumsum(dim=1) == 1)


def apply(view: View, decision: Decision) -> Advance:
    """Carry out a decision under the rules of the engine.

    - Only active positions are written: masked ones by `promote`, decoded ones by `revise`.
    - A row with masks left that promotes none has its leftmost mask decoded, if it must progress.
    - `remask` holds only where the row still gains: fewer positions are masked than promoted.
    - At the cap on steps the remaining masks take the proposed tokens and the block closes.
    - A block is done only without masks, and at once if it never had any.
    - Writing MASK makes the row invalid.
    """
    promote = decision.promote & view.masked
    stuck = ~promote.any(dim=1)
    if view.must_progress is not None:
        stuck = stuck & view.must_progress
    forced = leftmost(view.masked) & stuck[:, None]
    promote = promote | forced

    last = view.step >= view.max_steps - 1
    undecided = view.masked & ~promote  # [B, L], masks that no decision was made about
    masked = undecided & ~last[:, None]
    writable = view.masked
    if decision.revise is not None:
        writable = writable | (view.active & decision.revise)
    write = writable & ~masked
    written = write
    tokens = torch.where(write, decision.tokens, view.tokens)

    if decision.remask is not None:
        remask = decision.remask & view.decoded
        gains = remask.sum(dim=1) < promote.sum(dim=1)
        remask = remask & (gains & ~last)[:, None]
        tokens = tokens.masked_fill(remask, view.mask_token_id)
        undecided = undecided | remask
        masked = masked | remask
        written = write & ~remask

    converged = ~undecided.any(dim=1)
    if decision.done is not None:
        converged = (converged & decision.done) | ~view.active.any(dim=1)
    return Advance(
        tokens=tokens,
        masked=masked,
        written=written,
        done=converged | last,
        forced=forced.any(dim=1),
        capped=last & ~converged,
        invalid=(write & (decision.tokens == view.mask_token_id)).any(dim=1),
    )
