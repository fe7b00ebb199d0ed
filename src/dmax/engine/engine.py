"""The only denoise loop: prefill, denoise the open blocks of all sequences together, commit, next block.

Strategies decide what to write; this file decides nothing about tokens. It keeps the promises: a
sequence's blocks converge on their own, whatever its neighbours do; the prompt is never written; a
block ends after at most its step cap; broken logits raise. B sequences of a step, n blocks of each
that are open, L block length, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dmax.engine.flight import Flight, gumbel_noise, own_generator
from dmax.engine.graphs import GraphedSteps
from dmax.engine.lane import Flags, Lane
from dmax.engine.limits import Limits
from dmax.engine.prefix import PrefixCache
from dmax.engine.request import Completion, Counters, Event, FinishedEvent, Request
from dmax.engine.rows import Rows, Shape
from dmax.engine.runner import ModelRunner
from dmax.engine.scheduler import Scheduler
from dmax.errors import InputError
from dmax.params import DecodingParams

Commit = Literal["cross_block", "separate"]

RIDING_BLOCKS = 4
"""Prompts of at most so many blocks go along with their first step. Every block of a forward reads its sequence's keys
and values for itself, so that a forward of their own is cheaper for longer ones."""


class Engine:
    """Decodes requests with a block-diffusion model, several at a time, each exactly as it would be alone.

    `run` decodes a list of requests; a server calls `add` and `cancel` at any time and `step` as
    long as it `is_busy`.

    Args:
        model: a block-causal model in eval mode (see `ModelRunner`).
        mask_token_id, eos_token_ids, block_length: from the checkpoint.
        max_batch_size: sequences in flight; waiting requests join as others leave.
        max_length: positions a sequence may take; with it the memory of keys and values is planned
            once, at the start, for `max_batch_size` sequences. None: `run` plans for the requests
            it is given.
        prefill_tokens: prompt tokens encoded between two denoising steps, so that running sequences
            wait for no prompt for long.
        prefix_cache: blocks of prompts that are encoded once for all requests that begin alike;
            None: no sharing.
        commit: how a finished block's clean keys and values are written: `cross_block`, by the next
            block's first forward over 2L positions, or `separate`, by a forward of their own.
        cuda_graphs: whether denoising steps are captured; None: on a CUDA device.
        compile_model: whether denoising forwards are compiled (see `ModelRunner`).
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        model: Any,
        *,
        mask_token_id: int,
        eos_token_ids: Sequence[int],
        block_length: int,
        max_batch_size: int = 16,
        max_length: int | None = None,
        prefill_tokens: int = 512,
        prefix_cache: PrefixCache | None = None,
        commit: Commit = "cross_block",
        cuda_graphs: bool | None = None,
        compile_model: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        self.block_length = block_length
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self.prefill_tokens = max(prefill_tokens // block_length, 1) * block_length
        self.prefix_cache = prefix_cache
        self.commit = commit
        self.cuda_graphs = cuda_graphs
        self.clock = clock
        self.compile_model = compile_model
        self._flights: dict[int, Flight] = {}  # by slot
        self._lanes: dict[DecodingParams, Lane] = {}
        self._scheduler = self._schedule(0)
        self._planned: ModelRunner | None = None
        self._graphs: GraphedSteps | None = None
        self._held: list[Event] = []  # of a round that raised, for the next one
        self._errors: list[InputError] = []  # of the same round, one for each further request
        context = getattr(model.config, "max_position_embeddings", None)
        vocab_size = model.config.vocab_size
        self._limits = Limits(block_length, vocab_size, context, max_length)
        if max_length is not None:
            self._plan(max_batch_size, self._limits.blocks(max_length))

    # --- what a server calls ----------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: one that can never fit.
        """
        self._limits.check(request)
        self._plan(self.max_batch_size, self._limits.needs(request))
        self._scheduler.add(request)

    def cancel(self, index: int) -> bool:
        """Have a request end at the next step, its slot freed; False if there is no such request (any more)."""
        return self._scheduler.cancel(index)

    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._flights or self._scheduler.waiting or self._held or self._errors)

    @torch.inference_mode()
    def step(self, *, provisional: bool = False) -> list[Event]:
        """One round: end what must end, admit, encode a bounded number of prompt tokens, denoise every open block.

        Args:
            provisional: also report every open block, at the price of copying it from the device.

        Raises:
            InputError: the logits of a request are NaN. The request is gone, the others can go on;
                what happened to them in this round comes with the next, or is raised by it.
        """
        if self._errors:
            raise self._errors.pop(0)
        events = [*self._held, *self._end_early()]
        self._held = []
        self._admit()
        self._prefill()
        ready = {
            slot: f
            for slot, f in sorted(self._flights.items())
            if slot not in self._scheduler.unfilled
        }
        for slot, flags in self._denoise(ready).items():
            try:
                events += self._settle(ready[slot], flags, provisional)
            except InputError as error:
                self._errors.append(error)
        if self._errors:
            self._held = events
            raise self._errors.pop(0)
        return events

    def run(self, requests: Sequence[Request], *, provisional: bool = False) -> Iterator[Event]:
        """Decode the requests; events of different requests interleave.

        Args:
            requests: any lengths, any mixture of parameters (the block length is the engine's).
            provisional: as in `step`.

        Raises:
            InputError: a request that can never fit (before any compute), or logits that are NaN.
            ValueError: other requests are in flight.
        """
        if self.is_busy():
            raise ValueError("the engine is busy; `add` the requests instead")
        self.check(requests)
        if not requests:
            return
        if self.max_length is None:
            self._plan(
                min(self.max_batch_size, len(requests)), max(map(self._limits.needs, requests))
            )
        for request in requests:
            self._scheduler.add(request)
        try:
            while self.is_busy():
                yield from self.step(provisional=provisional)
        finally:  # the caller may have had enough
            for slot in list(self._flights):
                self._release(slot)
            for request in self._scheduler.waiting:
                self._scheduler.forget(request)
            self._scheduler.waiting.clear()
            self._held.clear()
            self._errors.clear()

    def check(self, requests: Sequence[Request]) -> None:
        """Raises `InputError` for a request that can never fit."""
        for request in requests:
            self._limits.check(request)

    # --- memory -----------------------------------------------------------------------------------

    def _plan(self, num_slots: int, capacity: int) -> None:
        """Reserve keys and values for so many sequences of so many positions, unless that much is there.

        Raises:
            InputError: it is not there, and requests in flight hold what there is.
        """
        if self._planned is not None:
            has_slots = self._scheduler.num_slots
            has_capacity = self._planned.cache.capacity
            if has_capacity >= capacity and has_slots >= num_slots:
                return
            if self.is_busy():
                raise InputError(
                    f"a request needs {capacity} positions, the engine has {has_capacity} while others are running",
                    hint="give the engine a `max_length`",
                )
            capacity = max(capacity, has_capacity)
            num_slots = max(num_slots, has_slots)
        embeddings = self.model.get_input_embeddings().weight
        graphs = embeddings.is_cuda if self.cuda_graphs is None else self.cuda_graphs
        rows = num_slots + graphs  # the last one fills up batches
        self._planned = ModelRunner(
            self.model,
            self.block_length,
            rows,
            capacity,
            self.mask_token_id,
            compiled=self.compile_model,
        )
        self._graphs = GraphedSteps(num_slots, capacity) if graphs else None
        self._scheduler = self._schedule(num_slots)
        self._lanes.clear()

    def _schedule(self, num_slots: int) -> Scheduler:
        return Scheduler(
            num_slots, self.prefill_tokens, RIDING_BLOCKS * self.block_length, self.clock
        )

    @property
    def _runner(self) -> ModelRunner:
        assert self._planned is not None, "nothing runs before it is planned for"
        return self._planned

    # --- a round ----------------------------------------------------------------------------------

    def _end_early(self) -> Iterator[Event]:
        """Finish what was cancelled or is past its deadline, running or waiting."""
        ends_early = self._scheduler.ends_early
        for slot, flight in list(self._flights.items()):
            if reason := ends_early(flight.request):
                yield FinishedEvent(
                    flight.request.index, flight.complete(self.eos_token_ids, reason)
                )
                self._release(slot)
        for request in list(self._scheduler.waiting):
            if reason := ends_early(request):
                self._scheduler.waiting.remove(request)
                self._scheduler.forget(request)
                yield FinishedEvent(request.index, Completion((), reason, Counters()))

    def _admit(self) -> None:
        """Give free slots to waiting requests, open their first blocks and restore what is known of their prompts."""
        for slot, request in self._scheduler.admit():
            runner = self._runner
            key = replace(request.params, seed=None, max_new_tokens=1, stop=(), deadline=None)
            if key not in self._lanes:
                rows = len(runner.cache.lengths)
                self._lanes[key] = Lane(
                    key, rows, self.block_length, runner.device, tuple(self.eos_token_ids)
                )
            lane = self._lanes[key]
            start = len(request.prompt_ids) // self.block_length * self.block_length
            end = self._limits.end(request)
            generator = own_generator(request.params)
            self._flights[slot] = Flight(request, lane, slot, start, end, generator)
            lane.open(
                slot * lane.width, request.prompt_ids[start:], self.mask_token_id, runner.embed
            )
            runner.cache.rollback(slot)
            if self.prefix_cache is not None:
                self.prefix_cache.restore(runner.cache, slot, request.prompt_ids)
            if unfilled := start - runner.cache.lengths[slot]:
                self._scheduler.unfilled[slot] = unfilled

    def _prefill(self) -> None:
        """Encode prompts: short ones along with their first step, long ones in chunks.

        One chunk if sequences are running, else all but the last chunks of the longest, so that
        they start as one.
        """
        scheduler = self._scheduler
        waits = any(slot not in scheduler.unfilled for slot in self._flights)
        while True:
            riders, slots, size = scheduler.next_prompts(waits)
            for slot in riders:
                self._let_ride(slot)
            if slots:
                self._encode(slots, size)
            waits = (
                waits
                or bool(riders)
                or not any(n <= scheduler.prefill_tokens for n in scheduler.unfilled.values())
            )
            if waits or not slots:
                return

    def _let_ride(self, slot: int) -> None:
        """Make what is left of a prompt blocks that go into the cache with the sequence's first step."""
        flight = self._flights[slot]
        length = self.block_length
        starts = range(self._runner.cache.lengths[slot], flight.start, length)
        flight.pending = [flight.request.prompt_ids[start : start + length] for start in starts]
        flight.num_prompt = len(starts)
        self._scheduler.filled(slot, len(starts) * length)

    def _encode(self, slots: list[int], size: int) -> None:
        """Encode the next `size` tokens of prompts in a forward of their own."""
        runner = self._runner
        tokens = []
        for slot in slots:
            flight = self._flights[slot]
            at = runner.cache.lengths[slot]
            tokens.append(flight.request.prompt_ids[at : at + size])
            flight.counters.num_prefill_forwards += 1
        runner.prefill(slots, torch.tensor(tokens).to(runner.device))
        for slot in slots:
            self._scheduler.filled(slot, size)
            if slot not in self._scheduler.unfilled:
                self._share_prefix(slot)

    def _share_prefix(self, slot: int) -> None:
        """Keep the encoded blocks of a prompt for others that begin alike."""
        if self.prefix_cache is not None:
            self.prefix_cache.store(
                self._runner.cache, slot, self._flights[slot].request.prompt_ids
            )

    def _denoise(self, ready: dict[int, Flight]) -> dict[int, list[Flags]]:
        """One forward and one decision for every open block; the only wait for the device is for the flags."""
        groups: dict[tuple[int, int], list[int]] = {}  # sequences decoded alike share a forward
        for slot, flight in ready.items():
            versions = len(flight.places) if flight.lane.num_branches > 1 else 1
            groups.setdefault((id(flight.lane), versions), []).append(slot)
        if not groups:
            return {}
        found = [self._denoise_group(slots, versions) for (_, versions), slots in groups.items()]
        read = iter(torch.cat(found, dim=1).T.tolist())
        return {
            slot: [Flags(*next(read)) for _ in range(len(ready[slot].places) // versions)]
            for (_, versions), slots in groups.items()
            for slot in slots
        }

    def _denoise_group(self, slots: list[int], versions: int) -> Tensor:
        """The step of sequences that have the same lane; `Flags` [6, R], a column for each open block."""
        runner = self._runner
        flights = [self._flights[slot] for slot in slots]
        lane = flights[0].lane
        folded = self.commit == "cross_block"
        committed = runner.cache.lengths
        pending = [row for flight in flights for row in flight.pending_rows(committed)]
        opened = [row for flight in flights for row in flight.open_rows(committed, versions)]
        tokens = [block for flight in flights for block in flight.pending]
        if pending and not folded:
            rows = Rows.of(pending, tokens, self.block_length).to(runner.device)
            runner.commit(Shape.of(pending, 0, self.block_length), rows)
        listed, tokens = (pending + opened, tokens) if folded else (opened, [])
        shape = Shape.of(listed, len(opened), self.block_length, versions)
        rows = Rows.of(listed, tokens, self.block_length)
        if self._graphs is not None and flights[0].generator is None:
            flags = self._graphs(runner, lane, shape, rows)
        else:
            gumbel = gumbel_noise(
                flights, self.block_length, self.model.config.vocab_size, runner.device
            )
            flags = lane.denoise(runner, shape, rows.to(runner.device), gumbel)
        for slot, flight in zip(slots, flights, strict=True):
            self._count(flight, folded)
            runner.cache.lengths[slot] += len(flight.pending) * self.block_length
            if flight.num_prompt:
                self._share_prefix(slot)
            flight.pending = []
            flight.num_prompt = 0
        return flags

    def _count(self, flight: Flight, folded: bool) -> None:
        """What a step costs a request; the positions of its prompt are not counted."""
        counters = flight.counters
        num_finished = len(flight.pending) - flight.num_prompt
        counters.num_forwards += 1
        counters.num_prefill_forwards += bool(flight.num_prompt)
        counters.num_commit_forwards += bool(num_finished) and not folded
        counters.num_positions += (num_finished + len(flight.places)) * self.block_length

    def _settle(self, flight: Flight, flags: list[Flags], provisional: bool) -> Iterator[Event]:
        """After a step: report the open blocks, close those that are done from the first on, and open the next."""
        lane = flight.lane
        slot = flight.slot
        request = flight.request
        counters = flight.counters
        self._refuse_broken(slot, request, flags)
        counters.num_forced += sum(block.forced for block in flags)
        blocks = [slot * lane.width + place for place in flight.places[: len(flags)]]
        num_done = next((index for index, block in enumerate(flags) if not block.done), len(flags))
        for row, block in zip(blocks[:num_done], flags, strict=False):
            event = flight.event(row, flight.start, "committed")
            start = flight.start
            yield event
            counters.num_capped += block.capped
            flight.generated += event.token_ids
            flight.start += self.block_length
            if flight.has_ended(event.token_ids, self.eos_token_ids):
                yield FinishedEvent(request.index, flight.complete(self.eos_token_ids))
                self._release(slot)
                return
            known = request.prompt_ids[start:]  # the prompt's tail, in its first block
            flight.pending.append((*known, *event.token_ids))
        if provisional:
            for ahead, row in enumerate(blocks[num_done:]):
                yield flight.event(row, flight.start + ahead * self.block_length, "provisional")
        if lane.num_branches > 1 and not num_done:
            flight.places = list(range(lane.num_branches))
            return
        flight.places = flight.places[num_done : len(flags)]
        ahead = flight.start + len(flight.places) * self.block_length
        if not flight.places or (
            flags[-1].opens and len(flight.places) < lane.width and ahead < flight.end
        ):
            place = next(place for place in range(lane.width) if place not in flight.places)
            flight.places.append(place)
            lane.open(slot * lane.width + place, (), self.mask_token_id, self._runner.embed)

    def _refuse_broken(self, slot: int, request: Request, flags: list[Flags]) -> None:
        if any(block.broken for block in flags):
            self._release(slot)
            raise InputError(
                f"the model gave NaN logits for prompt {request.index}",
                hint="check the checkpoint, or load it with dtype float32",
            )
        if any(block.invalid for block in flags):
            self._release(slot)
            raise InputError(
                f"strategy `{request.params.strategy}` proposed the mask token for prompt {request.index}"
            )

    def _release(self, slot: int) -> None:
        """Free a slot."""
        self._scheduler.release(slot, self._flights.pop(slot).request)
