"""Which request gets which slot, and whose prompt is encoded next: numbers only, never tensors."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Literal

from dmax.engine.request import Request
from dmax.errors import InputError

SHORT_PROMPT = 4
"""Prompts of at most this many blocks are encoded along with the first step of their sequence.

Every block of a forward reads the keys and values of its sequence for itself, so longer prompts are
cheaper in a forward of their own.
"""

CANCELLED = -math.inf


class Scheduler:
    """First come, first served. A free slot is taken at once; prompts are encoded in chunks.

    Args:
        block_length: L.
        vocab_size: V.
        context: positions that the model was made for; None: any number.
        max_length: positions that a slot is planned for; None: as many as are asked for.
        prefill_tokens: prompt tokens encoded between two steps, at most.
        clock: seconds, for deadlines.

    Attributes:
        waiting: requests without a slot.
        unfilled: by slot in order of admission, prompt tokens that are not encoded yet.
    """

    def __init__(
        self,
        block_length: int,
        vocab_size: int,
        context: int | None,
        max_length: int | None,
        prefill_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self.block_length = block_length
        self.vocab_size = vocab_size
        self.context = context
        self.max_length = max_length
        self.prefill_tokens = max(prefill_tokens // block_length, 1) * block_length
        self.clock = clock
        self.num_slots = 0
        self.waiting: deque[Request] = deque()
        self.unfilled: dict[int, int] = {}
        self._free: list[int] = []
        self._ends_at: dict[int, float] = {}  # by number of the request, its deadline

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
            raise InputError(f"prompt {request.index} is empty", hint="give at least one token")
        if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
            raise InputError(
                f"prompt {request.index} holds a token id outside the vocabulary of "
                f"{self.vocab_size}"
            )
        if self.context is not None:
            self._check_room(request, self.end(request), "the model has", self.context)
        if self.max_length is not None:
            room = self.whole_blocks(self.max_length)
            self._check_room(request, self.positions(request), "the engine was planned for", room)

    def _check_room(self, request: Request, needed: int, who: str, room: int) -> None:
        if needed > room:
            raise InputError(
                f"prompt {request.index} has {len(request.prompt_ids)} tokens; with "
                f"`max_new_tokens` {request.params.max_new_tokens} it needs {needed} positions, "
                f"{who} {room}",
                hint="shorten the prompt or lower `max_new_tokens` (on the command line "
                "--max-new-tokens)",
            )

    # --- who has a slot ---

    def plan(self, num_slots: int) -> None:
        """Have this many slots, all of them free."""
        self.num_slots = num_slots
        self._free = list(range(num_slots))

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue; its deadline runs from now on."""
        limit = request.params.deadline
        self._ends_at[request.index] = self.clock() + (math.inf if limit is None else limit)
        self.waiting.append(request)

    def admit(self) -> list[tuple[int, Request]]:
        """Requests that get a slot now, the lowest free ones first.

        Slots that follow each other are read without a copy.
        """
        num = min(len(self._free), len(self.waiting))
        return [(heapq.heappop(self._free), self.waiting.popleft()) for _ in range(num)]

    def release(self, slot: int, request: Request) -> None:
        """The request is over and has left its slot."""
        heapq.heappush(self._free, slot)
        self.unfilled.pop(slot, None)
        self.forget(request)

    def forget(self, request: Request) -> None:
        """The request is over."""
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

    def next_prompts(self, is_running: bool) -> tuple[list[int], list[int], int]:
        """What is encoded next, in order of admission and at most `prefill_tokens` of it.

        Short prompts are encoded along with the first step of their sequence. If no sequence is
        running yet and not all prompts fit into this step, none is, so that they start together.
        Of the others the first encodes a chunk in a forward of its own. Further ones share that
        forward if their chunk has the same length: no row is padded, none depends on its
        neighbours.

        Returns:
            Slots whose prompts join their first step, slots that share a forward, and the number
            of tokens that each of these encodes.
        """
        joining: list[int] = []
        chunk: list[int] = []
        size = 0
        room = self.prefill_tokens
        longest_to_join = min(SHORT_PROMPT * self.block_length, room)
        may_join = is_running or sum(self.unfilled.values()) <= room
        for slot, left in self.unfilled.items():
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

    def has_last_chunks(self) -> bool:
        """Whether the next chunk of some prompt is its last one."""
        return any(left <= self.prefill_tokens for left in self.unfilled.values())

    def filled(self, slot: int, num: int) -> None:
        """`num` more tokens of the slot's prompt are encoded."""
        self.unfilled[slot] -= num
        if not self.unfilled[slot]:
            del self.unfilled[slot]
