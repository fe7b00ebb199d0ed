"""One step of one open block: what a strategy sees, what it may decide, and the rules no decision can break.

B sequences, L block positions, V vocabulary, k candidates. A strategy is a pure function of
tensors: it turns the logits of a forward into a `Decision`; `apply` turns the decision into the
block's next contents and enforces, once for every strategy, that blocks progress, end, stay free of
MASK and leave the prompt alone.

Of bools, `a > b` is `a & ~b` in one operation instead of two: at batch 1 their number counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dmax.blend import Embed, SoftTokens
from dmax.confidence import LARGEST, Candidates, candidates, precision, take_best
from dmax.params import DecodingParams

State = dict[str, Tensor]
"""A strategy's memory of a block; every tensor has a leading dimension B, so that the engine can regroup rows."""


@dataclass(frozen=True, slots=True)
class View:
    """What a strategy may read.

    Attributes:
        tokens: [B, L] int64, the mask id where undecided.
        masked: [B, L] bool, still undecided; a status, never inferred from ids.
        active: [B, L] bool, masked when the block was opened; the rest (the prompt's tail) is never
            written.
        step: [B] int64, forwards already spent on the block.
        mask_token_id: MASK.
        max_steps: cap on forwards for this block.
        embed: token ids to embeddings, for strategies that feed mixtures of their own.
        temperature: of sampling; 0 is greedy.
        gumbel: [B, L, V] standard Gumbel noise, given when temperature > 0.
        forced: [B] bool, the block must progress; None: all must. False for a block ahead of an
            unfinished one.
    """

    tokens: Tensor
    masked: Tensor
    active: Tensor
    step: Tensor
    mask_token_id: int
    max_steps: int
    embed: Embed | None = None
    temperature: float = 0.0
    gumbel: Tensor | None = None
    forced: Tensor | None = None


class Output:
    """One forward, computed as far as a strategy asks for it: most need the best tokens alone, no vocabulary.

    Args:
        logits: [B, L, V] of the model, any float dtype, never written to; or what computes them
            when they are wanted.
        mask_token_id: MASK.
        candidates: what gives the best tokens without logits (a fused head), if anything does.
        hidden_states: [B, L, D] of the last layer, where the engine provides them.
    """

    def __init__(
        self,
        logits: Tensor | Callable[[], Tensor],
        mask_token_id: int,
        *,
        candidates: Callable[[int], Candidates] | None = None,
        hidden_states: Tensor | None = None,
    ) -> None:
        self._raw = logits
        self._mask_token_id = mask_token_id
        self._candidates = candidates
        self.hidden_states = hidden_states
        self._best: dict[int, Candidates] = {}

    @classmethod
    def of(cls, logits: Tensor, probs: Tensor) -> Output:
        """Logits and probabilities [B, L, V] that a strategy has made of others, MASK's logits at -inf."""

        def best(k: int) -> Candidates:
            ids = take_best(logits.clone(), min(k, logits.shape[-1] - 1))[1]
            return Candidates(
                ids, probs.gather(-1, ids), torch.zeros_like(ids[..., 0], dtype=torch.bool)
            )

        made = cls(logits, 0, candidates=best)
        made.__dict__.update(logits=logits, probs=probs)
        return made

    def top(self, k: int) -> Candidates:
        """The k most probable tokens of every position, [B, L, k]; see `dmax.confidence`."""
        if k not in self._best:
            found = (
                self._candidates(k)
                if self._candidates
                else candidates(self._full, k, self._mask_token_id)
            )
            self._best[k] = found
        return self._best[k]

    @property
    def broken(self) -> Tensor:
        """[B] bool, the row's logits held a NaN."""
        known = next(iter(self._best.values()), None) or self.top(1)
        return known.broken.any(dim=1)

    @cached_property
    def _full(self) -> Tensor:
        return self._raw() if callable(self._raw) else self._raw

    @cached_property
    def logits(self) -> Tensor:
        """[B, L, V] float32, MASK's at -inf, the others finite."""
        wide = self._wide.clone()
        wide[..., self._mask_token_id] = float("-inf")
        return wide

    @cached_property
    def probs(self) -> Tensor:
        """[B, L, V] float32, softmax of the logits with MASK's own still in."""
        return self._wide.softmax(dim=-1, dtype=precision(self._full)).to(self._wide.dtype)

    @cached_property
    def _wide(self) -> Tensor:
        wide = self._full.to(torch.promote_types(self._full.dtype, torch.float32))
        return wide.nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST)

    def rows(self, index: Tensor) -> Output:
        """The rows `index` [B'] alone."""
        hidden = None if self.hidden_states is None else self.hidden_states[index]
        return Output(self._full[index], self._mask_token_id, hidden_states=hidden)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a strategy wants. `apply` ignores whatever it has no right to.

    Attributes:
        tokens: [B, L] int64, proposed ids.
        commit: [B, L] bool, masked positions to decode.
        edit: [B, L] bool, decoded positions to overwrite.
        remask: [B, L] bool, decoded positions to mask again.
        soft: how the next forward is fed; None: hard ids.
        embeds: [B, L, D], the next forward's inputs, for feeds that `soft` cannot express.
        done: [B] bool, the block has converged; None: it has once no mask is left.
        confidence: [B, L] float32, probability of the proposed tokens, for events and traces.
    """

    tokens: Tensor
    commit: Tensor
    edit: Tensor | None = None
    remask: Tensor | None = None
    soft: SoftTokens | None = None
    embeds: Tensor | None = None
    done: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """How many blocks of a sequence are open at once; a block sees those before it as they stand.

    Attributes:
        size: blocks open at most.
        opens_at: the next block opens once this share of the last open one is settled.
        forces_at: a block must progress once this share of the one before it is settled; until then
            it may wait.
        settled_at: confidence from which a decoded position counts as settled; 0: every decoded one
            does.
    """

    size: int = 1
    opens_at: float = 0.0
    forces_at: float = 0.0
    settled_at: float = 0.0


class DecodingStrategy(Protocol):
    """A decoding method. Instances hold settings only; memory lives in the state the engine keeps per request.

    Optional attributes: `extra_steps` raises the default cap on forwards above one per position,
    `window` (`Window`) keeps several blocks open, and `num_branches` evaluates that many versions
    of the block at once (`Branching`).
    """

    name: ClassVar[str]

    @classmethod
    def from_params(cls, params: DecodingParams) -> DecodingStrategy:
        """The strategy with these settings."""

    def open(self, view: View) -> State:
        """Fresh state for blocks that were just opened."""

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """Decide after a forward."""


class Branching(Protocol):
    """What a strategy with `num_branches` R > 1 also does: choose among R versions of a block, and make new ones."""

    num_branches: int

    def choose(self, view: View, output: Output) -> Tensor:
        """The best of each block's versions, [B] int64 in [0, R); `view` and `output` hold B x R rows."""

    def branch(self, masked: Tensor, output: Output) -> Tensor:
        """[B, R - 1, L] bool: what each further version decodes besides, out of `masked` [B, L]."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's best guess at every position.

    Attributes:
        tokens: [B, L] int64, the chosen token: argmax, or a sample when temperature > 0.
        confidence: [B, L] float32, its softmax probability.
        ids: [B, L, k] int64, the chosen token and the k - 1 most probable others.
        probs: [B, L, k] float32, their probabilities.
    """

    tokens: Tensor
    confidence: Tensor
    ids: Tensor
    probs: Tensor


@dataclass(frozen=True, slots=True)
class Advance:
    """A block after a decision.

    Attributes:
        tokens: [B, L] int64.
        masked: [B, L] bool.
        done: [B] bool, the block is finished.
        forced: [B] bool, the engine decoded a token because the strategy committed none.
        capped: [B] bool, the step cap closed the block before it had converged.
        invalid: [B] bool, the strategy proposed MASK for a position it wrote.
    """

    tokens: Tensor
    masked: Tensor
    done: Tensor
    forced: Tensor
    capped: Tensor
    invalid: Tensor


def predict(view: View, output: Output, top_k: int = 1) -> Prediction:
    """Tokens and confidences of a forward; ties go to the lowest id.

    With temperature T > 0 the token is a sample of softmax(logits / T), drawn as argmax(logits + T
    · Gumbel noise), which no small T overflows; the confidence is always that of softmax(logits),
    MASK included, so thresholds mean the same at every temperature. `top_k` counts distinct tokens
    other than MASK: at most V - 1 are given.
    """
    if view.temperature > 0 and view.gumbel is not None:
        ids = chosen = (output.logits + view.temperature * view.gumbel).argmax(dim=-1, keepdim=True)
        num_others = min(top_k, output.logits.shape[-1] - 1) - 1
        if num_others > 0:
            others = (
                output.logits.scatter(-1, chosen, float("-inf")).topk(num_others, dim=-1).indices
            )
            ids = torch.cat((chosen, others), dim=-1)
        probs = output.probs.gather(-1, ids)
    else:
        best = output.top(top_k)
        ids = best.ids
        probs = best.probs
    return Prediction(ids[..., 0], probs[..., 0], ids, probs)


def leftmost(positions: Tensor) -> Tensor:
    """The first True of each row of [B, L] bool, and nothing else; rows without one stay empty."""
    return positions & (positions.cumsum(dim=1) == 1)


def apply(view: View, decision: Decision, max_steps: int) -> Advance:
    """Carry out a decision under the rules of the engine (see the module's first lines).

    - only active positions are written: masks by `commit`, decoded ones by `edit`;
    - `remask` holds only where the row still gains: fewer positions masked again than committed;
    - a row with masks left that commits none has its leftmost mask decoded (`forced`), if it must
        progress;
    - at the step cap remaining masks take the proposed tokens and the block closes (`capped`);
    - a block is done only without masks, and at once if it never had any; writing MASK makes the
        row `invalid`.
    """
    commit = decision.commit & view.masked
    forced = leftmost(view.masked) > commit.any(dim=1, keepdim=True)
    if view.forced is not None:
        forced = forced & view.forced[:, None]
    commit = commit | forced
    last = view.step >= max_steps - 1
    left = view.masked > commit  # [B, L], masks that no decision was made about
    masked = left > last[:, None]
    writable = view.masked if decision.edit is None else view.active & (view.masked | decision.edit)
    write = writable > masked
    tokens = torch.where(write, decision.tokens, view.tokens)
    if decision.remask is not None:
        remask = decision.remask & (view.active > view.masked)
        gains = remask.sum(dim=1) < commit.sum(dim=1)
        remask = remask & (gains > last)[:, None]
        tokens = tokens.masked_fill(remask, view.mask_token_id)
        left = left | remask
        masked = masked | remask
    unfinished = left.any(dim=1)
    converged = (
        ~unfinished
        if decision.done is None
        else (decision.done > unfinished) | ~view.active.any(dim=1)
    )
    invalid = (write & (decision.tokens == view.mask_token_id)).any(dim=1)
    return Advance(tokens, masked, converged | last, forced.any(dim=1), last > converged, invalid)
