"""Steps as CUDA graphs: one launch for the some 230 kernels of a forward and its decision.

A graph replays fixed addresses and shapes. What varies between steps of one shape (slots,
positions, finished tokens) comes in through the numbers of a batch; all else lives in tensors that
the engine never moves. Batches are filled up to the next of a few sizes with rows of a slot
that no request uses, so that a few graphs are enough. Where attention reads the cache in place,
a graph serves every length of the context; elsewhere the span of the cache is rounded up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from dmax.engine.batch import Batch, Row, power_of_two
from dmax.engine.blocks import OpenBlocks
from dmax.engine.runner import ModelRunner
from dmax.engine.step import step

SPAN = 512
"""Spans of the cache are captured in multiples of this."""

Replay = Callable[[], None]
"""Gives nothing back: graphs share their memory, and what one has put there others overwrite."""

logger = logging.getLogger(__name__)


class CudaCapture:
    """Records steps as CUDA graphs of the current device.

    Graphs run one after another, so they share one pool of memory. They share one stream, too:
    cuBLAS keeps a workspace for every stream it has seen, 32 MiB on an H100. CUDA calls of other
    threads go on during a capture.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def __call__(self, run: Replay) -> Replay:
        """What replays `run`, which leaves its results in tensors that were there before."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # kernels are compiled and workspaces made before the capture
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            # One that fails does not leave its stream.
            with torch.cuda.stream(current), capture:
                run()
        except RuntimeError:
            # PyTorch counts it as running still: its pool takes no other, and its graph must live.
            self._failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()
            # The generator stays bound to it and would draw no number; with a copied state it does.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise

        return graph.replay


class GraphedSteps:
    """The step by shape of the batch, captured the second time that a shape is needed.

    The first time a shape comes, the step runs eagerly. Open blocks make some of their tensors when
    their strategy first asks for them, and a graph must find them where they are to stay. A step
    that cannot be captured runs eagerly for good, and the log says each reason once.

    Args:
        runner: its last slot is one that no request uses.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._spare_slot = len(runner.cache.lengths) - 1
        runner.cache.spare_slot = self._spare_slot
        self._capture = CudaCapture()
        # By open blocks and shape; None: the shape came once.
        self._captured: dict[tuple[OpenBlocks, tuple[int, ...]], tuple[Batch, Replay] | None] = {}
        self._told: set[str] = set()

    def __call__(self, blocks: OpenBlocks, batch: Batch) -> None:
        """`step` for a batch on the host."""
        batch = self._filled(blocks, batch)
        shape = (batch.num_pending, batch.num_rows, batch.num_branches, batch.span, batch.in_order)
        key = (blocks, shape)
        if key not in self._captured:
            self._captured[key] = None
            step(self.runner, blocks, batch.to(self.runner.device))
            return
        captured = self._captured[key]
        if captured is None:
            # Warming up runs the step once more, on spare rows, so that no request notices.
            idle = replace(batch, numbers=torch.zeros_like(batch.numbers))
            idle.where.numpy().T[:] = self._spare_row(blocks)
            static = idle.to(self.runner.device)
            captured = (static, self._recorded(lambda: step(self.runner, blocks, static)))
            self._captured[key] = captured
        static, replay = captured
        # What is not pinned has left its place when this returns, and may be written again.
        static.numbers.copy_(batch.numbers, non_blocking=True)
        replay()

    def warm_up(self, blocks: OpenBlocks, num_open: int, num_pending: int) -> None:
        """Capture the steps of up to so many open and pending blocks, each in one row.

        Where attention does not read the cache in place, these are steps of the shortest span.
        """
        known = (0,) * blocks.block_length
        for row in blocks.rows_of(self._spare_slot):
            blocks.open(row, known)  # with nothing left to decode
        sizes = {
            (power_of_two(opened), power_of_two(pending))
            for opened in range(1, num_open + 1)
            for pending in range(num_pending + 1)
        }
        for number, (opened, pending) in enumerate(sorted(sizes, reverse=True), 1):
            rows = [self._spare_row(blocks)] * (pending + opened)
            batch = Batch.of(rows, [known] * pending, blocks.block_length)
            for in_order in {False, not pending}:  # a sequence with a pending block has two rows
                for _ in range(2):
                    self(blocks, replace(batch, in_order=in_order))
            if number % 10 == 0 or number == len(sizes):
                logger.info("captured %d of %d steps", number, len(sizes))

    def _recorded(self, run: Replay) -> Replay:
        """The step as a graph, or as it is if no graph can hold it."""
        try:
            return self._capture(run)
        except RuntimeError as error:  # an operation that waits for the host, or no memory left
            # The end of a capture raises, too, if what was captured did.
            reason = str(error.__context__ or error).partition("\n")[0]
            first = reason.partition(". ")[0]  # without the sizes of what did not fit
            if first not in self._told:
                self._told.add(first)
                logger.warning("a step runs without a CUDA graph, which is slower: %s", reason)
            return run

    def forget(self, blocks: OpenBlocks) -> None:
        """Drop the graphs of open blocks that are no longer used."""
        self._captured = {key: kept for key, kept in self._captured.items() if key[0] is not blocks}

    def _filled(self, blocks: OpenBlocks, batch: Batch) -> Batch:
        """The batch filled up to powers of two, its span rounded up or all that there is."""
        batch = batch.filled(self._spare_row(blocks))
        capacity = self.runner.cache.capacity
        if self.runner.reads_in_place:
            return replace(batch, span=capacity, in_order=False)
        return replace(batch, span=min(-(-batch.span // SPAN) * SPAN, capacity))

    def _spare_row(self, blocks: OpenBlocks) -> Row:
        """A row of the slot that no request uses, which has nothing in the cache."""
        return (self._spare_slot, 0, 0, blocks.rows_of(self._spare_slot).start, -1)
