"""A request in progress: where its blocks stand, what it has generated, and what that cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dmax.engine.batch import Row
from dmax.engine.blocks import OpenBlocks
from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.outputs import Cost, FinishReason, GenerationOutput, StreamEvent
from dmax.params import DecodingParams


@dataclass(slots=True)
class Sequence:
    """A request in progress.

    Attributes:
        request: what was asked for.
        blocks: the tensors that hold its open blocks.
        slot: its place in the cache and in `blocks`.
        start: first position of its first open block.
        end: first position after the last block there can be.
        eos_token_ids: what ends it; none if the request ignores them.
        generator: its own random source; None decodes greedily.
        rows: rows of `blocks` that hold its open blocks, in order.
        num_branches: branches of the open block that the next forward evaluates.
        pending: tokens of finished blocks whose keys and values the next forward writes.
        num_prompt_blocks: how many of these are blocks of the prompt.
        generated: token ids of the finished blocks, the prompt left out.
        cost: of the request so far.
    """

    request: Request
    blocks: OpenBlocks
    slot: int
    start: int
    end: int
    eos_token_ids: frozenset[int]
    generator: torch.Generator | None
    rows: list[int]
    num_branches: int = 1
    pending: list[tuple[int, ...]] = field(default_factory=list)
    num_prompt_blocks: int = 0
    generated: list[int] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    # --- what the next forward reads (the columns of `Batch.where`) ---

    def pending_rows(self, length: int) -> list[Row]:
        """Rows for the pending blocks, given how many positions the cache holds."""
        size = self.blocks.block_length
        starts = [length + index * size for index in range(len(self.pending))]
        return [(self.slot, start, start, -1, -1) for start in starts]

    def open_rows(self, length: int) -> list[Row]:
        """Rows for the open blocks and their branches, given what the cache holds."""
        size = self.blocks.block_length
        first = length + len(self.pending) * size
        before = [-1, *self.rows]
        return [
            (self.slot, base + branch * size, base, row, before[index])
            for index, row in enumerate(self.rows)
            for base in [first + index * size]
            for branch in range(self.num_branches)
        ]

    def count_forward(self) -> None:
        """Count the forward over these rows, after which nothing is pending any more.

        Positions of the prompt are not counted.
        """
        num_finished = len(self.pending) - self.num_prompt_blocks
        num_blocks = num_finished + len(self.rows) * self.num_branches
        self.cost += Cost(
            num_forwards=1,
            num_prefill_forwards=int(self.num_prompt_blocks > 0),
            num_positions=num_blocks * self.blocks.block_length,
        )
        self.pending = []
        self.num_prompt_blocks = 0

    # --- what becomes of it after the forward ---

    def settle(self, flags: list[list[bool]], provisional: bool) -> list[StreamEvent]:
        """Report the open blocks, close those that are done, open the next one.

        Args:
            flags: six lists with a value for each open block, see `dmax.engine.step.decide`.
            provisional: also report the blocks that stay open.

        Returns:
            Events; the last one is "finished" if the request is over.

        Raises:
            InputError: the logits held a NaN, or the strategy proposed MASK.
        """
        done, forced, capped, invalid, broken, may_open_next = flags
        if any(broken):
            raise InputError(
                f"the model gave NaN logits for prompt {self.request.index}",
                hint="check the checkpoint, or load it with dtype float32",
            )
        if any(invalid):
            name = self.request.strategy.name
            raise InputError(
                f"strategy `{name}` proposed the mask token for prompt {self.request.index}"
            )
        self.cost += Cost(num_forced=sum(forced))
        num_done = done.index(False) if False in done else len(done)
        events = []
        for row, is_capped in zip(self.rows[:num_done], capped, strict=False):
            event = self._event("committed", row, self.start)
            events.append(event)
            self._close(event.token_ids)
            self.cost += Cost(num_capped=int(is_capped))
            if self._has_ended(event.token_ids):
                return [*events, self.finish()]
        self.rows = self.rows[num_done:]
        if provisional:
            size = self.blocks.block_length
            starts = range(self.start, self.start + len(self.rows) * size, size)
            open_blocks = zip(self.rows, starts, strict=True)
            events += [self._event("provisional", row, start) for row, start in open_blocks]
        self._open_next(may_open_next[-1])
        self.num_branches = 1 if num_done else self.request.strategy.num_branches
        return events

    def finish(self, early: FinishReason = "length") -> StreamEvent:
        """The completion: cut at the first EOS (A14 in docs/paper.md), stop text, or limit."""
        params = self.request.params
        ids = self.generated
        stop = next((at for at, token in enumerate(ids) if token in self.eos_token_ids), None)
        if self.request.find_stop is not None:
            found = self.request.find_stop(ids[:stop])
            stop = stop if found is None else found
        is_whole = stop is not None and stop <= params.max_new_tokens
        kept = ids[: stop if is_whole else params.max_new_tokens]
        return finished(self.request, kept, "stop" if is_whole else early, self.cost)

    def _close(self, token_ids: tuple[int, ...]) -> None:
        """Turn the first open block, with these new tokens, into a finished one."""
        known = self.request.prompt_ids[self.start :]  # the end of the prompt, in its first block
        self.pending.append((*known, *token_ids))
        self.generated += token_ids
        self.start += self.blocks.block_length

    def _open_next(self, may_open: bool) -> None:
        """Open the next block if none is open, or if the last one allows for it."""
        next_start = self.start + len(self.rows) * self.blocks.block_length
        free = [row for row in self.blocks.rows_of(self.slot) if row not in self.rows]
        if not self.rows or (may_open and free and next_start < self.end):
            self.blocks.open(free[0])
            self.rows.append(free[0])

    def _has_ended(self, token_ids: Iterable[int]) -> bool:
        """Whether nothing comes after the last block, these `token_ids`."""
        if self.start >= self.end or self.eos_token_ids.intersection(token_ids):
            return True
        find_stop = self.request.find_stop
        return find_stop is not None and find_stop(self.generated) is not None

    def _event(
        self, kind: Literal["provisional", "committed"], row: int, start: int
    ) -> StreamEvent:
        """The open block in `row`, which begins at position `start`, as it stands."""
        num_prompt = len(self.request.prompt_ids)
        first = max(num_prompt - start, 0)
        return StreamEvent(
            kind=kind,
            text="",
            token_ids=tuple(self.blocks.tokens[row, first:].tolist()),
            masked=tuple(self.blocks.masked[row, first:].tolist()),
            confidence=tuple(self.blocks.confidence[row, first:].tolist()),
            position=start + first - num_prompt,
            step=int(self.blocks.step[row]),
            index=self.request.index,
        )


def finished(
    request: Request, token_ids: Iterable[int], reason: FinishReason, cost: Cost
) -> StreamEvent:
    """The last event of a request that has a result."""
    ids = tuple(token_ids)
    output = GenerationOutput("", ids, request.prompt_ids, reason, cost)
    return StreamEvent("finished", "", ids, output=output, index=request.index)


def failed(request: Request, error: InputError) -> StreamEvent:
    """The last event of a request that has none."""
    return StreamEvent("finished", "", (), index=request.index, error=error)


def own_generator(params: DecodingParams) -> torch.Generator | None:
    """A random source per request: a sampled completion does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def gumbel_noise(sequences: list[Sequence], vocab_size: int, device: torch.device) -> Tensor | None:
    """Gumbel noise times the temperature for all open blocks; None if all decode greedily.

    Returns:
        [B, L, V] float32, from each request's own generator, 0 for greedy ones.
    """
    if all(sequence.generator is None for sequence in sequences):
        return None
    noise = []
    for sequence in sequences:
        shape = (len(sequence.rows), sequence.blocks.block_length, vocab_size)
        if sequence.generator is None:
            noise.append(torch.zeros(shape))
        else:
            exponential = torch.empty(shape).exponential_(generator=sequence.generator)
            noise.append(sequence.request.params.temperature * -exponential.log())
    return torch.cat(noise).to(device)
