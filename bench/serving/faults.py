"""What breaks in one request, or outside of all: keys, NaN, a strategy that raises, a full disk."""

from __future__ import annotations

import asyncio
import json
import os
import random
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dmax.checkpoint import load_checkpoint, save_checkpoint
from dmax.llm import LLM
from serving.cases import CHAT, Case, alone, faults_of_stream, plain_cases
from serving.client import DONE, Answer, Broken, Refused, ask, connect
from serving.hostile import fault_of_refusal
from serving.load import SHOWN
from serving.row import Result, Sizes
from serving.server import BENCH, MODEL, Server, serving

# --- keys -----------------------------------------------------------------------------------------


async def keys(sizes: Sizes) -> Result:
    """No request without a right key passes, and every right one does."""
    draw = random.Random(sizes.seed)
    letters = string.ascii_letters + string.digits
    right = ["".join(draw.choices(letters, k=32)) for _ in range(100)]
    result = Result()
    statuses = Counter[int]()
    with TemporaryDirectory() as folder:
        file = Path(folder, "keys")
        file.write_text("\n".join(right) + "\n", "utf-8")
        file.chmod(0o600)
        log = Path(folder, "log")
        async with serving("--api-key-file", str(file), "--log-json", log=log) as server:
            for header in wrong_headers(right, draw, sizes.keys):
                answer = await ask(server.address, "GET", "/v1/models", None, header)
                statuses[answer.status] += 1
                wrong = fault_of_refusal(answer) or answer.status != 401
                result.must(not wrong, f"{str(header)[:100]}: {answer.status}")
            for key in right:
                header = {"Authorization": f"Bearer {key}"}
                answer = await ask(server.address, "GET", "/v1/models", None, header)
                result.must(answer.status == 200, f"a right key got {answer.status}")
            public = await ask(server.address, "GET", "/health")
            result.must(public.status == 200, "/health asks for a key")
        written = log.read_text("utf-8", "replace")
        told = [key for key in right if key in written or key[:12] in written]
        result.must(not told, f"the log holds {len(told)} keys")
    result.faults[SHOWN:] = []
    result.figures = {
        "wrong": statuses.total(),
        "refused": statuses[401],
        "right": len(right),
        "keys_in_the_log": len(told),
    }
    return result


def wrong_headers(right: list[str], draw: random.Random, num: int) -> Iterator[dict[str, str]]:
    """Headers of a request that must not pass."""
    first = right[0]
    yield {}
    fixed = ("", "Bearer", "Bearer ", "Basic " + first, first, f"Bearer  {first}x", "Bearer \x80")
    for value in fixed:
        yield {"Authorization": value}
    yield {"X-Api-Key": first}
    yield {"Cookie": f"Authorization=Bearer {first}"}
    yield {"Authorization": "Bearer " + ",".join(right)}
    yield {"Authorization": "Bearer " + " ".join(right[:2])}
    yield {"Authorization": "Bearer " + "a" * 10_000}
    for _ in range(num):
        key = draw.choice(right)
        at = draw.randrange(len(key))
        changed = (
            key[:at] + draw.choice("".join(set(string.ascii_letters) - {key[at]})) + key[at + 1 :]
        )
        other = draw.choice((changed, key[:at], key + key[at], key.swapcase(), key[::-1]))
        yield {"Authorization": f"Bearer {other}"}


# --- one request breaks ---------------------------------------------------------------------------

RAISES = "bench_raises"
MARK = "%"
"""Its embedding is NaN, and no prompt has it but those that are meant to break."""


async def broken_requests(sizes: Sizes) -> Result:
    """Requests that break get an error each, and the others their answers."""
    good = plain_cases(sizes.broken, sizes.seed)
    with TemporaryDirectory() as folder:
        model = poisoned(Path(folder, "model"))
        expected = alone(LLM(str(model), dtype="float32", device="cpu"), good)
        plugin = installed_strategy(Path(folder, "plugin"))
        variables = {"PYTHONPATH": os.pathsep.join([str(plugin), str(BENCH), *_python_path()])}
        async with serving("--dtype", "float32", model=str(model), variables=variables) as server:
            result = await _break_some(server, good, expected)
            await server.idle()
            again = await _ask(server, good[0], str(model))
            result.must(not faults_of_stream(again, expected[0]), "the server answers no more")
    return result


def poisoned(folder: Path) -> Path:
    """The model with one sign that turns every logit of its request into NaN."""
    checkpoint = load_checkpoint(MODEL, dtype=torch.float32, device="cpu")
    tokenizer: Any = checkpoint.tokenizer
    [token] = tokenizer.encode(MARK, add_special_tokens=False)
    checkpoint.model.get_input_embeddings().weight.data[token] = torch.nan
    save_checkpoint(checkpoint.model, tokenizer, folder, checkpoint.special_ids)
    return folder


def installed_strategy(folder: Path) -> Path:
    """A package whose entry point registers a strategy that raises; what `pip` would install."""
    info = folder / "bench_strategies-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-strategies\nVersion: 1.0\n")
    points = f"[dmax.strategies]\n{RAISES} = serving.raising:Raises\n"
    (info / "entry_points.txt").write_text(points)
    return folder


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


async def _break_some(server: Server, good: list[Case], expected: list[Any]) -> Result:
    """Ask for answers and for failures at once."""
    result = Result()
    model = json.loads((await ask(server.address, "GET", "/v1/models")).body)["data"][0]["id"]
    first = good[0]
    nan = replace(first, prompt=f"{first.prompt} {MARK}")
    raising = replace(first, params=replace(first.params, strategy=RAISES))
    bad = [nan, raising] * (len(good) // 4)
    streams, bad_streams, bad_wholes = await asyncio.gather(
        asyncio.gather(*(_ask(server, case, model) for case in good)),
        asyncio.gather(*(_ask(server, case, model) for case in bad)),
        asyncio.gather(
            *(ask(server.address, "POST", CHAT, case.body(model, stream=False)) for case in bad)
        ),
    )
    equal = 0
    for events, right in zip(streams, expected, strict=True):
        wrong = faults_of_stream(events, right)
        equal += not wrong
        result.faults += wrong
    for events in bad_streams:
        result.must(is_clean_error(events), f"a broken stream gives {events[-3:]}")
    for answer in bad_wholes:
        fault = fault_of_error(answer)
        result.must(not fault, f"a broken request: {fault}")
    result.faults[SHOWN:] = []
    result.figures = {
        "good": len(good),
        "equal_to_alone": equal,
        "nan_logits": len(bad),
        "raising": len(bad),
        "errors": sum(map(is_clean_error, bad_streams)) + len(bad_wholes),
    }
    return result


async def _ask(server: Server, case: Case, model: str = MODEL) -> list[Any]:
    """The events of a stream; an answer of another kind as one event."""
    async with await connect(server.address) as connection:
        try:
            return [event async for event in connection.events(CHAT, case.body(model))]
        except Refused as refused:
            return [{"refused": refused.answer}]
        except Broken as error:
            return [{"broken": str(error)}]


def is_clean_error(events: Sequence[Any]) -> bool:
    """Whether a stream ends with one error in the standard form, or never began for one."""
    if not events:
        return False
    if isinstance(events[0], dict) and "refused" in events[0]:
        return not fault_of_error(events[0]["refused"])
    body = events[:-1] if events[-1] == DONE else events
    errors = [event["error"] for event in body if "error" in event]
    return len(errors) == 1 and "error" in body[-1] and bool(errors[0]["message"])


def fault_of_error(answer: Answer) -> str:
    """What is wrong with an answer that must be an error, of the server or of the client."""
    if answer.status < 400:
        return f"status {answer.status}"
    return fault_of_refusal(replace(answer, status=400))


# --- a full disk ----------------------------------------------------------------------------------


async def full_disk(sizes: Sizes) -> Result:
    """A log that cannot be written costs no answer."""
    cases = plain_cases(sizes.broken, sizes.seed)
    expected = alone(LLM(MODEL, dtype="float32", device="cpu"), cases)
    result = Result()
    equal = 0
    options = ("--dtype", "float32", "--log-json", "--log-file", "/dev/full")
    async with serving(*options, log=Path("/dev/full")) as server:
        streams = await asyncio.gather(*(_ask(server, case) for case in cases))
        for events, right in zip(streams, expected, strict=True):
            wrong = faults_of_stream(events, right)
            equal += not wrong
            result.faults += wrong
        code = await asyncio.to_thread(server.end)
        result.must(code == 0, f"it ends with {code}")
    result.faults[SHOWN:] = []
    result.figures = {"requests": len(cases), "equal_to_alone": equal, "exit_code": code}
    return result
