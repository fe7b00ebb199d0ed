"""A request in progress: where its blocks stand, what it has generated, and what that cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from dmax.engine.batch import Row
from dmax.engine.blocks import OpenBlocks
from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.outputs import Cost, FinishReason, GenerationOutput, StreamEvent


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
        rows: rows of `blocks` that hold its open blocks, in order.
        may_open: the last open block allows the next one to open.
        num_branches: branches of the open block that the next forward evaluates.
        pending: tokens of finished blocks whose keys and values the next forward writes. Before
            the first step these are blocks of the prompt.
        generated: token ids of the finished blocks, the prompt left out.
        num_forwards: denoising forwards so far.
        num_positions: that these had.
        cost: of the request so far, besides these two.
    """

    request: Request
    blocks: OpenBlocks
    slot: int
    start: int
    end: int
    eos_token_ids: Collection[int]
    rows: list[int] = field(default_factory=list)
    may_open: bool = False
    num_branches: int = 1
    pending: list[tuple[int, ...]] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    num_forwards: int = 0
    num_positions: int = 0
    cost: Cost = field(default_factory=Cost)

    # --- what the next forward reads (the columns of `Batch.where`) ---

    @property
    def first(self) -> int:
        """First position that the next forward writes."""
        return self.start - len(self.pending) * self.blocks.block_length

    def pending_rows(self) -> list[Row]:
        """Rows of the pending blocks."""
        starts = range(self.first, self.start, self.blocks.block_length)
        return [(self.slot, start, start, -1, -1) for start in starts]

    def open_rows(self) -> list[Row]:
        """Rows of the open blocks and their branches."""
        length = self.blocks.block_length
        base = self.start
        before = -1
        found: list[Row] = []
        for row in self.rows:
            for branch in range(self.num_branches):
                found.append((self.slot, base + branch * length, base, row, before))
            base += length
            before = row
        return found

    def count_forward(self) -> None:
        """Count the forward over these rows, after which nothing is pending any more.

        Positions of the prompt are not counted.
        """
        num_blocks = len(self.rows) * self.num_branches
        if self.num_forwards:
            num_blocks += len(self.pending)
        elif self.pending:
            self.cost += Cost(num_prefill_forwards=1)
        self.num_forwards += 1
        self.num_positions += num_blocks * self.blocks.block_length
        self.pending = []

    # --- what becomes of it after the forward ---

    def report(self, flags: list[list[bool]], records: NDArray[Any]) -> Iterator[StreamEvent]:
        """Report the open blocks, close those that are done.

        Args:
            flags: of all rows of `blocks`, six for each, see `dmax.engine.step.decide`.
            records: of all rows of `blocks`, see `dmax.engine.blocks.read`.

        Returns:
            Events; the last one is "finished" if the request is over.

        Raises:
            InputError: the logits held a NaN, or the strategy proposed MASK.
        """
        own = [flags[row] for row in self.rows]
        strategy = self.request.strategy
        if not (any(map(any, own)) or self.request.provisional):  # as most steps leave it
            self.num_branches = strategy.num_branches
            self.may_open = False
            return
        done, forced, capped, invalid, broken, may_open_next = zip(*own, strict=True)
        if any(broken):
            raise InputError(
                f"the model gave NaN logits for prompt {self.request.number}",
                hint="check the checkpoint, or load it with dtype float32",
            )
        if any(invalid):
            raise InputError(
                f"strategy `{strategy.name}` proposed the mask token for prompt "
                f"{self.request.number}"
            )
        if any(forced):
            self.cost += Cost(num_forced=sum(forced))
        self.num_branches = 1 if done[0] else strategy.num_branches
        for is_done, is_forced, is_capped in zip(done, forced, capped, strict=True):
            if not is_done:
                break
            if is_capped:
                self.cost += Cost(num_capped=1)
            yield self._close(records, is_forced, is_capped)
            if self.start >= self.end or self._stop() is not None:
                yield self.finish()
                return
        if self.request.provisional:
            for row, is_forced in zip(self.rows, forced[-len(self.rows) :], strict=False):
                yield self._event("provisional", records, row, is_forced)
        self.may_open = may_open_next[-1]

    def takes_row(self) -> bool:
        """Take a row for the next block if none is open, or if the last one allows for it."""
        if self.rows and not (self.may_open and self._start_of_next() < self.end):
            return False
        free = [row for row in self.blocks.rows_of(self.slot) if row not in self.rows]
        self.rows.extend(free[:1])
        return bool(free)

    def known(self) -> tuple[int, ...]:
        """What is known of the last open block before its first step: the end of the prompt."""
        return self.request.prompt_ids[self._start_of_next() - self.blocks.block_length :]

    def _start_of_next(self) -> int:
        """First position after the open blocks."""
        return self.start + len(self.rows) * self.blocks.block_length

    def finish(self, early: FinishReason = "length") -> StreamEvent:
        """The completion: cut at the first EOS (A14 in docs/paper.md), stop text, or limit."""
        limit = self.request.params.max_new_tokens
        stop = self._stop()
        cost = self.cost + Cost(self.num_forwards, num_positions=self.num_positions)
        if stop is None or stop > limit:
            return finished(self.request, self.generated[:limit], early, cost)
        return finished(self.request, self.generated[:stop], "stop", cost)

    def _stop(self) -> int | None:
        """How many tokens stand before the first EOS, or end in a stop text; None without them."""
        ids = self.generated
        start = max(len(ids) - self.blocks.block_length, 0)  # no block before the last one ended it
        last = enumerate(ids[start:], start)
        stop = next((at for at, token in last if token in self.eos_token_ids), None)
        if self.request.find_stop is None:
            return stop
        found = self.request.find_stop(ids[:stop])
        return stop if found is None else found

    def _close(self, records: NDArray[Any], forced: bool, capped: bool) -> StreamEvent:
        """Turn the first open block into a finished one."""
        event = self._event("committed", records, self.rows[0], forced, capped)
        self.rows.pop(0)
        known = self.request.prompt_ids[self.start :]  # the end of the prompt, in its first block
        self.pending.append((*known, *event.token_ids))
        self.generated += event.token_ids
        self.start += self.blocks.block_length
        return event

    def _event(
        self,
        kind: Literal["provisional", "committed"],
        records: NDArray[Any],
        row: int,
        forced: bool,
        capped: bool = False,
    ) -> StreamEvent:
        """The open block in `row` as it stands."""
        start = self.start + self.rows.index(row) * self.blocks.block_length
        num_prompt = len(self.request.prompt_ids)
        first = max(num_prompt - start, 0)

        def generated(name: str) -> tuple[Any, ...]:
            return tuple(records[name][row, first:].tolist())

        return StreamEvent(
            kind=kind,
            text="",
            token_ids=generated("tokens"),
            masked=generated("masked"),
            confidence=generated("confidence"),
            position=start + first - num_prompt,
            step=records["step"][row].item(),
            num_forwards=self.num_forwards,
            written=generated("written"),
            candidates=tuple(_candidates(records[row])[first:]),
            forced=forced,
            capped=capped,
            index=self.request.index,
        )


def _candidates(record: Any) -> list[tuple[tuple[int, float], ...]]:
    """What the next input of each position blends, if that is more than one token."""
    if "ids" not in record.dtype.names:
        return []
    positions = zip(record["ids"].tolist(), record["probs"].tolist(), strict=True)
    return [tuple(zip(*each, strict=True)) for each in positions]


def open_last(sequences: list[Sequence]) -> None:
    """Open the last blocks of sequences that are decoded alike."""
    rows = torch.tensor([each.rows[-1] for each in sequences])
    sequences[0].blocks.open_all(rows, [each.known() for each in sequences])


def finished(
    request: Request, token_ids: Iterable[int], reason: FinishReason, cost: Cost
) -> StreamEvent:
    """The last event of a request that has a result."""
    ids = tuple(token_ids)
    output = GenerationOutput("", ids, request.prompt_ids, reason, cost)
    return StreamEvent("finished", "", ids, output=output, index=request.index)
