"""Which request holds which slot, and whose prompt is encoded next: numbers only, never tensors."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Literal

from dmax.engine.request import Request


class Scheduler:
    """First come, first served. A freed slot is taken at once; prompts are encoded in bounded chunks between steps.

    Args:
        num_slots: requests in flight at most.
        prefill_tokens: prompt tokens encoded between two denoising steps, at most.
        riding_tokens: of prompts that need no forward of their own, at most.
        clock: seconds, for deadlines.
    """

    def __init__(
        self, num_slots: int, prefill_tokens: int, riding_tokens: int, clock: Callable[[], float]
    ) -> None:
        self.num_slots = num_slots
        self.prefill_tokens = prefill_tokens
        self.clock = clock
        self.riding_tokens = min(riding_tokens, prefill_tokens)
        self.waiting: deque[Request] = deque()
        self.unfilled: dict[
            int, int
        ] = {}  # by slot in order of admission, prompt tokens still to encode
        self._free = list(range(num_slots))
        self._submitted: dict[int, float] = {}  # by request
        self._cancelled: set[int] = set()

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue; its deadline runs from now on."""
        self._submitted[request.index] = self.clock()
        self.waiting.append(request)

    def admit(self) -> list[tuple[int, Request]]:
        """Requests that get a slot now, the lowest free ones first: slots in a row are read without a copy."""
        num = min(len(self._free), len(self.waiting))
        return [(heapq.heappop(self._free), self.waiting.popleft()) for _ in range(num)]

    def release(self, slot: int, request: Request) -> None:
        """The request has left its slot."""
        heapq.heappush(self._free, slot)
        self.unfilled.pop(slot, None)
        self.forget(request)

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._submitted.pop(request.index, None)
        self._cancelled.discard(request.index)

    def cancel(self, index: int) -> bool:
        """Have a request end before the next step; False if it is not here, or no longer."""
        if index not in self._submitted:
            return False
        self._cancelled.add(index)
        return True

    def ends_early(self, request: Request) -> Literal["cancelled", "deadline"] | None:
        """Why a request must end now, "cancelled" or "deadline", or None."""
        if request.index in self._cancelled:
            return "cancelled"
        limit = request.params.deadline
        late = limit is not None and self.clock() - self._submitted[request.index] >= limit
        return "deadline" if late else None

    def next_prompts(self, running: bool) -> tuple[list[int], list[int], int]:
        """What is encoded next, in order of admission and at most `prefill_tokens` of it.

        Short prompts ride along with the first step of their sequence; if none is `running` and not
        all can, none does, so that they start together. Of the others the first encodes a chunk in
        a forward of its own, which further ones with a chunk of the same length share: no row is
        padded, and none depends on its neighbours.

        Returns:
            Slots whose prompts ride, slots that share a chunk, and the number of tokens that each
            of these encodes.
        """
        riders = list[int]()
        chunk = list[int]()
        size = 0
        room = self.prefill_tokens
        may_ride = running or sum(self.unfilled.values()) <= room
        for slot, left in self.unfilled.items():
            num = min(left, self.prefill_tokens)
            if num > room:
                break  # whoever came first goes first
            if may_ride and left <= self.riding_tokens:
                riders.append(slot)
            elif not chunk or num == size:
                chunk.append(slot)
                size = num
            else:
                continue
            room -= num
        return riders, chunk, size

    def filled(self, slot: int, num: int) -> None:
        """`num` more tokens of the slot's prompt are encoded."""
        self.unfilled[slot] -= num
        if not self.unfilled[slot]:
            del self.unfilled[slot]
