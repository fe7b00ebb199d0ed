"""HTTP as uvicorn speaks it, but no client holds a connection without using it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmax.serve.errors import ApiError

STALL_SECONDS = 60.0  # in which a client takes nothing of what waits for it
RETRY_SECONDS = 5
FINISHED = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)


class Clock:
    """Calls a function after some seconds, unless it is stopped before.

    Args:
        loop: that calls it.
        seconds: from the start on.
        then: what is called.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], object]
    ) -> None:
        self._start = partial(loop.call_later, seconds, then)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; a clock that runs is not set back."""
        if self._timer is None:
            self._timer = self._start()

    def stop(self) -> None:
        """Call nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class BoundedProtocol(H11Protocol):
    """One connection, which a client has to make use of.

    uvicorn waits for ever for headers, for bodies that nobody reads any more, and for clients that
    do not read.

    Args:
        header_seconds: for headers, and for the rest of a body after the response.
        max_connections: open at once. One more takes the place of the one that has been idle for
            longest; where none is idle, its request is answered with 503.
        on_refused: told of each connection that is refused.
        arguments: of uvicorn's protocol.
    """

    def __init__(
        self,
        *,
        header_seconds: float,
        max_connections: int,
        on_refused: Callable[[], None],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._header_seconds = header_seconds
        self._max_connections = max_connections
        self._on_refused = on_refused
        self._idle_since = 0.0
        self._waiting = Clock(self.loop, header_seconds, self._give_up)
        self._stalled = Clock(self.loop, STALL_SECONDS, lambda: self.transport.abort())

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(cast(Any, transport))
        _limit_unread(transport.get_extra_info("socket"))
        self._idle_since = self.loop.time()
        self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._waiting.stop()
        self._stalled.stop()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._stalled.start()

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        super().resume_writing()
        self._stalled.stop()

    # --- what uvicorn calls ---

    def on_response_complete(self) -> None:
        """Go on to the next request, if there is one."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._end(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    # --- ours ---

    def _make_room(self) -> None:
        """Let this connection take the place of an idle one, if there are too many, or refuse it.

        So clients that do not send their headers keep nobody out.
        """
        if len(self.connections) <= self._max_connections:
            return
        everyone = cast("set[BoundedProtocol]", self.connections)
        current = [each for each in everyone if not each.transport.is_closing()]
        num_too_many = max(len(current) - self._max_connections, 0)
        idle = [each for each in current if each.conn.their_state is h11.IDLE and each is not self]
        for each in sorted(idle, key=lambda each: each._idle_since)[:num_too_many]:
            each.transport.close()
        if num_too_many > len(idle):
            self._on_refused()
            self.app = cast(Any, _too_many_connections)

    def _watch(self) -> None:
        """Let the clock run while the client owes us something."""
        if self._is_owed():
            self._waiting.start()
        else:
            self._waiting.stop()

    def _is_owed(self) -> bool:
        """Whether the rest of some headers has to come, or of a body that has its answer."""
        theirs = self.conn.their_state
        is_late = theirs is h11.SEND_BODY and self.conn.our_state in FINISHED
        return theirs is h11.IDLE or is_late

    def _give_up(self) -> None:
        """Close; a client that has sent a part of its headers is told why."""
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"the headers did not come within {self._header_seconds:g} seconds"
            self._end(ApiError(408, message, code="headers_too_slow"))
        else:
            self.transport.close()

    def _end(self, error: ApiError) -> None:
        """Answer in place of the API, if nothing else was answered, and close."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the API has to say can no longer be sent
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error.response()
            start = h11.Response(
                status_code=error.status,
                headers=[*response.raw_headers, (b"connection", b"close")],
                reason=HTTPStatus(error.status).phrase.encode(),
            )
            for event in (start, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _limit_unread(connection: socket.socket) -> None:
    """Have the system end a connection whose client does not take what was sent to it.

    It knows what is left in its buffers, and goes on when the connection is closed here.
    """
    milliseconds = round(STALL_SECONDS * 1000)
    with suppress(AttributeError, OSError):  # not every system can
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    """The API of a connection beyond the limit."""
    error = ApiError(
        503,
        "too many connections are open; close some, or try again later",
        code="too_many_connections",
        retry_after=RETRY_SECONDS,
    )
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
