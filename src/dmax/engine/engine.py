"""The only denoise loop: encode prompts, take a step of all open blocks, close and open blocks.

Strategies decide what to write; this file decides nothing about tokens. It keeps the promises: a
sequence's blocks converge on their own, whatever its neighbours do; the prompt is never written; a
block ends after at most its cap on steps; a request with broken logits ends with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch

from dmax.decoding.strategy import Strategy
from dmax.engine.batch import Batch
from dmax.engine.blocks import OpenBlocks, read
from dmax.engine.graphs import GraphedSteps
from dmax.engine.prefix_cache import PrefixCache
from dmax.engine.request import Request
from dmax.engine.runner import ModelRunner, in_turn
from dmax.engine.scheduler import SHORT_PROMPT, Scheduler
from dmax.engine.sequence import Sequence, finished, open_last
from dmax.engine.step import step
from dmax.environment import on_device
from dmax.outputs import Cost, Load, StreamEvent
from dmax.params import EngineOptions
from dmax.special_ids import SpecialIds

MAX_IDLE = 8
"""Open blocks of this many strategies are kept when no request uses them."""


class Engine:
    """Decodes requests with a block-diffusion model, several at a time, each as it would be alone.

    `run` decodes a list of requests. Or call `add` and `cancel` at any time, and `step` as long as
    the engine `is_busy`. All of it belongs to one thread: for several, see
    `dmax.engine.thread.EngineThread`. Engines of one model in different threads take turns.

    Args:
        model: a block-causal model in eval mode (see `ModelRunner`).
        special_ids: of its checkpoint.
        options: sizes and switches.
        clock: seconds, for deadlines.

    Attributes:
        prefix_cache: encoded blocks of prompts; None: nothing is shared.
    """

    def __init__(
        self,
        model: Any,
        special_ids: SpecialIds,
        options: EngineOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.special_ids = special_ids
        self.block_length = special_ids.block_length
        self.options = options
        self._device = model.get_input_embeddings().weight.device
        num_bytes = options.prefix_cache_mib * 2**20
        self.prefix_cache = PrefixCache(self.block_length, num_bytes) if num_bytes else None
        self._scheduler = Scheduler(
            block_length=self.block_length,
            vocab_size=model.config.vocab_size,
            context=getattr(model.config, "max_position_embeddings", None),
            max_length=options.max_length,
            prefill_tokens=options.prefill_tokens,
            clock=clock,
        )
        self._sequences: dict[int, Sequence] = {}  # by slot
        self._blocks: dict[Strategy, OpenBlocks] = {}  # the ones used last come last
        self._runner: ModelRunner | None = None
        self._graphs: GraphedSteps | None = None
        if self._scheduler.max_length is not None:
            self._plan(options.max_batch_size, self._scheduler.max_length)

    # --- what a server calls ---

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: it can never fit.
        """
        self._scheduler.check(request)
        self._plan(self.options.max_batch_size, self._scheduler.positions(request))
        self._scheduler.add(request)

    def add_all(self, requests: Collection[Request]) -> None:
        """Queue requests together, all or none; memory is planned for as many as there are.

        Raises:
            InputError: one of them can never fit.
        """
        self.check(requests)
        if not requests:
            return
        num_requests = len(self._sequences) + len(self._scheduler.waiting) + len(requests)
        num_slots = min(self.options.max_batch_size, num_requests)
        self._plan(num_slots, max(map(self._scheduler.positions, requests)))
        for request in requests:
            self._scheduler.add(request)

    def cancel(self, index: int) -> bool:
        """End a request at the next step; False if there is no such request, or no longer."""
        return self._scheduler.cancel(index)

    def load(self) -> Load:
        """How busy it is; any thread may ask."""
        return Load(len(self._sequences), len(self._scheduler.waiting))

    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._sequences or self._scheduler.waiting)

    def step(self) -> list[StreamEvent]:
        """Prepare, then take one step of every open block.

        A request that cannot go on ends with a "finished" event that carries its error; the others
        are not concerned.
        """
        with in_turn(self.model, self._device):
            return self._take_step()

    def _take_step(self) -> list[StreamEvent]:
        events = self.prepare()
        stepped: list[Sequence] = []
        for blocks, batch, sequences in self.batches():
            act = partial(self._step, blocks, batch, sequences)
            events.extend(self._together(act, sequences))
            stepped.extend(sequences)
        return [*events, *self._report(self._in_progress(stepped))]

    def _together(
        self, act: Callable[[list[Sequence]], None], sequences: list[Sequence]
    ) -> Iterator[StreamEvent]:
        """Do something for all of these sequences, or for each alone if their strategy raises.

        Returns:
            The last events of those for which it raises alone.
        """
        try:
            act(sequences)
        except Exception as error:  # whoever wrote the strategy
            if len(sequences) == 1:
                yield self._fail(sequences[0], error)
            else:
                for each in sequences:
                    yield from self._together(act, [each])

    def _report(self, sequences: list[Sequence]) -> Iterator[StreamEvent]:
        """Report what a step made of sequences, and open their next blocks."""
        if not sequences:
            return
        used = list(dict.fromkeys(sequence.blocks for sequence in sequences))
        found = {
            blocks: (records["flags"].tolist(), records)
            for blocks, records in zip(used, read(used), strict=True)
        }
        events = dict[int, list[StreamEvent]]()  # by request
        for sequence in sequences:
            own = events[sequence.request.index] = []
            try:
                for event in sequence.report(*found[sequence.blocks]):
                    own.append(event)
                    if event.kind == "finished":
                        self._release(sequence)
            except Exception as error:  # as in `_together`
                own.append(self._fail(sequence, error))
        for failure in self._open_next(self._in_progress(sequences)):
            events[failure.index].append(failure)
        yield from chain.from_iterable(events.values())

    def _open_next(self, sequences: list[Sequence]) -> Iterator[StreamEvent]:
        """Open the blocks that are due; the last events of requests whose strategy raises."""
        due: dict[OpenBlocks, list[Sequence]] = {}
        for sequence in sequences:
            if sequence.takes_row():
                due.setdefault(sequence.blocks, []).append(sequence)
        for opening in due.values():
            yield from self._together(open_last, opening)

    def _in_progress(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that have not ended."""
        return [sequence for sequence in sequences if sequence.slot in self._sequences]

    def run(self, requests: Iterable[Request]) -> Iterator[StreamEvent]:
        """Decode the requests; events of different requests interleave.

        Args:
            requests: any lengths, any mixture of parameters (the block length is the engine's).

        Raises:
            InputError: a request that can never fit, before anything is computed.
            ValueError: other requests are in progress.
        """
        if self.is_busy():
            raise ValueError("the engine is busy; `add` the requests instead")
        self.add_all(list(requests))
        try:
            while self.is_busy():
                yield from self.step()
        finally:  # the caller may have had enough
            for sequence in list(self._sequences.values()):
                self._release(sequence)
            for request in list(self._scheduler.waiting):
                self._scheduler.drop(request)

    def capture(self, strategy: Strategy, capacity: int) -> None:
        """Plan for so many positions, and capture the steps of a strategy for all numbers of rows.

        Nothing may be in progress. Where steps are not captured, only memory is planned.
        """
        batch_size = self.options.max_batch_size
        self._plan(batch_size, capacity)
        if self._graphs is not None:
            num_open = batch_size * strategy.blocks
            with in_turn(self.model, self._device):
                blocks = self._blocks_for(strategy)
                self._graphs.warm_up(blocks, num_open, max(num_open, SHORT_PROMPT))

    def check(self, requests: Iterable[Request]) -> None:
        """Raises `InputError` for a request that can never fit."""
        for request in requests:
            self._scheduler.check(request)

    # --- one step, for those who run or time it themselves ---

    @property
    def runner(self) -> ModelRunner:
        """The model and its cache, once they are planned for."""
        assert self._runner is not None, "nothing runs before it is planned for"
        return self._runner

    @torch.inference_mode()
    def prepare(self) -> list[StreamEvent]:
        """End what must end, admit what fits, encode a bounded number of prompt tokens."""
        with on_device(self._device):
            events = [*self._end_early(), *self._admit()]
            self._prefill()
            return events

    def batches(self) -> Iterator[tuple[OpenBlocks, Batch, list[Sequence]]]:
        """The forwards of the next step, on the host: sequences decoded alike share one.

        `dmax.engine.step.step(engine.runner, blocks, batch.to(device))` runs one of them, under
        `torch.inference_mode()`.
        """
        unfilled = self._unfilled()
        groups: dict[tuple[OpenBlocks, int], list[Sequence]] = {}
        for slot, sequence in sorted(self._sequences.items()):
            if slot not in unfilled:
                alike = (sequence.blocks, sequence.num_branches)
                groups.setdefault(alike, []).append(sequence)
        for (blocks, _), sequences in groups.items():
            yield blocks, self._batch(sequences), sequences

    def _batch(self, sequences: list[Sequence]) -> Batch:
        """The forward of sequences that are decoded alike."""
        pending = [block for each in sequences for block in each.pending]
        rows = [row for each in sequences for row in each.pending_rows()]
        rows += [row for each in sequences for row in each.open_rows()]
        return Batch.of(rows, pending, self.block_length, sequences[0].num_branches)

    def _step(
        self,
        blocks: OpenBlocks,
        batch: Batch,
        sharing: list[Sequence],
        sequences: list[Sequence],
    ) -> None:
        """Take the step of all that share a batch, or of one of them alone, and count it."""
        runner = self.runner
        if len(sequences) < len(sharing):
            batch = self._batch(sequences)
        if self._graphs is None:
            step(runner, blocks, batch.to(runner.device))
        else:
            self._graphs(blocks, batch)
        for sequence in sequences:
            slot = sequence.slot
            if sequence.pending:
                runner.cache.commit([slot], len(sequence.pending) * self.block_length)
            if self.prefix_cache is not None and not sequence.num_forwards:
                self.prefix_cache.store(runner.cache, slot, sequence.request.prompt_ids)
            sequence.count_forward()

    # --- who is in progress ---

    def _end_early(self) -> Iterator[StreamEvent]:
        """Finish what was cancelled or is past its deadline, in progress or waiting."""
        scheduler = self._scheduler
        for sequence in list(self._sequences.values()):
            if reason := scheduler.ends_early(sequence.request):
                yield sequence.finish(reason)
                self.runner.cache.clear(sequence.slot)
                self._release(sequence)
        for request in list(scheduler.waiting):
            if reason := scheduler.ends_early(request):
                scheduler.drop(request)
                yield finished(request, (), reason, Cost())

    def _admit(self) -> Iterator[StreamEvent]:
        """Give free slots to waiting requests; report those that cannot start."""
        while started := [self._start(*admitted) for admitted in self._scheduler.admit()]:
            yield from self._open_next(started)  # who fails leaves a slot for another

    def _start(self, slot: int, request: Request) -> Sequence:
        """Give a slot to a request, and restore what is known of its prompt."""
        blocks = self._blocks_for(request.strategy)
        blocks.admit(slot, request.strategy, request.params)
        sequence = Sequence(
            request=request,
            blocks=blocks,
            slot=slot,
            start=len(request.prompt_ids) // self.block_length * self.block_length,
            end=self._scheduler.end(request),
            eos_token_ids=() if request.params.ignore_eos else self.special_ids.eos_token_ids,
        )
        self._sequences[slot] = sequence
        cache = self.runner.cache
        cache.release(slot)
        if self.prefix_cache is not None:
            self.prefix_cache.restore(cache, slot, request.prompt_ids)
        return sequence

    def _blocks_for(self, strategy: Strategy) -> OpenBlocks:
        """Where blocks of this strategy are open, whatever numbers it is set to."""
        shared = strategy.without_numbers()
        blocks = self._blocks.pop(shared, None)
        if blocks is None:
            runner = self.runner
            num_slots = len(runner.cache.lengths)
            blocks = OpenBlocks(shared, num_slots, self.special_ids, runner.embed, runner.device)
        self._blocks[shared] = blocks
        used = {sequence.blocks for sequence in self._sequences.values()}
        idle = [key for key, kept in self._blocks.items() if kept not in used]
        for key in idle[:-MAX_IDLE]:
            dropped = self._blocks.pop(key)
            if self._graphs is not None:
                self._graphs.forget(dropped)
        return blocks

    def _fail(self, sequence: Sequence, error: Exception) -> StreamEvent:
        """Free a slot; the last event of a request that has no result."""
        self.runner.cache.clear(sequence.slot)
        self._release(sequence)
        return StreamEvent("finished", "", (), index=sequence.request.index, error=error)

    def _release(self, sequence: Sequence) -> None:
        """Free a slot."""
        del self._sequences[sequence.slot]
        self._scheduler.release(sequence.slot, sequence.request)

    # --- prompts ---

    def _prefill(self) -> None:
        """Encode prompts: short ones along with their first step, long ones in chunks.

        One chunk if sequences are running. Otherwise all but the last chunks of the longest, so
        that they start together.
        """
        length = self.block_length
        unfilled = self._unfilled()
        is_running = len(unfilled) < len(self._sequences)
        while unfilled:
            joining, chunk, size = self._scheduler.next_prompts(unfilled, is_running)
            for slot in joining:
                sequence = self._sequences[slot]
                prompt_ids = sequence.request.prompt_ids
                starts = range(self.runner.cache.lengths[slot], sequence.start, length)
                sequence.pending = [prompt_ids[start : start + length] for start in starts]
            if chunk:
                self._encode(chunk, size)
            unfilled = self._unfilled()
            limit = self._scheduler.prefill_tokens
            has_last_chunk = any(left <= limit for left in unfilled.values())
            if is_running or joining or not has_last_chunk:
                return

    def _unfilled(self) -> dict[int, int]:
        """By slot in order of admission, prompt tokens that are neither encoded nor pending."""
        lengths = self._runner.cache.lengths if self._runner else []
        return {
            slot: left
            for slot, sequence in self._sequences.items()
            if not sequence.num_forwards and (left := sequence.first - lengths[slot])
        }

    def _encode(self, slots: list[int], size: int) -> None:
        """Encode the next `size` tokens of prompts in a forward of their own."""
        runner = self.runner
        tokens = []
        for slot in slots:
            sequence = self._sequences[slot]
            start = runner.cache.lengths[slot]
            tokens.append(sequence.request.prompt_ids[start : start + size])
            sequence.cost += Cost(num_prefill_forwards=1)
        runner.prefill(slots, torch.tensor(tokens, device=runner.device))

    # --- memory ---

    def _plan(self, num_slots: int, capacity: int) -> None:
        """Have keys and values for this many sequences and positions.

        Requests in progress move along. Then the number of slots at least doubles, so that requests
        that come one by one are not moved each time.
        """
        scheduler = self._scheduler
        if capacity <= scheduler.capacity and num_slots <= scheduler.num_slots:
            return
        if self.is_busy() and num_slots > scheduler.num_slots:
            num_slots = min(max(num_slots, 2 * scheduler.num_slots), self.options.max_batch_size)
        num_slots = max(num_slots, scheduler.num_slots)
        capacity = max(capacity, scheduler.capacity)
        use_graphs = self.options.cuda_graphs
        if use_graphs is None:
            use_graphs = self._device.type == "cuda"
        runner = ModelRunner(
            self.model,
            self.special_ids,
            num_slots + use_graphs,  # the last slot fills up batches
            capacity,
            compiled=self.options.compile_model,
        )
        for slot in self._sequences:
            cache = self.runner.cache
            runner.cache.write(slot, *cache.read(slot, 0, cache.lengths[slot]))
        used = {sequence.blocks for sequence in self._sequences.values()}
        self._blocks = {key: kept for key, kept in self._blocks.items() if kept in used}
        for blocks in used:
            blocks.grow(num_slots + use_graphs)
        self._runner = runner
        with on_device(self._device):
            self._graphs = GraphedSteps(runner) if use_graphs else None
        scheduler.plan(num_slots, capacity)
