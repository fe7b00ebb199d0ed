"""What stands between the network and the API, as ASGI middleware.

From the outside in: every request gets a record, an answer whatever happens, and a line in the log;
it must address this server, and come from a page that may call it; it must carry a key; its body
must be small, come in time, and be JSON.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmax.serve.checks import Origins, bearer, check_json, needs_key
from dmax.serve.errors import ApiError
from dmax.serve.keys import Keys
from dmax.serve.log import Record
from dmax.serve.settings import ServerOptions

LINGER_SECONDS = 2.0  # for a client to stop sending what is too large


def protect(
    app: ASGIApp,
    options: ServerOptions,
    address: str,
    on_end: Callable[[Record, str, float], None] = lambda record, route, seconds: None,
) -> ASGIApp:
    """An API behind everything that a request must pass.

    Args:
        app: the API.
        options: what is permitted.
        address: that the server listens on.
        on_end: told of every request that has ended: its record, the pattern of its path ("" for
            an unknown one), and seconds.
    """
    guarded: ASGIApp = Bodies(app, options)
    guarded = Locked(guarded, Keys(options.api_keys))
    if options.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients of OpenAI send some of their own
            expose_headers=("Retry-After", "X-Request-Id"),
        )
    origins = Origins(address, options.allowed_hosts, options.cors_origins)
    return Recorded(Addressed(guarded, origins), on_end)


class Recorded:
    """Keeps a record of each request, and answers those that nobody else has answered.

    Handlers find the record in `scope["state"]["record"]` and add to it what they know.

    Args:
        app: what the request goes to.
        on_end: as in `protect`.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[Record, str, float], None]) -> None:
        self.app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = scope.get("client") or ("",)
        record = Record(method=scope["method"], path=scope["path"], client=client[0])
        scope.setdefault("state", {})["record"] = record

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                name = (b"x-request-id", record.request_id.encode())
                message["headers"] = [*message.get("headers", ()), name]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                record.is_complete = True

        try:
            await self.app(scope, receive, send_recorded)
        except asyncio.CancelledError:  # the server ends and has waited long enough
            record.outcome = "stopped"
            error = ApiError(503, "the server is shutting down", code="shutting_down")
            await _answer(error, scope, receive, send_recorded)
        # The boundary: what was not foreseen is an answer and a line in the log, never a trace.
        except Exception as error:
            record.outcome = "failed"
            record.fail(record.code or "internal_error", error)
            failure = ApiError(500, "the server failed; its log says why", code="internal_error")
            await _answer(failure, scope, receive, send_recorded)
        finally:
            route = getattr(scope.get("route"), "path", "")
            self._on_end(record, route, time.monotonic() - record.began)


class Addressed:
    """Turns away requests for other hosts and from pages of others.

    Args:
        app: what the request goes to.
        origins: which may pass.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self.app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http":
            hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
            try:
                self._origins.check(_texts(hosts), _texts(origins))
            except ApiError as error:
                await _answer(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


class Locked:
    """Turns away requests without a key.

    Args:
        app: what the request goes to.
        keys: any of which opens; without one, all requests pass.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        is_closed = len(self._keys) and scope["type"] == "http"
        if is_closed and needs_key(scope["method"], scope["path"]):
            key = bearer(_headers(scope, b"authorization"))
            if not self._keys.admit(key or b""):
                what = "this server needs a key" if key is None else "the key is wrong"
                error = ApiError(
                    401,
                    f"{what}; send one as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                )
                await _answer(error, scope, receive, send, {"WWW-Authenticate": "Bearer"})
                return
        await self.app(scope, receive, send)


class Bodies:
    """Reads the body of a request before its handler begins, and turns away what nobody could use.

    Args:
        app: what the request goes to.
        options: with the limits.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:  # the client has gone
                return
            if body:
                check_json(body, self._options.max_json_depth)
        except ApiError as error:
            headers = {"Connection": "close"} if error.status in (408, 413) else {}
            linger = LINGER_SECONDS if error.status == 413 else 0.0
            await _answer(error, scope, receive, send, headers, linger)
            return
        await self.app(scope, _replaying(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, whatever its length was said to be; None if the client has gone.

        Raises:
            ApiError: it is too large, or does not come in time.
        """
        limit, seconds = self._options.max_body_bytes, self._options.body_seconds
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        claimed = _headers(scope, b"content-length")
        if claimed and int(claimed[0]) > limit:
            raise too_large
        body = bytearray()
        is_whole = False
        try:
            async with asyncio.timeout(seconds):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    is_whole = not message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {seconds:g} seconds", code="body_too_slow"
            ) from None
        return bytes(body)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read already, and then what comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _answer(
    error: ApiError,
    scope: Scope,
    receive: Receive,
    send: Send,
    headers: dict[str, str] | None = None,
    linger: float = 0.0,
) -> None:
    """Send an error body, unless a response has begun.

    With `linger`, what the client still sends is read and dropped for so many seconds. A connection
    that is closed before would be reset, and the client would not see the answer.
    """
    record = scope.get("state", {}).get("record")
    if record is not None:
        record.code = record.code or error.code
        if record.status is not None:
            return
    response = error.response()
    response.headers.update(headers or {})

    async def send_and_linger(message: Message) -> None:
        if linger and message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(linger):
                    while (await receive()).get("more_body"):
                        pass
            message = {**message, "body": b""}
        await send(message)

    await response(scope, receive, send_and_linger)


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for each, value in scope["headers"] if each == name]


def _texts(values: list[bytes]) -> list[str]:
    return [value.decode("latin-1") for value in values]
