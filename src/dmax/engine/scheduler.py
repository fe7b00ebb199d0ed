"""Which request gets which slot, and whose prompt is encoded next: numbers only, never tensors."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dmax.engine.request import Request
from dmax.errors import InputError

SHORT_PROMPT = 4
"""Prompts of at most this many blocks are encoded along with the first step of their sequence.

Every block of a forward reads the keys and values of its sequence for itself, so longer prompts are
cheaper in a forward of their own.
"""

CANCELLED = -math.inf


@dataclass(slots=True)
class Scheduler:
    """First come, first served. A free slot is taken at once; prompts are encoded in chunks.

    Attributes:
        block_length: L.
        vocab_size: V.
        context: positions that the model was made for; None: any number.
        max_length: positions that a slot is planned for; None: as many as are asked for. They are
            rounded up to whole blocks.
        prefill_tokens: prompt tokens encoded between two steps, at most. They are rounded down to
            whole blocks, at least one.
        clock: seconds, for deadlines.
        num_slots, capacity: what there is now: slots, and positions of each.
        waiting: requests without a slot.
    """

    block_length: int
    vocab_size: int
    context: int | None
    max_length: int | None
    prefill_tokens: int
    clock: Callable[[], float]
    num_slots: int = 0
    capacity: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    _free: list[int] = field(default_factory=list)
    _ends_at: dict[int, float] = field(default_factory=dict)  # by number of the request

    def __post_init__(self) -> None:
        self.prefill_tokens = max(self.prefill_tokens // self.block_length, 1) * self.block_length
        if self.max_length is not None:
            self.max_length = self.whole_blocks(self.max_length)

    # --- what fits ---

    def whole_blocks(self, length: int) -> int:
        """`length` rounded up: blocks begin at absolute multiples of the block length."""
        return -(-length // self.block_length) * self.block_length

    def end(self, request: Request) -> int:
        """First position after the last block of a request."""
        return self.whole_blocks(len(request.prompt_ids) + request.params.max_new_tokens)

    def positions(self, request: Request) -> int:
        """Positions that a request takes in the cache, branches of its open block included."""
        return self.end(request) + (request.strategy.num_branches - 1) * self.block_length

    def check(self, request: Request) -> None:
        """Raises `InputError` for a request that can never fit."""
        if not request.prompt_ids:
            raise InputError(f"prompt {request.number} is empty", hint="give at least one token")
        if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
            raise InputError(
                f"prompt {request.number} holds a token id outside the vocabulary of "
                f"{self.vocab_size}"
            )
        for needed, who, room in (
            (self.end(request), "the model has", self.context),
            (self.positions(request), "the engine was planned for", self.max_length),
        ):
            if room is not None and needed > room:
                raise InputError(
                    f"prompt {request.number} has {len(request.prompt_ids)} tokens; with "
                    f"`max_new_tokens` {request.params.max_new_tokens} it needs {needed} "
                    f"positions, {who} {room}",
                    hint="shorten the prompt or lower `max_new_tokens` (on the command line "
                    "--max-new-tokens)",
                )

    # --- who has a slot ---

    def plan(self, num_slots: int, capacity: int) -> None:
        """Have this many slots, never fewer than before, with room for this many positions."""
        for slot in range(self.num_slots, num_slots):
            heapq.heappush(self._free, slot)
        self.num_slots = num_slots
        self.capacity = capacity

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue; its deadline runs from now on."""
        limit = request.params.deadline
        self._ends_at[request.index] = self.clock() + (math.inf if limit is None else limit)
        self.waiting.append(request)

    def admit(self) -> Iterator[tuple[int, Request]]:
        """Slots and the requests that get them now, the lowest free ones first.

        Slots that follow each other are read without a copy.
        """
        while self._free and self.waiting:
            yield heapq.heappop(self._free), self.waiting.popleft()

    def release(self, slot: int, request: Request) -> None:
        """The request is over and has left its slot."""
        heapq.heappush(self._free, slot)
        self._ends_at.pop(request.index, None)

    def drop(self, request: Request) -> None:
        """The request is over before it had a slot."""
        self.waiting.remove(request)
        self._ends_at.pop(request.index, None)

    def cancel(self, index: int) -> bool:
        """End a request before the next step; False if it is not here, or no longer."""
        is_here = index in self._ends_at
        if is_here:
            self._ends_at[index] = CANCELLED
        return is_here

    def ends_early(self, request: Request) -> Literal["cancelled", "deadline"] | None:
        """Why a request must end now, or None."""
        ends_at = self._ends_at[request.index]
        if ends_at == CANCELLED:
            return "cancelled"
        return "deadline" if self.clock() >= ends_at else None

    # --- whose prompt is next ---

    def next_prompts(
        self, unfilled: Mapping[int, int], is_running: bool
    ) -> tuple[list[int], list[int], int]:
        """What is encoded next, in order of admission and at most `prefill_tokens` of it.

        Short prompts are encoded along with the first step of their sequence. If no sequence is
        running yet and not all prompts fit into this step, none is, so that they start together.
        Of the others the first encodes a chunk in a forward of its own. Further ones share that
        forward if their chunk has the same length: no row is padded, none depends on its
        neighbours.

        Args:
            unfilled: by slot in order of admission, prompt tokens that are not encoded yet.
            is_running: whether a sequence has its whole prompt.

        Returns:
            Slots whose prompts join their first step, slots that share a forward, and the number
            of tokens that each of these encodes.
        """
        joining = []
        chunk: list[int] = []
        size = 0
        room = self.prefill_tokens
        longest_to_join = min(SHORT_PROMPT * self.block_length, room)
        may_join = is_running or sum(unfilled.values()) <= room
        for slot, left in unfilled.items():
            num = min(left, self.prefill_tokens)
            if num > room:
                break  # whoever came first goes first
            if may_join and left <= longest_to_join:
                joining.append(slot)
            elif not chunk or num == size:
                chunk.append(slot)
                size = num
            else:
                continue
            room -= num
        return joining, chunk, size
