"""The only denoise loop: prefill, denoise the open blocks of all sequences together, commit, next block.

Strategies decide what to write; this file decides nothing about tokens. It keeps the promises: a sequence's blocks
converge on their own, whatever its neighbours do; the prompt is never written; a block ends after at most its step
cap; broken logits raise. B sequences of a step, n blocks of each that are open, L block length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dmax.decoding import get_strategy
from dmax.engine.lane import Flags, Lane
from dmax.engine.request import BlockEvent, Completion, Counters, Event, FinishedEvent, Request
from dmax.engine.runner import ModelRunner
from dmax.errors import InputError
from dmax.params import DecodingParams

Commit = Literal["cross_block", "separate"]


@dataclass(slots=True)
class Flight:
    """A request in flight: where its open blocks stand and what it has generated.

    Attributes:
        start, end: first position of the first open block, and first position past the last block there can be.
        places: rows of its lane, counted from the slot's first, that hold the open blocks in order; or, with a
            branching strategy, the versions of the one open block.
        num_pending: finished blocks before the open ones that still need their clean keys and values.
    """

    request: Request
    lane: Lane
    start: int
    end: int
    generator: torch.Generator | None
    generated: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    places: list[int] = field(default_factory=lambda: [0])
    num_pending: int = 0


class Engine:
    """Decodes requests with a block-diffusion model, several at a time, each exactly as it would be alone.

    Args:
        model: a block-causal model in eval mode (see `ModelRunner`).
        mask_token_id, eos_token_ids, block_length: from the checkpoint.
        max_batch_size: sequences in flight; waiting requests join as others leave.
        commit: how a finished block's clean keys and values are written: `cross_block`, by the next block's first
            forward over 2L positions, or `separate`, by a forward of their own.
    """

    def __init__(
        self,
        model: Any,
        *,
        mask_token_id: int,
        eos_token_ids: Sequence[int],
        block_length: int,
        max_batch_size: int = 16,
        commit: Commit = "cross_block",
    ) -> None:
        self.model, self.mask_token_id, self.eos_token_ids = model, mask_token_id, frozenset(eos_token_ids)
        self.block_length, self.max_batch_size, self.commit = block_length, max_batch_size, commit

    def run(self, requests: Sequence[Request], *, provisional: bool = False) -> Iterator[Event]:
        """Decode the requests; events of different requests interleave.

        Args:
            requests: any lengths, any mixture of parameters (the block length is the engine's).
            provisional: also report every step of every open block, at the price of copying it from the device.

        Raises:
            InputError: a request that can never fit (before any compute), or logits that are NaN.
        """
        self.check(requests)
        if not requests:
            return
        num_slots = min(self.max_batch_size, len(requests))
        capacity = max(self._end(request) + self._scratch(request) for request in requests)
        runner = ModelRunner(self.model, self.block_length, num_slots, capacity)
        waiting, free, running, lanes = (
            deque(requests),
            list(range(num_slots)),
            dict[int, Flight](),
            dict[Any, Lane](),
        )
        while waiting or running:
            if waiting and free:
                admitted = {free.pop(0): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
                running |= self._admit(runner, lanes, num_slots, admitted)
            for slot, flags in self._step(runner, running).items():
                yield from self._settle(runner, running[slot], slot, flags, provisional)
                if running[slot].start >= running[slot].end:
                    del running[slot]
                    free.append(slot)

    def check(self, requests: Sequence[Request]) -> None:
        """Raises `InputError` for a request that can never fit."""
        for request in requests:
            self._check(request)

    def _check(self, request: Request) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        vocab_size = self.model.config.vocab_size
        if not request.prompt_ids:
            raise InputError(f"prompt {request.index} is empty", hint="give at least one token")
        if not all(0 <= token < vocab_size for token in request.prompt_ids):
            raise InputError(f"prompt {request.index} holds a token id outside the vocabulary of {vocab_size}")
        if limit is not None and self._end(request) > limit:
            raise InputError(
                f"prompt {request.index} has {len(request.prompt_ids)} tokens; with `max_new_tokens` "
                f"{request.params.max_new_tokens} it needs {self._end(request)} positions, the model has {limit}",
                hint="shorten the prompt or lower `max_new_tokens`",
            )

    def _end(self, request: Request) -> int:
        """First position past the last block: blocks are aligned to absolute multiples of the block length."""
        needed = len(request.prompt_ids) + request.params.max_new_tokens
        return -(-needed // self.block_length) * self.block_length

    def _scratch(self, request: Request) -> int:
        """Positions that further versions of the open block take in the cache."""
        return (getattr(get_strategy(request.params), "num_branches", 1) - 1) * self.block_length

    def _admit(
        self, runner: ModelRunner, lanes: dict[DecodingParams, Lane], num_slots: int, admitted: dict[int, Request]
    ) -> dict[int, Flight]:
        """Prefill the whole blocks of the prompts in one forward and open each request's first block."""
        joined = {}
        for slot, request in admitted.items():
            key = replace(request.params, seed=None, max_new_tokens=1)
            if key not in lanes:
                lanes[key] = Lane(key, num_slots, self.block_length, runner.device, tuple(self.eos_token_ids))
            start = len(request.prompt_ids) // self.block_length * self.block_length
            joined[slot] = Flight(request, lanes[key], start, self._end(request), _generator(request.params))
            first_row = slot * lanes[key].width
            lanes[key].open(first_row, request.prompt_ids[start:], self.mask_token_id, runner.embed)
            runner.cache.rollback(slot)
        slots = [slot for slot, flight in joined.items() if flight.start]
        if slots:
            lengths = [joined[slot].start for slot in slots]
            tokens = torch.zeros(len(slots), max(lengths), dtype=torch.long)
            for row, slot in enumerate(slots):
                tokens[row, : lengths[row]] = torch.tensor(joined[slot].request.prompt_ids[: lengths[row]])
                joined[slot].counters.num_prefill_forwards += 1
            runner.prefill(slots, tokens.to(runner.device), lengths)
        return joined

    @torch.no_grad()
    def _step(self, runner: ModelRunner, running: dict[int, Flight]) -> dict[int, list[Flags]]:
        """One forward and one decision for every open block; the only wait for the device is for the flags."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for slot, flight in sorted(running.items()):
            groups.setdefault((id(flight.lane), flight.num_pending, len(flight.places)), []).append(slot)
        found = [self._step_group(runner, slots, [running[slot] for slot in slots]) for slots in groups.values()]
        read = iter(torch.cat([flags.flatten(1) for flags in found], dim=1).T.tolist())
        return {
            slot: [Flags(*next(read)) for _ in range(flags.shape[2])]
            for slots, flags in zip(groups.values(), found, strict=True)
            for slot in slots
        }

    def _step_group(self, runner: ModelRunner, slots: list[int], flights: list[Flight]) -> Tensor:
        """The step of sequences that have the same lane, n open blocks and k pending ones; `Flags` [6, B, n]."""
        lane, num_pending, num_open = flights[0].lane, flights[0].num_pending, len(flights[0].places)
        starts = torch.tensor(slots, device=runner.device) * lane.width
        rows = starts[:, None] + torch.tensor([flight.places for flight in flights], device=runner.device)  # [B, n]
        inputs = lane.inputs(rows, self.mask_token_id, runner.embed)
        previous = lane.previous[slots, :num_pending].flatten(1) if num_pending else None  # [B, k L]
        if previous is not None and self.commit == "separate":
            runner.commit(slots, previous)
            previous = None
        versions = num_open if lane.num_branches > 1 else 1
        logits = runner.denoise(slots, inputs, previous, versions)  # [B, n L, V]
        logits = logits.view(rows.numel(), self.block_length, -1)
        gumbel = _gumbel(flights, num_open, logits)
        flags = lane.advance(rows, lane.view(rows, self.mask_token_id, runner.embed, gumbel), logits)
        for flight in flights:
            flight.counters.num_forwards += 1
            flight.counters.num_commit_forwards += bool(num_pending) and self.commit == "separate"
            flight.counters.num_positions += (num_pending + num_open) * self.block_length
            flight.num_pending = 0
        return flags

    def _settle(
        self, runner: ModelRunner, flight: Flight, slot: int, flags: list[Flags], provisional: bool
    ) -> Iterator[Event]:
        """After a step: report the open blocks, close those that are done from the first on, and open the next."""
        lane, request, counters = flight.lane, flight.request, flight.counters
        if any(block.broken for block in flags):
            raise InputError(
                f"the model gave NaN logits for prompt {request.index}",
                hint="check the checkpoint, or load it with dtype float32",
            )
        if any(block.invalid for block in flags):
            raise InputError(f"strategy `{request.params.strategy}` proposed the mask token for prompt {request.index}")
        counters.num_forced += sum(block.forced for block in flags)
        blocks = [slot * lane.width + place for place in flight.places[: len(flags)]]
        num_done = next((index for index, block in enumerate(flags) if not block.done), len(flags))
        for row, block in zip(blocks[:num_done], flags, strict=False):
            event = self._block_event(flight, row, flight.start, "committed")
            yield event
            counters.num_capped += block.capped
            flight.generated += event.token_ids
            flight.start += self.block_length
            if self.eos_token_ids.intersection(event.token_ids) or flight.start >= flight.end:
                flight.start = flight.end
                yield FinishedEvent(request.index, self._complete(flight))
                return
            lane.previous[slot, flight.num_pending] = lane.tokens[row]
            flight.num_pending += 1
        if provisional:
            for ahead, row in enumerate(blocks[num_done:]):
                yield self._block_event(flight, row, flight.start + ahead * self.block_length, "provisional")
        if lane.num_branches > 1 and not num_done:
            flight.places = list(range(lane.num_branches))
            return
        flight.places = flight.places[num_done : len(flags)]
        ahead = flight.start + len(flight.places) * self.block_length
        if not flight.places or (flags[-1].opens and len(flight.places) < lane.width and ahead < flight.end):
            place = next(place for place in range(lane.width) if place not in flight.places)
            flight.places.append(place)
            lane.open(slot * lane.width + place, (), self.mask_token_id, runner.embed)

    def _block_event(
        self, flight: Flight, row: int, start: int, kind: Literal["provisional", "committed"]
    ) -> BlockEvent:
        lane, num_prompt = flight.lane, len(flight.request.prompt_ids)
        first = max(num_prompt - start, 0)
        return BlockEvent(
            index=flight.request.index,
            kind=kind,
            position=start + first - num_prompt,
            token_ids=tuple(lane.tokens[row, first:].tolist()),
            masked=tuple(lane.masked[row, first:].tolist()),
            confidence=tuple(lane.confidence[row, first:].tolist()),
            step=int(lane.step[row]),
        )

    def _complete(self, flight: Flight) -> Completion:
        """Cut at the first EOS, EOS left out (A14), then at `max_new_tokens`."""
        ids = flight.generated
        stop = next((position for position, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
        limit = flight.request.params.max_new_tokens
        reason: Literal["stop", "length"] = "stop" if stop < len(ids) and stop <= limit else "length"
        return Completion(tuple(ids[: min(stop, limit)]), reason, flight.counters)


def _generator(params: DecodingParams) -> torch.Generator | None:
    """A random source per request, so that a sampled completion does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def _gumbel(flights: Sequence[Flight], num_open: int, logits: Tensor) -> Tensor | None:
    """Standard Gumbel noise [B n, L, V], each row from its request's own generator; None when greedy."""
    if flights[0].generator is None:
        return None
    shape = (num_open, *logits.shape[1:])
    rows = [torch.empty(shape).exponential_(generator=flight.generator) for flight in flights]
    return -torch.cat(rows).log().to(logits.device)
