"""HTTP/1.1 over one socket, for clients that must cost little and for those that misbehave.

    async with await connect(address) as connection:
        answer = await connection.ask("POST", "/v1/chat/completions", body)
        async for event in connection.events("/v1/chat/completions", body):
            ...

It knows what a server of ours sends (`Content-Length`, chunks, server-sent events) and nothing
else. The client of the speed rows shares two cores with the server it measures, so it does no work
that a measurement could do without.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

DONE = "[DONE]"
HANG = 120.0
"""Seconds without a byte after which a server counts as hung; far more than anything here takes."""


@contextlib.asynccontextmanager
async def in_time(what: str, seconds: float = HANG) -> AsyncIterator[None]:
    """Raise a `TimeoutError` that says what took longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimeoutError(f"{what} took more than {seconds:g} s") from None


class Broken(Exception):
    """The server closed the connection in the middle of an answer, or sent what is not HTTP."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and what opens it.

    Attributes:
        port: on 127.0.0.1.
        key: of its clients; None: it asks for none.
    """

    port: int
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Attributes:
        status: of HTTP.
        headers: by name in lower case.
        body: without the framing.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


class Connection:
    """A connection of one client, which asks for one thing after another."""

    def __init__(
        self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._address = address
        self._reader = reader
        self._writer = writer

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """The whole answer to a request.

        Raises:
            Broken: there is none, or half of one.
            TimeoutError: nothing came for `HANG` seconds.
        """
        await self.send(method, path, body, headers)
        status, found = await self.head()
        parts = [part async for part in self._parts(found)]
        return Answer(status, found, b"".join(parts))

    async def events(self, path: str, body: bytes) -> AsyncIterator[Any]:
        """Server-sent events, read as JSON; the last one is `DONE` if the server says so.

        Raises:
            Refused: the answer is not a stream.
            Broken: the stream ended in the middle of an event.
            TimeoutError: nothing came for `HANG` seconds.
        """
        await self.send("POST", path, body)
        status, headers = await self.head()
        if not headers.get("content-type", "").startswith("text/event-stream"):
            parts = [part async for part in self._parts(headers)]
            raise Refused(Answer(status, headers, b"".join(parts)))
        rest = b""
        async for part in self._parts(headers):
            *whole, rest = (rest + part).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: "):
                    data = event[6:]
                    yield DONE if data == b"[DONE]" else json.loads(data)
        if rest:
            raise Broken(f"the stream ended within {rest[:80]!r}")

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a request, and read nothing yet."""
        fields = {"Host": f"127.0.0.1:{self._address.port}"}
        if body is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if self._address.key is not None:
            fields["Authorization"] = f"Bearer {self._address.key}"
        lines = [f"{method} {path} HTTP/1.1", *_lines(fields | dict(headers or {}))]
        await self.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))

    async def write(self, data: bytes) -> None:
        """Send bytes as they are.

        Raises:
            Broken: the server takes no more of them.
        """
        try:
            self._writer.write(data)
            async with in_time("sending"):
                await self._writer.drain()
        except ConnectionError as error:
            raise Broken(f"the server stopped reading: {error}") from None

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer.

        Raises:
            Broken: the connection ended before them.
        """
        status = int((await self._line()).split(b" ", 2)[1])
        headers = {}
        while line := await self._line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    async def _parts(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body of an answer, as it comes."""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await self._line(), 16):
                yield await self._exactly(size)
                await self._line()
            await self._line()
        elif length := int(headers.get("content-length", 0)):
            yield await self._exactly(length)

    async def _line(self) -> bytes:
        try:
            async with in_time("the next line of an answer"):
                line = await self._reader.readuntil(b"\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Broken(f"the connection ended early: {error}") from None
        return line[:-2]

    async def _exactly(self, size: int) -> bytes:
        try:
            async with in_time("the rest of a part of an answer"):
                return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Broken(f"the connection ended early: {error}") from None

    async def close(self) -> None:
        """Close it, whatever is on its way."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Drop it as a client does that is killed."""
        self._writer.transport.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Refused(Exception):
    """A whole answer came where a stream was asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status}: {answer.body[:200]!r}")
        self.answer = answer


async def connect(address: Address) -> Connection:
    """A new connection."""
    async with in_time("connecting"):
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port, limit=2**20)
    return Connection(address, reader, writer)


async def ask(
    address: Address,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request over a connection of its own."""
    async with await connect(address) as connection:
        return await connection.ask(method, path, body, headers)


def _lines(fields: Mapping[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in fields.items()]
