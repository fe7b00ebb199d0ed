"""What HTTP costs: the server against the engine itself, in turns."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmax.benchmark.measure import in_turns, spread
from dmax_command import SPINS_BESIDE_OTHERS
from serving.row import Result, Sizes
from serving.server import serving

MOST = 0.10
"""Share of the engine's tokens per second that HTTP may cost, at `AT` clients."""
AT = 8
DTYPE = "float32"


async def speed(sizes: Sizes) -> Result:
    """HTTP costs at most a tenth of the engine's speed."""
    result = Result()
    rows = []
    async with serving("--dtype", DTYPE) as server:
        port = str(server.address.port)
        with _callers("http", port) as over_http, _callers("engine", DTYPE) as of_the_engine:
            for clients in sizes.clients:
                job = {"clients": clients, "requests": max(32, 4 * clients), "seed": sizes.seed}
                contenders = {
                    "http": lambda job=job: _round(over_http, job),
                    "engine": lambda job=job: _round(of_the_engine, job),
                }
                rounds = in_turns(contenders, sizes.rounds)
                rows.append(_compare(clients, rounds["http"], rounds["engine"]))
    for row in rows:
        costly = row["clients"] == AT and row["cost"]["median"] > MOST
        result.must(not costly, f"HTTP costs {row['cost']['median']:.1%} at {AT} clients")
    result.figures = {"dtype": DTYPE, "rounds": sizes.rounds, "rows": rows}
    return result


@contextlib.contextmanager
def _callers(kind: str, argument: str) -> Iterator[subprocess.Popen[str]]:
    """A process with callers, which waits for rounds."""
    script = Path(__file__).with_name("callers.py")
    with subprocess.Popen(
        [sys.executable, str(script), kind, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"GOMP_SPINCOUNT": str(SPINS_BESIDE_OTHERS)},  # as `dmax serve` has it
        text=True,
    ) as process:
        yield process


def _round(process: subprocess.Popen[str], job: dict[str, Any]) -> dict[str, Any]:
    """Have callers do a round; raises `RuntimeError` if they have ended."""
    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the callers have ended")
    found: dict[str, Any] = json.loads(line)
    return found


def _compare(
    clients: int, http: list[dict[str, Any]], engine: list[dict[str, Any]]
) -> dict[str, Any]:
    """What both took, and the share of speed that HTTP costs, round by round."""
    costs = [
        1 - _tokens_per_second(ours) / _tokens_per_second(theirs)
        for ours, theirs in zip(http, engine, strict=True)
    ]
    return {
        "clients": clients,
        "cost": spread(costs),
        "http": _figures(http),
        "engine": _figures(engine),
    }


def _tokens_per_second(found: dict[str, Any]) -> float:
    return sum(answer["tokens"] for answer in found["answers"]) / found["seconds"]


def _figures(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed by round, and times of all answers of all rounds, in milliseconds."""
    answers = [answer for found in rounds for answer in found["answers"]]
    first = [1e3 * answer["first"] for answer in answers]
    each = [1e3 * answer["seconds"] / answer["tokens"] for answer in answers if answer["tokens"]]
    return {
        "tokens_per_second": spread([_tokens_per_second(found) for found in rounds]),
        "first_block_ms": _percentiles(first),
        "token_ms": _percentiles(each),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}
