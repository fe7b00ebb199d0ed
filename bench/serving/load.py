"""Many clients: is every answer the right one, and does the server give back what it took?"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, pairwise

import torch

from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.outputs import GenerationOutput
from serving.cases import CHAT, Case, alone, faults_of_stream, mixed_cases, plain_cases
from serving.client import DONE, Broken, Connection, Refused, connect
from serving.row import Result, Sizes
from serving.server import BENCH, MODEL, RUNNING, WAITING, Server, serving, settles

IN_64_BITS = (str(BENCH / "serving" / "under_test.py"),)
SHOWN = 10
"""Faults of one kind that are written down."""
CLIENTS = 8
"""Of a soak."""
LEAVING = 32
"""Clients that go away, at a time."""
LEAST_MIB = 16.0
"""Growth of memory that tells nothing: what an allocator keeps differs by as much."""
PARTS = 20
"""Stretches of time that a slope is taken from."""
T_95 = 2.101
"""Student's two-sided quantile for as many parts less two."""
WARM_UP = 450.0
"""Seconds of a soak after which memory is watched. Until then the allocator still takes pages for
mixtures of requests that have not come together before, and in 16 bits oneDNN fills its cache of
compiled operations, 500 MiB."""


async def mixed(sizes: Sizes) -> Result:
    """Every answer under load is that of the same request alone."""
    cases = mixed_cases(sizes.requests, sizes.seed)
    expected = _alone_in_64_bits(cases)
    async with serving("--dtype", "float64", program=IN_64_BITS) as server:
        began = time.perf_counter()
        streams = await _ask_all(server, cases, sizes.at_once)
        seconds = time.perf_counter() - began
        totals = await server.idle()

    result = Result()
    equal = 0
    for case, events, right in zip(cases, streams, expected, strict=True):
        wrong = faults_of_stream(events, right)
        equal += not wrong
        result.faults += [f"{case.params.strategy}: {fault}" for fault in wrong[:SHOWN]]
    result.faults[SHOWN:] = []
    kinds = Counter(case.params.strategy for case in cases)
    result.figures = {
        "requests": len(cases),
        "at_once": sizes.at_once,
        "equal_to_alone": equal,
        "distinct_answers": len({output.text for output in expected}),
        "strategies": dict(sorted(kinds.items())),
        "sampled": sum(case.params.temperature > 0 for case in cases),
        "provisional": sum(case.stream == "provisional" for case in cases),
        "tokens": sum(len(output.token_ids) for output in expected),
        "seconds": round(seconds, 1),
        "metrics": totals,
    }
    return result


def _alone_in_64_bits(cases: Sequence[Case]) -> list[GenerationOutput]:
    checkpoint = load_checkpoint(MODEL, dtype=torch.float64, device="cpu")
    return alone(LLM.from_checkpoint(checkpoint), cases)


async def _ask_all(server: Server, cases: Sequence[Case], at_once: int) -> list[list[object]]:
    """The events of each request, so many in flight; half the clients keep their connection."""
    streams: list[list[object]] = [[] for _ in cases]
    waiting = iter(enumerate(cases))

    async def keep_asking(is_patient: bool) -> None:
        connection = await connect(server.address)
        for index, case in waiting:
            try:
                async for event in connection.events(CHAT, case.body(MODEL)):
                    streams[index].append(event)
            except (Broken, Refused) as error:
                streams[index].append({"error": str(error)})
            if not is_patient:
                await connection.close()
                connection = await connect(server.address)
        await connection.close()

    await asyncio.gather(*(keep_asking(client % 2 == 0) for client in range(at_once)))
    return streams


async def disconnects(sizes: Sizes) -> Result:
    """Clients that go away in the middle leave nothing behind."""
    cases = [
        replace(case, params=replace(case.params, max_new_tokens=512, ignore_eos=True))
        for case in plain_cases(32, sizes.seed)
    ]
    draw = random.Random(sizes.seed)
    result = Result()
    async with serving("--dtype", "float32") as server:
        num_files = server.num_files
        levels = []
        for _ in range(3):  # the first one only fills what the server keeps anyway
            await _leave_early(server, cases, sizes.disconnects, draw)
            totals = await server.idle()
            levels.append(server.resident_mib)
        are_closed = await settles(lambda: server.num_files <= num_files)
        files_after = server.num_files
        answer = await _whole(server, cases[0])
    _, before, after = levels
    growth = after - before
    result.must(growth < LEAST_MIB, f"memory grew by {growth:.1f} MiB")
    result.must(are_closed, f"{num_files} files were open, and {files_after} stay so")
    result.must(answer[-1:] == [DONE], f"the next client gets {answer[-1:]}")
    result.figures = {
        "clients": sizes.disconnects,
        "resident_mib_before": round(before, 1),
        "resident_mib_after": round(after, 1),
        "open_files_before": num_files,
        "open_files_after": files_after,
        "running_after": int(totals[RUNNING]),
        "waiting_after": int(totals[WAITING]),
        "metrics": totals,
    }
    return result


async def _leave_early(
    server: Server, cases: Sequence[Case], num: int, draw: random.Random
) -> None:
    """Clients that drop their connection after a random number of events, some before any."""
    plan = iter([(draw.choice(cases), draw.randint(0, 8), draw.random()) for _ in range(num)])

    async def leave() -> None:
        for case, num_events, patience in plan:
            connection = await connect(server.address)
            await _read_some(connection, case, num_events, patience / 10)
            connection.abort()

    await asyncio.gather(*(leave() for _ in range(LEAVING)))


async def _read_some(connection: Connection, case: Case, num: int, patience: float) -> None:
    """Read so many events of a stream; with none, wait a moment for the request to be decoded."""
    if not num:
        await connection.send("POST", CHAT, case.body(MODEL))
        await asyncio.sleep(patience)
        return
    seen = 0
    async for _ in connection.events(CHAT, case.body(MODEL)):
        seen += 1
        if seen == num:
            return


async def _whole(server: Server, case: Case) -> list[object]:
    async with await connect(server.address) as connection:
        return [event async for event in connection.events(CHAT, case.body(MODEL))]


async def soak(sizes: Sizes) -> Result:
    """Memory stays flat under steady load.

    Where it seems to grow, the load goes on for as long again, `soak_tries` times in all: a leak
    stands out the more, and what an allocator took once the less.
    """
    cases = mixed_cases(64, sizes.seed)
    result = Result()
    async with serving("--dtype", sizes.soak_dtype) as server:
        await _ask_all(server, cases, CLIENTS)  # all strategies and lengths once
        state = _Soak(server, cycle(cases))
        for tries in range(1, sizes.soak_tries + 1):
            await state.go_on(sizes.soak_seconds * tries, sizes.soak_requests * tries)
            slope, low, high = slope_with_interval(state.settled)
            grows = low > 0 and slope * state.seconds > max(state.level / 100, LEAST_MIB / 4)
            if not grows:
                break
        totals = await server.idle()

    result.must(not grows, f"memory grows by {slope * 60:.2f} MiB a minute")
    result.must(not state.faults, f"{len(state.faults)} bad answers: {state.faults[:3]}")
    samples = state.samples
    result.figures = {
        "seconds": round(state.seconds, 1),
        "clients": CLIENTS,
        "dtype": sizes.soak_dtype,
        "requests": state.num_answers,
        "resident_mib_begin": round(samples[0][1], 1),
        "resident_mib_first": round(state.settled[0][1], 1),
        "resident_mib_last": round(samples[-1][1], 1),
        "resident_mib_median": round(state.level, 1),
        "mib_per_minute": {"median": slope * 60, "low": low * 60, "high": high * 60},
        "samples": [(round(at), round(mib, 1)) for at, mib in samples[:: len(samples) // 60 + 1]],
        "metrics": totals,
    }
    return result


class _Soak:
    """A steady load, and what the server's memory does under it.

    Attributes:
        samples: seconds since it began, and MiB of the server.
    """

    def __init__(self, server: Server, cases: Iterator[Case]) -> None:
        self.server = server
        self.cases = cases
        self.began = time.monotonic()
        self.least_seconds = 0.0
        self.least_requests = 0
        self.num_answers = 0
        self.faults: list[str] = []
        self.samples: list[tuple[float, float]] = []

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def seconds(self) -> float:
        """How long it was watched."""
        return self.samples[-1][0]

    @property
    def settled(self) -> list[tuple[float, float]]:
        """The samples after the warm-up, which is half of a short soak."""
        warm = min(WARM_UP, self.seconds / 2)
        return [sample for sample in self.samples if sample[0] >= warm]

    @property
    def level(self) -> float:
        """MiB in the middle of what was settled."""
        return statistics.median(mib for _, mib in self.settled)

    def is_over(self) -> bool:
        return self.elapsed >= self.least_seconds and self.num_answers >= self.least_requests

    async def go_on(self, seconds: float, num_requests: int) -> None:
        """Load and watch until both are reached, counted from the beginning."""
        self.least_seconds = seconds
        self.least_requests = num_requests
        await asyncio.gather(self.watch(), *(self.keep_asking() for _ in range(CLIENTS)))

    async def keep_asking(self) -> None:
        while not self.is_over():
            events = await _whole(self.server, next(self.cases))
            self.num_answers += 1
            if events[-1:] != [DONE]:
                self.faults.append(str(events[-1:]))

    async def watch(self) -> None:
        while not self.is_over():
            self.samples.append((self.elapsed, self.server.resident_mib))
            await asyncio.sleep(1.0 if self.least_seconds - self.elapsed > 30 else 0.1)


def slope_with_interval(samples: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope of a line through samples, and its 95 % interval.

    Neighbouring samples are alike, so the line goes through the means of `PARTS` stretches of time,
    which are taken as independent.

    Raises:
        InputError: there are fewer samples than that.
    """
    if len(samples) < PARTS:
        said = f"a slope needs {PARTS} samples of memory, got {len(samples)}"
        raise InputError(said, hint="watch for longer")
    bounds = [len(samples) * part // PARTS for part in range(PARTS + 1)]
    parts = [samples[begin:end] for begin, end in pairwise(bounds)]
    times = [statistics.fmean(at for at, _ in part) for part in parts]
    values = [statistics.fmean(mib for _, mib in part) for part in parts]
    slope, intercept = statistics.linear_regression(times, values)
    rest = [value - intercept - slope * at for at, value in zip(times, values, strict=True)]
    spread = math.fsum(error**2 for error in rest) / (PARTS - 2)
    middle = statistics.fmean(times)
    error = (spread / math.fsum((at - middle) ** 2 for at in times)) ** 0.5
    margin = T_95 * error
    return slope, slope - margin, slope + margin
