"""How a server ends: told to under load, and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from dmax.llm import LLM
from dmax.outputs import GenerationOutput
from serving.cases import CHAT, Case, alone, faults_of_stream, plain_cases
from serving.client import Broken, Refused, connect
from serving.faults import is_clean_error
from serving.load import SHOWN
from serving.row import Result, Sizes
from serving.server import MODEL, Server, serving

DEADLINE = 2.0
"""Seconds that the server gives requests in progress once it is told to end."""
MARGIN = 10.0
"""Seconds beside them until the process has gone, on a machine with other work."""


async def endings(sizes: Sizes) -> Result:
    """SIGTERM ends requests cleanly and the process with 0; after kill -9 a new one starts."""
    cases = plain_cases(2 * sizes.at_once, sizes.seed)
    expected = alone(LLM(MODEL, dtype="float32", device="cpu"), cases)
    result = Result()
    with TemporaryDirectory() as folder:
        temporary = {"TMPDIR": folder}
        options = ("--dtype", "float32", "--shutdown-timeout", f"{DEADLINE:g}")
        async with serving(*options, variables=temporary) as server:
            outcomes, code, seconds = await _told_to_end(server, cases, expected, result)
            port = server.address.port
            result.must(_is_free(port), "the port is still taken after SIGTERM")
        async with serving(*options, port=port, variables=temporary) as server:
            killed = await _killed(server, cases)
            result.must(_is_free(port), "the port is still taken after kill -9")
        async with serving(*options, port=port, variables=temporary) as server:
            after = await _events(server, cases[0])
            wrong = faults_of_stream(after, expected[0])
            result.must(not wrong, f"after the restart: {wrong}")
            result.must(server.end() == 0, "the restarted server does not end with 0")
        left = sorted(os.listdir(folder))
        result.must(not left, f"files are left behind: {left[:5]}")
    result.faults[SHOWN:] = []
    result.figures = {
        "in_flight_at_sigterm": len(cases),
        "outcomes": dict(outcomes),
        "exit_code": code,
        "seconds_until_exit": round(seconds, 1),
        "deadline_seconds": DEADLINE,
        "broken_by_kill": killed,
        "files_left": len(left),
    }
    return result


async def _told_to_end(
    server: Server, cases: Sequence[Case], expected: Sequence[GenerationOutput], result: Result
) -> tuple[Counter[str], int | None, float]:
    """Outcomes of the requests in flight at SIGTERM, the exit code, and how long it took."""
    has_begun = asyncio.Event()
    tasks = [asyncio.create_task(_events(server, case, has_begun)) for case in cases]
    await has_begun.wait()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    try:
        code = await asyncio.to_thread(server.process.wait, DEADLINE + MARGIN)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - began
    result.must(code == 0, f"SIGTERM ends it with {code}")
    outcomes = Counter[str]()
    for events, right in zip(await asyncio.gather(*tasks), expected, strict=True):
        outcome = _outcome(events, right)
        outcomes[outcome] += 1
        result.must(outcome != "broken", f"SIGTERM broke an answer: {events[-2:]}")
    return outcomes, code, seconds


def _outcome(events: Sequence[Any], right: GenerationOutput) -> str:
    """What became of a request: the whole answer, an error that says why, or neither."""
    if not faults_of_stream(events, right):
        return "finished"
    if is_clean_error(events):
        return "error"
    never_began = len(events) == 1 and "unheard" in events[0]
    return "connection refused" if never_began else "broken"


async def _killed(server: Server, cases: Sequence[Case]) -> int:
    """How many answers kill -9 broke."""
    has_begun = asyncio.Event()
    tasks = [asyncio.create_task(_events(server, case, has_begun)) for case in cases]
    await has_begun.wait()
    server.process.kill()
    await asyncio.to_thread(server.process.wait)
    return sum("broken" in events[-1] for events in await asyncio.gather(*tasks))


async def _events(server: Server, case: Case, has_begun: asyncio.Event | None = None) -> list[Any]:
    """The events of a stream, and why it broke if it did."""
    events: list[Any] = []
    try:
        async with await connect(server.address) as connection:
            async for event in connection.events(CHAT, case.body(MODEL)):
                events.append(event)
                if has_begun is not None:
                    has_begun.set()
    except Refused as refused:
        events.append({"refused": refused.answer})
    except (Broken, OSError) as error:
        events.append({"broken": str(error)} if events else {"unheard": str(error)})
    return events


def _is_free(port: int) -> bool:
    """Whether a server may listen on a port at once."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
