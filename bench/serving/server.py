"""A server to try, in a process of its own: how it starts, what it holds, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.client import Address, Answer, Broken, ask, in_time

MODEL = "tiny-dmax"
STARTS = 300.0
"""Seconds that a server may take until it is warm, on a machine with other work."""
BENCH = Path(__file__).parents[1]


class Ended(Exception):
    """The server ended before it was ready."""


@dataclass
class Server:
    """A running server.

    Attributes:
        address: where it listens.
        process: its own.
        log: what it writes.
    """

    address: Address
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def resident_mib(self) -> float:
        """Memory in use, by Linux's own count."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    @property
    def num_files(self) -> int:
        """Open files, sockets included."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def num_threads(self) -> int:
        """Threads."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def said(self) -> str:
        """What it has written."""
        return self.log.read_text("utf-8", "replace") if self.log.is_file() else ""

    async def is_ready(self) -> bool:
        """Whether it says that it takes requests."""
        try:
            return (await ask(self.address, "GET", "/health")).status == 200
        except (OSError, Broken):
            return False

    async def metrics(self) -> dict[str, float]:
        """Its metrics, samples of one name added up over their labels."""
        answer = await ask(self.address, "GET", "/metrics")
        totals: dict[str, float] = {}
        for line in answer.body.decode().splitlines():
            if line and not line.startswith("#"):
                series, value = line.rsplit(" ", 1)
                name = series.partition("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    async def idle(self) -> dict[str, float]:
        """Its metrics, once nothing runs and nothing waits any more.

        Raises:
            TimeoutError: something is never given back.
        """
        async with in_time("giving back all slots", 60):
            while True:
                found = await self.metrics()
                if not found[RUNNING] and not found[WAITING]:
                    return found
                await asyncio.sleep(0.05)

    def end(self, kind: signal.Signals = signal.SIGTERM, within: float = 60.0) -> int:
        """Its exit code after a signal.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self.process.send_signal(kind)
        return self.process.wait(within)


RUNNING = "dmax:requests_running"
WAITING = "dmax:requests_waiting"


async def settles(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold within a minute."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.05)
    return holds()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def serving(
    *options: str,
    program: Sequence[str] = ("-m", "dmax", "serve"),
    model: str = MODEL,
    key: str | None = None,
    port: int | None = None,
    variables: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> AsyncIterator[Server]:
    """A server that is warm; ends with the block, whatever state it is in.

    Args:
        options: of `dmax serve`.
        program: what Python runs; it takes the same options.
        model: that is served.
        key: that opens it.
        port: to listen on; None: one that is free.
        variables: of its environment, over those of this process.
        log: file that takes what it writes; None: a temporary one.
    """
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        written = log or Path(folder, "server.log")
        with written.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *program, "--model", model, "--port", str(port), *options],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(variables or {}),
            )
        server = Server(Address(port, key), process, log or written)
        try:
            await _until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


async def _until_ready(server: Server) -> None:
    ends = time.monotonic() + STARTS
    while not await server.is_ready():
        if server.process.poll() is not None or time.monotonic() > ends:
            raise Ended(f"the server did not start: {server.said[-2000:]}")
        await asyncio.sleep(0.1)


async def complete(server: Server, body: bytes, path: str = "/v1/chat/completions") -> Answer:
    """The whole answer to a request, over a connection of its own."""
    return await ask(server.address, "POST", path, body)
