"""A server from its first breath to its last: bind, load, serve, finish what was begun, end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, cast

import uvicorn
from starlette.types import ASGIApp

from dmax.errors import InputError, show
from dmax.serve.errors import ApiError
from dmax.serve.guard import protect
from dmax.serve.log import Journal, Record, as_json, as_text, fields_of
from dmax.serve.memory import give_back_freed_memory
from dmax.serve.metrics import Metrics
from dmax.serve.protocol import BoundedProtocol
from dmax.serve.settings import ServerOptions

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEEP_ALIVE_SECONDS = 75  # longer than proxies and clients keep an idle connection themselves
BACKLOG = 512  # connections that wait to be accepted; as many are, before others get their turn
OTHER_FILES = 128  # that a process has open beside its connections
LAST_SECOND = 1.0  # of the time to end in, for errors to those who did not finish
QUESTION = (
    "Jack starts the week with 8 mugs. Later Jack hands 2 mugs to a teacher. Jack throws away "
    "4 broken mugs. A friend gives Jack 5 more mugs. Jack wins 6 mugs in a game. Jack receives "
    "4 mugs as a present. How many mugs does Jack end up with?"
)


class Model(Protocol):
    """What a server does to a model; requests are the API's matter."""

    name: str

    def load(self) -> None:
        """Get ready for requests; may take minutes."""

    def end_all(self, error: ApiError) -> None:
        """Give every request in progress an error."""

    def close(self) -> None:
        """Free what it holds; may wait for a forward."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; callers wait in its queue until somebody accepts them.

    Args:
        host: name or address.
        port: 0: any that is free.

    Raises:
        InputError: the port is taken or not ours to take, or this machine has no such address.
    """
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            # What is left of a server that was killed does not hold the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except (OSError, UnicodeError) as error:
            raise _unbound(host, port, error) from None
        stack.pop_all()  # it stays open
    return listener


def _unbound(host: str, port: int, error: Exception) -> InputError:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            message = f"port {port} is in use"
            return InputError(message, hint="end the other server, or choose another --port")
        case errno.EACCES:
            message = f"port {port} may not be used by this user"
            return InputError(message, hint="choose a --port from 1024 on")
        case _:
            message = f"this machine has no address {show(host)}"
            return InputError(message, hint="127.0.0.1 serves this machine, 0.0.0.0 all networks")


def url_of(listener: socket.socket) -> str:
    """The address of a server for this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def greeting(url: str, names: Sequence[str], *, has_keys: bool) -> str:
    """What a server says when it is ready: where it is, and a command to try."""
    body = {"model": names[0], "messages": [{"role": "user", "content": QUESTION}]}
    key = '-H "Authorization: Bearer $DMAX_API_KEY" ' if has_keys else ""
    return (
        f"serving {', '.join(names)}\n"
        f"playground  {url}/\n"
        f"API         {url}/v1\n"
        f"try         curl {url}/v1/chat/completions {key}"
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}\n"
    )


class Server(uvicorn.Server):
    """uvicorn's server, which loads models when it is up, and ends cleanly in time.

    Args:
        config: of uvicorn.
        models: that are loaded, in this order.
        seconds: between the first signal and the end, at most.
        on_ready: called once all models are loaded.

    Attributes:
        failure: what kept a model from being loaded.
        ends_at: `time.monotonic()` at which all must be over, once a signal has come.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        models: Sequence[Model],
        seconds: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.failure: BaseException | None = None
        self.ends_at: float | None = None
        self._models = models
        self._seconds = seconds
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and to load."""
        await super().startup(sockets)
        threading.Thread(target=self._load, name="dmax loader", daemon=True).start()
        self._trimming = asyncio.create_task(give_back_freed_memory())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for those in progress."""
        ending = asyncio.create_task(self._end_requests())
        idle = asyncio.create_task(self._close_idle())
        await super().shutdown(sockets)
        for task in (ending, idle, self._trimming):
            task.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals; unlike uvicorn's own, none is raised again after a clean end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in time; at the second signal, at once."""
        if self.ends_at is not None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.ends_at = time.monotonic() + self._seconds
        self.should_exit = True

    def _load(self) -> None:
        try:
            for model in self._models:
                model.load()
        except BaseException as error:  # whatever it is: `run` raises it where it is heard
            self.failure = error
            self.should_exit = True
        else:
            if not self.should_exit:
                self._on_ready()

    async def _close_idle(self) -> None:
        """Close connections without a request: uvicorn does so once, and misses the latest."""
        while True:
            await asyncio.sleep(0.1)
            for connection in list(self.server_state.connections):
                if not connection.transport.is_closing():
                    connection.shutdown()

    async def _end_requests(self) -> None:
        """Give those who do not finish in time an error, while it can still be sent."""
        await asyncio.sleep(self._seconds - _margin(self._seconds))
        for model in self._models:
            model.end_all(ApiError(503, "the server is shutting down", code="shutting_down"))


def _margin(seconds: float) -> float:
    """The part of the time to end in that requests do not get."""
    return min(LAST_SECOND, seconds / 2)


def run(
    app: ASGIApp,
    models: Sequence[Model],
    options: ServerOptions,
    listener: socket.socket,
    metrics: Metrics,
    *,
    log_file: Path | None = None,
    log_json: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve until a signal comes.

    Args:
        app: answers requests, also while models are being loaded.
        models: those that it answers with.
        options: what is permitted.
        listener: as `bind` makes it.
        metrics: that requests are counted in.
        log_file: the log is added to it; None: it goes to stderr.
        log_json: whether its lines are for programs.
        tell: given the greeting, once all models are ready.

    Raises:
        InputError: the log cannot be opened, or a model cannot be loaded; of a bug, its error.
    """
    journal = Journal(log_file, metrics.lost_log_lines.inc)
    form = as_json if log_json else as_text

    def note(record: Record, route: str, seconds: float) -> None:
        metrics.count(record, route, seconds)
        journal.write(form(fields_of(record, datetime.now(UTC), seconds)))

    url, names = url_of(listener), [model.name for model in models]
    hello = greeting(url, names, has_keys=bool(options.api_keys))
    guarded = protect(app, options, listener.getsockname()[0], note)
    config = configure(guarded, options, metrics)
    server = Server(config, models, options.shutdown_seconds, lambda: tell(hello))
    _allow_files(options.max_connections + OTHER_FILES)
    server.run(sockets=[listener])
    _close(models, server.ends_at)
    journal.close()
    if server.failure is not None:
        raise server.failure


def configure(app: ASGIApp, options: ServerOptions, metrics: Metrics) -> uvicorn.Config:
    """What uvicorn has to know."""
    protocol = partial(
        BoundedProtocol,
        header_seconds=options.header_seconds,
        max_connections=options.max_connections,
        on_refused=metrics.refused_connections.inc,
    )
    seconds = options.shutdown_seconds
    return uvicorn.Config(
        cast(Any, app),
        http=cast(Any, protocol),
        ws="none",
        lifespan="off",
        interface="asgi3",
        backlog=BACKLOG,
        workers=1,  # whatever WEB_CONCURRENCY says
        log_config=None,
        log_level=logging.CRITICAL,  # requests have their own log, and errors are in it
        access_log=False,
        proxy_headers=False,  # anybody may write them
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=cast(Any, seconds - _margin(seconds) / 2),
    )


def _allow_files(num: int) -> None:
    """Have the system permit so many open files, or as many as it ever would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num if hard == resource.RLIM_INFINITY else min(num, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _close(models: Sequence[Model], ends_at: float | None) -> None:
    """End the models, for as long as there is time."""

    def close() -> None:
        for model in models:
            model.close()

    closer = threading.Thread(target=close, name="dmax closer", daemon=True)
    closer.start()
    left = LAST_SECOND if ends_at is None else ends_at - time.monotonic()
    closer.join(max(left, 0))


def leave() -> NoReturn:
    """End the process at once with code 0, after `run`.

    The interpreter's own end takes torch apart, for seconds, and threads that still load or decode
    may crash meanwhile.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it is closed, or nobody reads it
            stream.flush()
    os._exit(0)
