"""A server with a small API in place of ours, in this process or, as a script, in one of its own.

Run as a script, it takes one JSON argument: fields of `ServerOptions`, beside `port`, `load`, …
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from starlette.types import Receive, Scope, Send

from dmax.errors import InputError
from dmax.serve.errors import ApiError
from dmax.serve.guard import protect
from dmax.serve.log import Record
from dmax.serve.metrics import Metrics
from dmax.serve.run import Server, bind, configure, leave, run
from dmax.serve.settings import ServerOptions


class ToyModel:
    """Loads as it is told to: "at once", "never", or with an error."""

    def __init__(self, name: str = "toy", load: str = "at once") -> None:
        self.name = name
        self.is_ready = False
        self.is_closed = False
        self.error: ApiError | None = None
        self.has_ended = asyncio.Event()
        self._load = load

    def load(self) -> None:
        if self._load == "never":
            threading.Event().wait()
        if self._load == "bad input":
            raise InputError("there is no model `toy`", hint="choose another one")
        if self._load == "bug":
            raise RuntimeError("a bug")
        self.is_ready = True

    def end_all(self, error: ApiError) -> None:
        self.error = error
        self.has_ended.set()

    def close(self) -> None:
        if self._load == "closes never":
            threading.Event().wait()
        self.is_closed = True


class ToyApi:
    """Routes that end when a test wants them to."""

    def __init__(self, model: ToyModel) -> None:
        self.model = model
        self.metrics: Metrics | None = None
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].rpartition("/")[2] or "page"
        await getattr(self, name)(scope, receive, send)

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, 200, b"a page")

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, 200 if self.model.is_ready else 503, b"")

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        self.bodies.append(body)
        scope["state"]["record"].model = "toy"
        await answer(send, 200, body)

    async def fail(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("the prompt was: my secret")

    async def fail_late(self, scope: Scope, receive: Receive, send: Send) -> None:
        await begin(send)
        raise ValueError("the prompt was: my secret")

    async def told(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends when somebody writes a line on stdin."""
        await begin(send)
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await end(send, await reader.readline())

    async def heeds(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends when its model ends all requests."""
        await begin(send)
        await self.model.has_ended.wait()
        assert self.model.error is not None
        await end(send, json.dumps(self.model.error.body()).encode())

    async def ignores(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Never ends."""
        say("ignoring")
        await asyncio.Event().wait()

    async def large(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, 200, bytes(2**25))


def say(what: object) -> None:
    """Tell whoever has started this script."""
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


async def answer(send: Send, status: int, body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length]})
    await end(send, body)


async def begin(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun\n", "more_body": True})


async def end(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body})


class Served:
    """A server in a thread of this process.

    Attributes:
        port: where it listens.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.model = ToyModel()
        self.api = ToyApi(self.model)
        self._records: Queue[Record] = Queue()
        self.metrics = Metrics({})
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        guarded = protect(
            self.api, options, "127.0.0.1", lambda record, *_: self._records.put(record)
        )
        config = configure(guarded, options, self.metrics)
        self.server = Server(config, [self.model], 0.0, lambda: None)

    def connect(self) -> socket.socket:
        """A connection; reading from one that the server leaves open fails after a while."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def record(self, **expected: Any) -> Record:
        """The record of the next request with these attributes that ends; waits for it."""
        while True:
            record = self._records.get(timeout=120)
            if all(getattr(record, name) == value for name, value in expected.items()):
                return record

    def ask(self, request: bytes) -> Answer:
        """What the server sends until it closes the connection, or the first answer is whole."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_answer(connection)


class Answer:
    """A response as it came over the wire.

    Attributes:
        status: of it; None: there was none.
        headers: in small letters.
        body: without the framing of chunks being undone.
    """

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1]) if first else None
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}

    @property
    def code(self) -> Any:
        return json.loads(self.body)["error"]["code"]

    @property
    def is_whole(self) -> bool:
        return len(self.body) >= int(self.headers.get("content-length", sys.maxsize))


def read_answer(connection: socket.socket) -> Answer:
    data = b""
    while not (b"\r\n\r\n" in data and Answer(data).is_whole):
        more = connection.recv(2**16)
        if not more:
            break
        data += more
    return Answer(data)


@contextmanager
def serving(**options: Any) -> Iterator[Served]:
    """A server with these options, while the context lasts."""
    served = Served(ServerOptions(**options))
    thread = threading.Thread(target=served.server.run, args=([served.listener],))
    thread.start()
    try:
        yield served
    finally:
        served.server.should_exit = True
        thread.join()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def script(port: int = 0, load: str = "at once", log_file: str | None = None, **given: Any) -> None:
    """Serve as `dmax serve` does, and say on stdout when it is ready."""
    logging.basicConfig(level=logging.CRITICAL)
    model = ToyModel(load=load)
    api = ToyApi(model)
    listener = bind("127.0.0.1", port)
    say(listener.getsockname()[1])
    run(
        api,
        [model],
        ServerOptions(**given),
        listener,
        Metrics({}),
        log_file=None if log_file is None else Path(log_file),
        log_json=True,
        tell=lambda text: say("ready"),
    )
    leave()


if __name__ == "__main__":
    script(**json.loads(sys.argv[1]))
