"""The only denoise loop: encode prompts, take a step of all open blocks, close and open blocks.

Strategies decide what to write; this file decides nothing about tokens. It keeps the promises: a
sequence's blocks converge on their own, whatever its neighbours do; the prompt is never written; a
block ends after at most its cap on steps; a request with broken logits ends with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dmax.decoding.strategy import Strategy
from dmax.engine.batch import Batch
from dmax.engine.blocks import OpenBlocks
from dmax.engine.graphs import GraphedSteps
from dmax.engine.prefix_cache import PrefixCache
from dmax.engine.request import Request
from dmax.engine.runner import ModelRunner
from dmax.engine.scheduler import Scheduler
from dmax.engine.sequence import Sequence, failed, finished, gumbel_noise, own_generator
from dmax.engine.step import step
from dmax.errors import InputError
from dmax.outputs import Cost, StreamEvent
from dmax.params import EngineOptions
from dmax.special_ids import SpecialIds

MAX_IDLE = 8
"""Open blocks of this many strategies are kept when no request uses them."""


class Engine:
    """Decodes requests with a block-diffusion model, several at a time, each as it would be alone.

    `run` decodes a list of requests. A server calls `add` and `cancel` at any time, and `step` as
    long as the engine `is_busy`.

    Args:
        model: a block-causal model in eval mode (see `ModelRunner`).
        special_ids: of its checkpoint.
        options: sizes and switches; None: their defaults.
        clock: seconds, for deadlines.

    Attributes:
        prefix_cache: encoded blocks of prompts; None: nothing is shared.
    """

    def __init__(
        self,
        model: Any,
        special_ids: SpecialIds,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.special_ids = special_ids
        self.block_length = special_ids.block_length
        self.options = options or EngineOptions()
        self.prefix_cache: PrefixCache | None = None
        if self.options.prefix_cache_mib:
            num_bytes = self.options.prefix_cache_mib * 2**20
            self.prefix_cache = PrefixCache(self.block_length, num_bytes)
        self._scheduler = Scheduler(
            block_length=self.block_length,
            vocab_size=model.config.vocab_size,
            context=getattr(model.config, "max_position_embeddings", None),
            max_length=self.options.max_length,
            prefill_tokens=self.options.prefill_tokens,
            clock=clock,
        )
        self._sequences: dict[int, Sequence] = {}  # by slot
        self._blocks: dict[Strategy, OpenBlocks] = {}  # the ones used last come last
        self._runner: ModelRunner | None = None
        self._graphs: GraphedSteps | None = None
        if self.options.max_length is not None:
            capacity = self._scheduler.whole_blocks(self.options.max_length)
            self._plan(self.options.max_batch_size, capacity)

    # --- what a server calls ---

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: it can never fit.
        """
        self._scheduler.check(request)
        self._plan(self.options.max_batch_size, self._scheduler.positions(request))
        self._scheduler.add(request)

    def cancel(self, index: int) -> bool:
        """End a request at the next step; False if there is no such request, or no longer."""
        return self._scheduler.cancel(index)

    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._sequences or self._scheduler.waiting)

    @torch.inference_mode()
    def step(self, *, provisional: bool = False) -> list[StreamEvent]:
        """Prepare, then take one step of every open block.

        A request that cannot go on ends with a "finished" event that carries its error; the others
        are not concerned.

        Args:
            provisional: also report every open block, at the price of copying it from the device.
        """
        events = self.prepare()
        stepped: list[Sequence] = []
        flags: list[Tensor] = []
        for blocks, batch, sequences in self.batches():
            try:
                flags.append(self._step(blocks, batch, sequences))
                stepped += sequences
            except InputError as error:  # of a strategy that does not go with this model
                events += [self._fail(sequence, error) for sequence in sequences]
        if not flags:
            return events
        columns = torch.cat(flags, dim=1).tolist()  # the only wait for the device
        first = 0
        for sequence in stepped:
            last = first + len(sequence.rows)
            events += self._settle(
                sequence, [column[first:last] for column in columns], provisional
            )
            first = last
        return events

    def run(
        self, requests: Iterable[Request], *, provisional: bool = False
    ) -> Iterator[StreamEvent]:
        """Decode the requests; events of different requests interleave.

        Args:
            requests: any lengths, any mixture of parameters (the block length is the engine's).
            provisional: as in `step`.

        Raises:
            InputError: a request that can never fit, before anything is computed.
            ValueError: other requests are in progress.
        """
        if self.is_busy():
            raise ValueError("the engine is busy; `add` the requests instead")
        requests = list(requests)
        self.check(requests)
        if not requests:
            return
        if self.options.max_length is None:
            num_slots = min(self.options.max_batch_size, len(requests))
            self._plan(num_slots, max(map(self._scheduler.positions, requests)))
        for request in requests:
            self._scheduler.add(request)
        try:
            while self.is_busy():
                yield from self.step(provisional=provisional)
        finally:  # the caller may have had enough
            for sequence in list(self._sequences.values()):
                self._release(sequence)
            for request in self._scheduler.waiting:
                self._scheduler.forget(request)
            self._scheduler.waiting.clear()

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
        events = [*self._end_early(), *self._admit()]
        self._prefill()
        return events

    def batches(self) -> list[tuple[OpenBlocks, Batch, list[Sequence]]]:
        """The forwards of the next step, on the host: sequences decoded alike share one.

        `dmax.engine.step.step(engine.runner, blocks, batch.to(device))` runs one of them.
        """
        groups: dict[tuple[OpenBlocks, int], list[Sequence]] = {}
        for slot, sequence in sorted(self._sequences.items()):
            if slot not in self._scheduler.unfilled:
                alike = (sequence.blocks, sequence.num_branches)
                groups.setdefault(alike, []).append(sequence)
        return [
            (blocks, self._batch(sequences), sequences) for (blocks, _), sequences in groups.items()
        ]

    def _batch(self, sequences: list[Sequence]) -> Batch:
        lengths = self.runner.cache.lengths
        rows = [row for each in sequences for row in each.pending_rows(lengths[each.slot])]
        rows += [row for each in sequences for row in each.open_rows(lengths[each.slot])]
        pending = [block for each in sequences for block in each.pending]
        return Batch.of(rows, pending, self.block_length, sequences[0].num_branches)

    def _step(self, blocks: OpenBlocks, batch: Batch, sequences: list[Sequence]) -> Tensor:
        """Take the step of sequences that share a forward, and count it."""
        runner = self.runner
        noise = gumbel_noise(sequences, self.model.config.vocab_size, runner.device)
        if self._graphs is not None and noise is None:
            flags = self._graphs(runner, blocks, batch)
        else:
            flags = step(runner, blocks, batch.to(runner.device), noise)
        for sequence in sequences:
            runner.cache.commit([sequence.slot], len(sequence.pending) * self.block_length)
            if sequence.num_prompt_blocks:
                self._share_prefix(sequence)
            sequence.count_forward()
        return flags

    def _settle(
        self, sequence: Sequence, flags: list[list[bool]], provisional: bool
    ) -> list[StreamEvent]:
        """What the step made of a sequence; its slot is free if it is over."""
        try:
            events = sequence.settle(flags, provisional)
        except InputError as error:
            return [self._fail(sequence, error)]
        if events and events[-1].kind == "finished":
            self._release(sequence)
        return events

    # --- who is in progress ---

    def _end_early(self) -> Iterator[StreamEvent]:
        """Finish what was cancelled or is past its deadline, in progress or waiting."""
        scheduler = self._scheduler
        for sequence in list(self._sequences.values()):
            if reason := scheduler.ends_early(sequence.request):
                yield sequence.finish(reason)
                self._release(sequence)
        for request in list(scheduler.waiting):
            if reason := scheduler.ends_early(request):
                scheduler.waiting.remove(request)
                scheduler.forget(request)
                yield finished(request, (), reason, Cost())

    def _admit(self) -> Iterator[StreamEvent]:
        """Give free slots to waiting requests; report those that cannot start."""
        for slot, request in self._scheduler.admit():
            try:
                self._start(slot, request)
            except InputError as error:
                self._scheduler.release(slot, request)
                yield failed(request, error)

    def _start(self, slot: int, request: Request) -> None:
        """Open a request's first block, and restore what is known of its prompt."""
        blocks = self._blocks_for(request.strategy)
        start = len(request.prompt_ids) // self.block_length * self.block_length
        first_row = blocks.rows_of(slot).start
        blocks.admit(slot, request.strategy, request.params)
        blocks.open(first_row, request.prompt_ids[start:])
        eos_token_ids = () if request.params.ignore_eos else self.special_ids.eos_token_ids
        self._sequences[slot] = Sequence(
            request=request,
            blocks=blocks,
            slot=slot,
            start=start,
            end=self._scheduler.end(request),
            eos_token_ids=frozenset(eos_token_ids),
            generator=own_generator(request.params),
            rows=[first_row],
        )
        cache = self.runner.cache
        cache.rollback(slot)
        if self.prefix_cache is not None:
            self.prefix_cache.restore(cache, slot, request.prompt_ids)
        if cache.lengths[slot] < start:
            self._scheduler.unfilled[slot] = start - cache.lengths[slot]

    def _blocks_for(self, strategy: Strategy) -> OpenBlocks:
        """Where blocks of this strategy are open, whatever numbers it is set to."""
        shared = strategy.with_numbers(dict.fromkeys(strategy.numbers(), 0.0))
        blocks = self._blocks.pop(shared, None)
        if blocks is None:
            self._drop_idle()
            runner = self.runner
            num_slots = len(runner.cache.lengths)
            blocks = OpenBlocks(shared, num_slots, self.special_ids, runner.embed, runner.device)
        self._blocks[shared] = blocks
        return blocks

    def _drop_idle(self) -> None:
        """Forget open blocks that no request has used for long."""
        used = {sequence.blocks for sequence in self._sequences.values()}
        idle = [strategy for strategy, blocks in self._blocks.items() if blocks not in used]
        for strategy in idle[: max(len(idle) - MAX_IDLE + 1, 0)]:
            blocks = self._blocks.pop(strategy)
            if self._graphs is not None:
                self._graphs.forget(blocks)

    def _fail(self, sequence: Sequence, error: InputError) -> StreamEvent:
        self._release(sequence)
        return failed(sequence.request, error)

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
        scheduler = self._scheduler
        is_running = any(slot not in scheduler.unfilled for slot in self._sequences)
        while True:
            joining, chunk, size = scheduler.next_prompts(is_running)
            for slot in joining:
                self._join_first_step(self._sequences[slot])
            if chunk:
                self._encode([self._sequences[slot] for slot in chunk], size)
            is_running = is_running or bool(joining) or not scheduler.has_last_chunks()
            if is_running or not chunk:
                return

    def _join_first_step(self, sequence: Sequence) -> None:
        """Make what is left of a prompt pending blocks of the sequence's first step."""
        prompt_ids = sequence.request.prompt_ids
        length = self.block_length
        starts = range(self.runner.cache.lengths[sequence.slot], sequence.start, length)
        sequence.pending = [prompt_ids[start : start + length] for start in starts]
        sequence.num_prompt_blocks = len(starts)
        self._scheduler.filled(sequence.slot, len(starts) * length)

    def _encode(self, sequences: list[Sequence], size: int) -> None:
        """Encode the next `size` tokens of prompts in a forward of their own."""
        runner = self.runner
        tokens = []
        for sequence in sequences:
            start = runner.cache.lengths[sequence.slot]
            tokens.append(sequence.request.prompt_ids[start : start + size])
            sequence.cost += Cost(num_prefill_forwards=1)
        slots = [sequence.slot for sequence in sequences]
        runner.prefill(slots, torch.tensor(tokens).to(runner.device))
        for sequence in sequences:
            self._scheduler.filled(sequence.slot, size)
            if sequence.slot not in self._scheduler.unfilled:
                self._share_prefix(sequence)

    def _share_prefix(self, sequence: Sequence) -> None:
        """Keep the encoded blocks of a prompt for others that begin alike."""
        if self.prefix_cache is not None:
            cache = self.runner.cache
            self.prefix_cache.store(cache, sequence.slot, sequence.request.prompt_ids)

    # --- memory ---

    def _plan(self, num_slots: int, capacity: int) -> None:
        """Reserve keys and values for this many sequences and positions, unless they are there.

        Raises:
            InputError: they are not there, and requests in progress hold what there is.
        """
        if self._runner is not None:
            has_slots = self._scheduler.num_slots
            has_capacity = self._runner.cache.capacity
            if has_capacity >= capacity and has_slots >= num_slots:
                return
            if self.is_busy():
                raise InputError(
                    f"a request needs {capacity} positions, the engine has {has_capacity} while "
                    "others are running",
                    hint="give the engine a `max_length`",
                )
            capacity = max(capacity, has_capacity)
            num_slots = max(num_slots, has_slots)
        use_graphs = self.options.cuda_graphs
        if use_graphs is None:
            use_graphs = self.model.get_input_embeddings().weight.is_cuda
        self._runner = ModelRunner(
            self.model,
            self.special_ids,
            num_slots + use_graphs,  # the last slot fills up batches
            capacity,
            compiled=self.options.compile_model,
        )
        self._graphs = GraphedSteps(num_slots, capacity) if use_graphs else None
        self._scheduler.plan(num_slots)
        self._blocks.clear()
