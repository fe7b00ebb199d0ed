"""Events on their way from the thread of a model into the event loop, without a thread a request.

The thread of the model leaves events in the mailboxes of their requests and rings a bell. The loop
wakes up once for all that has come, usually for a whole step of the model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from dmax.outputs import StreamEvent
from dmax.serve.errors import slow_reader

EVENT_BYTES = 256
POSITION_BYTES = 64


class Bell:
    """Wakes the event loop for the mailboxes that something has come for.

    Args:
        loop: the running one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mailboxes: deque[Mailbox] = deque()
        self._is_ringing = False

    def ring(self, mailbox: Mailbox) -> None:
        """Have a mailbox looked at; any thread may call it.

        What is appended while the bell rings is seen: the loop stops the bell before it looks.
        """
        self._mailboxes.append(mailbox)
        if not self._is_ringing:
            self._is_ringing = True
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_ringing = False
        while self._mailboxes:
            self._mailboxes.popleft().wake()


class Mailbox:
    """The events of one call that its reader has not taken yet.

    Args:
        bell: of the loop that reads.
        limit: bytes of events that may wait. With more the call ends: a reader that never keeps up
            must not fill the memory.

    Attributes:
        cancel: ends the call.
    """

    def __init__(self, bell: Bell, limit: float) -> None:
        self.cancel: Callable[[], None] = lambda: None
        self._bell = bell
        self._limit = limit
        self._events: deque[StreamEvent] = deque()
        self._num_put = 0  # bytes; the thread of the model counts them
        self._num_taken = 0  # bytes; the loop counts them
        self._end: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: StreamEvent | BaseException) -> None:
        """Take an event, or what ends the call; any thread may call it."""
        if self._end is not None:
            return
        if isinstance(event, BaseException):
            self._end = event
        else:
            self._num_put += size(event)
            self._events.append(event)
            if self._num_put - self._num_taken > self._limit:
                self._end = slow_reader()
                self.cancel()
        self._bell.ring(self)

    def wake(self) -> None:
        """Have the reader look; the loop calls it."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[StreamEvent]:
        """All events that have come, in order; waits for one.

        Raises:
            BaseException: what ended the call.
        """
        while not self._events:
            if self._end is not None:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events = [self._events.popleft() for _ in range(len(self._events))]
        self._num_taken += sum(map(size, events))
        return events


def size(event: StreamEvent) -> int:
    """About how many bytes an event takes, here or as JSON."""
    num_candidates = sum(map(len, event.candidates))
    return EVENT_BYTES + POSITION_BYTES * (len(event.token_ids) + num_candidates)
