"""Denoising steps as CUDA graphs: one launch for the some 500 kernels of a forward and its decision.

A graph replays fixed addresses and shapes. What varies between steps of one shape (slots,
positions, finished tokens) comes in through two small tensors; all else lives in tensors that the
engine never moves. Batches are filled up to the next of a few sizes with rows of a slot that no
request uses, and the span of the cache is rounded up, so that few graphs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.engine.lane import Lane
from dmax.engine.rows import Row, Rows, Shape
from dmax.engine.runner import ModelRunner

SPAN = 512
"""Spans of the cache are captured in multiples of this."""

Step = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Captured:
    """A step ready to be replayed: where its rows go, and what runs it."""

    rows: Rows
    replay: Step


class CudaCapture:
    """Records steps as CUDA graphs that share one pool of memory: they run one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """What replays the step and returns the same tensor every time."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            side
        ):  # kernels are compiled and workspaces made outside the capture
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            flags = step()

        def replay() -> Tensor:
            graph.replay()
            return flags

        return replay


class GraphedSteps:
    """Steps by shape, each captured the second time it is needed.

    The first time a shape comes, the step runs eagerly: a lane makes some of its tensors when its
    strategy first asks for them, and a graph must find them where they are to stay.

    Args:
        spare_slot: a slot of cache and lanes that no request uses.
        capacity: positions of a slot.
        capture: what records a step; None: `CudaCapture`.
    """

    def __init__(
        self, spare_slot: int, capacity: int, capture: Callable[[Step], Step] | None = None
    ) -> None:
        self.spare_slot = spare_slot
        self.capacity = capacity
        self._capture = CudaCapture() if capture is None else capture
        self._captured: dict[tuple[int, Shape], Captured] = {}
        self._seen: set[tuple[int, Shape]] = set()

    def __call__(self, runner: ModelRunner, lane: Lane, shape: Shape, rows: Rows) -> Tensor:
        """`Lane.denoise` with rows that are on the host; `Flags` [6, R], or [6, B] with versions of blocks."""
        num_blocks = shape.num_open // shape.versions
        shape, rows = self._fill(lane, shape, rows)
        key = (id(lane), shape)
        if key not in self._seen:
            self._seen.add(key)
            return lane.denoise(runner, shape, rows.to(runner.device))[:, :num_blocks]
        if key not in self._captured:
            # Warming up runs the step once more: on the spare slot's rows, so that no request
            # notices.
            idle = Rows(self._idle(lane, rows.where.shape[1]), torch.zeros_like(rows.tokens)).to(
                runner.device
            )
            self._captured[key] = Captured(
                idle, self._capture(lambda: lane.denoise(runner, shape, idle))
            )
        captured = self._captured[key]
        captured.rows.where.copy_(rows.where, non_blocking=True)
        captured.rows.tokens.copy_(rows.tokens, non_blocking=True)
        return captured.replay()[:, :num_blocks]

    def _fill(self, lane: Lane, shape: Shape, rows: Rows) -> tuple[Shape, Rows]:
        """Pending and open rows filled up to powers of two with rows of the spare slot, the span rounded up."""
        pending, opened = rows.where.split((shape.num_pending, shape.num_open), dim=1)
        more_pending = _power_of_two(shape.num_pending) - shape.num_pending
        blocks = shape.num_open // shape.versions
        more_open = (_power_of_two(blocks) - blocks) * shape.versions
        where = torch.cat(
            (pending, self._idle(lane, more_pending), opened, self._idle(lane, more_open)), dim=1
        )
        rounded = replace(
            shape,
            num_pending=shape.num_pending + more_pending,
            num_open=shape.num_open + more_open,
            span=min(-(-shape.span // SPAN) * SPAN, self.capacity),
            in_order=shape.in_order and not more_pending and not more_open,
            aligned=False,  # the lane's rows come in, too: warming up must not touch those of requests
        )
        return rounded, Rows(where, F.pad(rows.tokens, (0, 0, 0, more_pending)))

    def _idle(self, lane: Lane, num: int) -> Tensor:
        """Rows of the spare slot, nothing committed."""
        return torch.tensor(Row(self.spare_slot, 0, 0, self.spare_slot * lane.width))[
            :, None
        ].repeat(1, num)


def _power_of_two(number: int) -> int:
    """The next power of two; 0 stays."""
    return number and 1 << (number - 1).bit_length()
