"""A request in flight: where it stands, what it has generated, and the noise that is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dmax.engine.lane import Lane
from dmax.engine.request import BlockEvent, Completion, Counters, FinishReason, Request
from dmax.engine.rows import Row
from dmax.params import DecodingParams


@dataclass(slots=True)
class Flight:
    """A request in flight: where its open blocks stand and what it has generated.

    Attributes:
        slot: its place in cache and lane.
        start, end: first position of the first open block, and first position past the last block
            there can be.
        places: rows of its lane, counted from the slot's first, that hold the open blocks in order;
            or, with a branching strategy, the versions of the one open block.
        pending: tokens of the blocks before the open ones that still need their clean keys and
            values.
        num_prompt: how many of these are blocks of the prompt.
    """

    request: Request
    lane: Lane
    slot: int
    start: int
    end: int
    generator: torch.Generator | None
    generated: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    places: list[int] = field(default_factory=lambda: [0])
    pending: list[tuple[int, ...]] = field(default_factory=list)
    num_prompt: int = 0

    def pending_rows(self, committed: Sequence[int]) -> list[Row]:
        """The settled blocks that are to be written, given the committed positions of all slots."""
        length = self.lane.tokens.shape[1]
        starts = [committed[self.slot] + index * length for index in range(len(self.pending))]
        return [Row(self.slot, start, start) for start in starts]

    def open_rows(self, committed: Sequence[int], versions: int) -> list[Row]:
        """The open blocks, or with several `versions` those of the one that is open."""
        length = self.lane.tokens.shape[1]
        first = self.slot * self.lane.width
        base = committed[self.slot] + len(self.pending) * length
        rows = [first + place for place in self.places]
        starts = [base + index * length for index in range(len(rows))]
        if versions > 1:
            return [
                Row(self.slot, start, base, row) for start, row in zip(starts, rows, strict=True)
            ]
        before = [-1, *rows[:-1]]
        return [
            Row(self.slot, start, start, row, b)
            for start, row, b in zip(starts, rows, before, strict=True)
        ]

    def event(self, row: int, start: int, kind: Literal["provisional", "committed"]) -> BlockEvent:
        """The block in `row` of the lane, which begins at position `start`, as it stands."""
        lane = self.lane
        num_prompt = len(self.request.prompt_ids)
        first = max(num_prompt - start, 0)
        return BlockEvent(
            index=self.request.index,
            kind=kind,
            position=start + first - num_prompt,
            token_ids=tuple(lane.tokens[row, first:].tolist()),
            masked=tuple(lane.masked[row, first:].tolist()),
            confidence=tuple(lane.confidence[row, first:].tolist()),
            step=int(lane.step[row]),
        )

    def has_ended(self, token_ids: Sequence[int], eos_token_ids: frozenset[int]) -> bool:
        """Whether nothing comes after the last block, these `token_ids`."""
        find_stop = self.request.find_stop
        if self.start >= self.end or (
            not self.request.params.ignore_eos and eos_token_ids.intersection(token_ids)
        ):
            return True
        return find_stop is not None and find_stop(self.generated) is not None

    def complete(self, eos_token_ids: frozenset[int], early: FinishReason = "length") -> Completion:
        """What was generated: cut at the first EOS, EOS left out (A14), behind a stop text, then at the limit."""
        ids = self.generated
        params = self.request.params
        find_stop = self.request.find_stop
        ends = frozenset[int]() if params.ignore_eos else eos_token_ids
        stop = next((position for position, token in enumerate(ids) if token in ends), None)
        if find_stop is not None and (found := find_stop(ids[:stop])) is not None:
            stop = found
        if stop is not None and stop <= params.max_new_tokens:
            return Completion(tuple(ids[:stop]), "stop", self.counters)
        return Completion(tuple(ids[: params.max_new_tokens]), early, self.counters)


def own_generator(params: DecodingParams) -> torch.Generator | None:
    """A random source per request, so that a sampled completion does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def gumbel_noise(
    flights: Sequence[Flight], block_length: int, vocab_size: int, device: torch.device
) -> Tensor | None:
    """Standard Gumbel noise [R, L, V] for all open blocks, each from its request's own generator; None when greedy."""
    if flights[0].generator is None:
        return None
    shapes = [(len(flight.places), block_length, vocab_size) for flight in flights]
    rows = [
        torch.empty(s).exponential_(generator=f.generator)
        for s, f in zip(shapes, flights, strict=True)
    ]
    return -torch.cat(rows).log().to(device)
