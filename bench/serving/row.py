"""What a row of the table is: how large it is, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; the seed decides every draw.

    Attributes:
        requests: of mixed kinds, compared with the same request alone.
        at_once: of them in flight.
        disconnects: clients that go away.
        api_cases: that schemathesis makes of the OpenAPI page.
        api_phases: of schemathesis; "coverage" alone is 2,000 cases.
        bodies: that hypothesis makes.
        keys: wrong ones.
        broken: requests in flight beside those that break.
        soak_seconds: at steady load, the first half to warm up; 0: as long as `soak_requests`
            take.
        soak_requests: at the least.
        soak_tries: a soak in which memory seems to grow goes on for as long again, until so many.
        soak_dtype: of the weights meanwhile.
        problems: that lm_eval asks.
        rounds: of the server and the engine in turns.
        clients: numbers of them.
        seed: of all draws.
    """

    requests: int = 1000
    at_once: int = 64
    disconnects: int = 200
    api_cases: int = 5000
    api_phases: str = "examples,coverage,fuzzing,stateful"
    bodies: int = 1000
    keys: int = 1000
    broken: int = 48
    soak_seconds: float = 900.0
    soak_requests: int = 0
    soak_tries: int = 1
    soak_dtype: str = "auto"
    problems: int = 128
    rounds: int = 7
    clients: tuple[int, ...] = (1, 8, 64)
    seed: int = 7


FULL = Sizes()
QUICK = Sizes(
    requests=64,
    at_once=16,
    disconnects=24,
    api_cases=100,
    api_phases="fuzzing",
    bodies=40,
    keys=40,
    broken=12,
    soak_seconds=0.0,
    soak_requests=200,
    soak_tries=3,  # what malloc gives back every ten seconds is much of half a minute's memory
    soak_dtype="float32",  # in 16 bits more requests go by before memory is settled
    problems=8,
    rounds=1,
    clients=(2,),
)


@dataclass(slots=True)
class Result:
    """What came of a row.

    Attributes:
        figures: what was measured and counted.
        faults: what must hold and does not; the row holds without any.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def must(self, holds: bool, otherwise: str) -> None:
        """Note a fault unless something holds."""
        if not holds:
            self.faults.append(otherwise)
