"""Callers in a process of their own, over HTTP or of the engine itself: who is faster?

    python bench/serving/callers.py http 8000    # or: engine float32

A line on stdin is a round, `{"clients": 8, "requests": 64, "seed": 7}`; a line on stdout says how
it went. So many callers share the requests, and each asks for one after another.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving.cases import CHAT, Case, plain_cases  # noqa: E402
from serving.client import DONE, Address, connect  # noqa: E402
from serving.server import MODEL  # noqa: E402


@dataclass(frozen=True, slots=True)
class Timing:
    """How long an answer took.

    Attributes:
        first: seconds until its first block was there.
        seconds: until its end.
        tokens: of it.
    """

    first: float
    seconds: float
    tokens: int


class Callers(Protocol):
    """A number of callers that share requests."""

    def run(self, cases: Iterator[Case], clients: int) -> list[Timing]:
        """Have all requests answered."""


class OverHttp:
    """Clients of a server, with a connection each.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.address = Address(port)

    def run(self, cases: Iterator[Case], clients: int) -> list[Timing]:
        """Have all requests answered."""
        return asyncio.run(self._run(cases, clients))

    async def _run(self, cases: Iterator[Case], clients: int) -> list[Timing]:
        timings: list[Timing] = []

        async def keep_asking() -> None:
            async with await connect(self.address) as connection:
                for case in cases:
                    timings.append(await self._ask(connection, case.body(MODEL)))

        await asyncio.gather(*(keep_asking() for _ in range(clients)))
        return timings

    async def _ask(self, connection: Any, body: bytes) -> Timing:
        began = time.perf_counter()
        first = None
        tokens = 0
        async for event in connection.events(CHAT, body):
            if event == DONE:
                continue
            if first is None and any(each["delta"].get("content") for each in event["choices"]):
                first = time.perf_counter() - began
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
        seconds = time.perf_counter() - began
        return Timing(seconds if first is None else first, seconds, tokens)


class OfTheEngine:
    """Threads that wait for the engine of this process, as programs do that have no server.

    Args:
        dtype: of the weights.
    """

    def __init__(self, dtype: str) -> None:
        from dmax.llm import LLM
        from dmax.serve.settings import ServerOptions

        size = ServerOptions().max_batch_size
        self.llm = LLM(MODEL, dtype=dtype, max_batch_size=size)

    def run(self, cases: Iterator[Case], clients: int) -> list[Timing]:
        """Have all requests answered."""
        timings: list[Timing] = []
        lock = threading.Lock()

        def keep_asking() -> None:
            while True:
                with lock:
                    case = next(cases, None)
                if case is None:
                    return
                timings.append(self._ask(case))

        threads = [threading.Thread(target=keep_asking) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return timings

    def _ask(self, case: Case) -> Timing:
        began = time.perf_counter()
        first = None
        tokens = 0
        request = self.llm.request(0, case.prompt, case.params)
        with self.llm.submit([request]) as call:
            for event in call:
                event = self.llm.event(request, event)
                first = first or time.perf_counter() - began
                tokens = len(event.token_ids)
        seconds = time.perf_counter() - began
        assert first is not None, "a request has at least its last event"
        return Timing(first, seconds, tokens)


def main() -> None:
    """Take rounds from stdin."""
    kind, argument = sys.argv[1:]
    callers: Callers = OverHttp(int(argument)) if kind == "http" else OfTheEngine(argument)
    for line in sys.stdin:
        job = json.loads(line)
        cases = iter(plain_cases(job["requests"], job["seed"]))
        began = time.perf_counter()
        timings = callers.run(cases, job["clients"])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "answers": list(map(asdict, timings))}), flush=True)


if __name__ == "__main__":
    main()
