"""Clients that mean harm or know no better: no 5xx, no hang, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from serving.cases import CHAT, plain_cases
from serving.client import HANG, Address, Answer, Broken, ask, connect
from serving.row import Result, Sizes
from serving.server import BENCH, MODEL, Server, serving, settles

COMPLETIONS = "/v1/completions"
SHORT = ("--max-new-tokens", "32")
"""Options of a server whose every answer is short, since nobody reads them here."""
MIB = 2**20


@dataclass(slots=True)
class Neighbour:
    """A client that asks for the same thing again and again while others misbehave.

    Attributes:
        num_answers: how often it was answered.
        longest: seconds that it waited at most.
        faults: answers that were not the right one.
    """

    num_answers: int = 0
    longest: float = 0.0
    faults: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def neighbour(address: Address) -> AsyncIterator[Neighbour]:
    """A client beside the block, which expects the answer that it got before it."""
    [case] = plain_cases(1, seed=1, max_new_tokens=32)
    body = case.body(MODEL, stream=False)
    expected = _text(await ask(address, "POST", CHAT, body))
    found = Neighbour()
    is_over = asyncio.Event()

    async def keep_asking() -> None:
        while not is_over.is_set():
            began = time.monotonic()
            answer = await ask(address, "POST", CHAT, body)
            found.longest = max(found.longest, time.monotonic() - began)
            found.num_answers += 1
            if answer.status != 200 or _text(answer) != expected:
                found.faults.append(f"{answer.status}: {answer.body[:200]!r}")

    task = asyncio.create_task(keep_asking())
    try:
        yield found
    finally:
        is_over.set()
        await task


def _text(answer: Answer) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def _note(result: Result, beside: Neighbour) -> None:
    """What became of the neighbour."""
    result.must(not beside.faults, f"the neighbour got {beside.faults[:2]}")
    result.must(beside.num_answers > 0, "the neighbour got no answer meanwhile")
    result.figures |= {
        "answers_to_others_meanwhile": beside.num_answers,
        "longest_wait_of_others": round(beside.longest, 2),
    }


# --- schemathesis ---------------------------------------------------------------------------------


async def api(sizes: Sizes) -> Result:
    """Schemathesis finds nothing in the server's own OpenAPI page."""
    result = Result()
    async with serving("--dtype", "float32", *SHORT) as server, neighbour(server.address) as beside:
        cases, failures, said = await asyncio.to_thread(_schemathesis, server, sizes)
        result.must(server.process.poll() is None, "the server has ended")
    result.must(not failures, f"schemathesis found {failures[:5]}: {said}")
    least = sizes.api_cases
    result.must(cases >= least, f"schemathesis made {cases} cases instead of {least}: {said}")
    result.figures = {"cases": cases, "failures": len(failures)}
    _note(result, beside)
    return result


def _schemathesis(server: Server, sizes: Sizes) -> tuple[int, list[str], str]:
    """How many cases were tried, what failed, and the end of what it printed."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                *("--no-color", "run"),
                f"http://127.0.0.1:{server.address.port}/openapi.json",
                *("--phases", sizes.api_phases, "--request-timeout", f"{HANG:g}"),
                *("--max-examples", str(max(sizes.api_cases // 2, 50))),
                *("--seed", str(sizes.seed), "--workers", "4", "--continue-on-failure"),
                *("--report", "json", "--report-json-path", str(report)),
            ],
            cwd=folder,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "serving.hooks", "PYTHONPATH": str(BENCH)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not report.is_file():
            return 0, ["it made no report"], done.stdout[-2000:]
        found = json.loads(report.read_text("utf-8"))
    failures = [f"{each['title']}: {each['operations']}" for each in found["failures"]]
    failures += [str(each) for each in found["errors"]]
    return found["test_cases"]["generated"], failures, done.stdout[-4000:]


# --- bodies ---------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = (
    "model messages prompt max_tokens max_completion_tokens temperature top_p seed stop n stream "
    "stream_options logprobs top_logprobs logit_bias presence_penalty frequency_penalty user tools "
    "tool_choice response_format echo suffix best_of dmax metadata store"
).split()
EXTRAS = (
    "strategy threshold stop_confidence top_k max_steps_per_block options ignore_eos deadline"
).split()


def bodies() -> st.SearchStrategy[dict[str, Any]]:
    """A good request with some of its fields replaced by anything, and others added."""
    role = st.sampled_from(("user", "system", "assistant", "tool", ""))
    content = st.text(max_size=200) | st.lists(
        st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=20)}), max_size=3
    )
    messages = st.lists(st.fixed_dictionaries({"role": role, "content": content}), max_size=4)
    extras = st.dictionaries(st.sampled_from(EXTRAS), ANYTHING, max_size=3)
    good = st.fixed_dictionaries(
        {"model": st.just(MODEL), "messages": messages, "max_tokens": st.integers(1, 16)},
        optional={"dmax": extras, "stream": st.booleans(), "n": st.integers(1, 3)},
    )
    changes: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.dictionaries(
        st.sampled_from(FIELDS), ANYTHING, max_size=2
    )
    return st.builds(lambda first, second: first | second, good, changes)


async def odd_bodies(sizes: Sizes) -> Result:
    """Bodies that hypothesis makes are answered, or refused in the standard form."""
    result = Result()
    statuses = Counter[int]()
    async with serving(*SHORT) as server, neighbour(server.address) as beside:

        @seed(sizes.seed)
        @settings(
            max_examples=sizes.bodies,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(path=st.sampled_from((CHAT, COMPLETIONS)), body=bodies())
        def try_bodies(path: str, body: dict[str, Any]) -> None:
            answer = asyncio.run(ask(server.address, "POST", path, json.dumps(body).encode()))
            statuses[answer.status] += 1
            if wrong := fault_of_refusal(answer):
                result.faults.append(f"{wrong}: {json.dumps(body)[:300]}")

        await asyncio.to_thread(try_bodies)
    result.faults[10:] = []
    result.figures = {"bodies": statuses.total(), "statuses": _by_status(statuses)}
    _note(result, beside)
    return result


def _by_status(statuses: Counter[int]) -> dict[str, int]:
    return {str(status): num for status, num in sorted(statuses.items())}


def fault_of_refusal(answer: Answer) -> str:
    """What is wrong with an answer that must be good, or an error of the client in our form."""
    if answer.status == 200:
        return ""
    if not 400 <= answer.status < 500:
        return f"status {answer.status}"
    try:
        error = answer.json()["error"]
        is_standard = {"message", "type", "param", "code"} <= error.keys() and error["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {answer.status} without the standard body: {answer.body[:100]!r}"
    return "" if is_standard else f"the error lacks a part: {error}"


# --- bytes ----------------------------------------------------------------------------------------


def good_body(path: str) -> bytes:
    """A request that would be answered."""
    [case] = plain_cases(1, seed=1, max_new_tokens=8)
    body = case.body(MODEL, stream=False)
    if path == CHAT:
        return body
    fields = json.loads(body)
    del fields["messages"]
    return json.dumps(fields | {"prompt": case.prompt}).encode()


def bad_bodies(good: bytes) -> Iterator[tuple[str, bytes]]:
    """What a good body can be spoilt to, by what it is then."""
    digits = b"9" * 1_000_000
    head = good[:-1]
    yield "invalid UTF-8", good.replace(b"How many", b"\xff\xfe\x80")
    yield "an overlong form", good.replace(b"How many", b"\xc0\xaf")
    yield "half a surrogate", good.replace(b"How many", b"\\ud800")
    yield "UTF-16", good.decode().encode("utf-16")
    yield "a byte order mark", b"\xef\xbb\xbf" + good
    yield "nothing", b""
    yield "zeros", bytes(1000)
    yield "half of it", good[: len(good) // 2]
    yield "two of them", good + good
    for name in ("max_tokens", "seed", "temperature", "n", "stop", "top_logprobs"):
        yield f"1e6 digits as {name}", head + b', "%b": %b}' % (name.encode(), digits)
    yield "1e6 digits behind the point", head + b', "temperature": 0.%b}' % digits
    yield "an exponent of 1e6 digits", head + b', "temperature": 1e%b}' % digits
    yield "1e6 digits in an option", head + b', "dmax": {"options": {"alpha": %b}}}' % digits
    yield "1e6 digits as a threshold", head + b', "dmax": {"threshold": %b}}' % digits
    for literal in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        yield f"{literal.decode()} as temperature", head + b', "temperature": %b}' % literal
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = opening * 100_000 + b"1" + closing * 100_000
        yield f"100,000 {opening.decode()}", deep
        yield f"100,000 {opening.decode()} as metadata", head + b', "metadata": %b}' % deep
        yield f"100,000 {opening.decode()} that stay open", opening * 100_000
    yield "200,000 keys", b"{%b}" % b",".join(b'"%d":1' % each for each in range(200_000))
    yield "a name of a million letters", head + b', "%b": 1}' % (b"a" * 1_000_000)
    yield "a model of a million letters", good.replace(MODEL.encode(), b"a" * 1_000_000)
    yield "a prompt of a million letters", good.replace(b"How many", b"a" * 1_000_000)
    yield "a list", b"[%b]" % good
    yield "a text", b'"hello"'


def bad_heads() -> Iterator[tuple[str, bytes]]:
    """What is no request of HTTP, or one that nobody should send, by what it is."""
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    yield "noise", bytes(range(256)) * 4 + b"\r\n\r\n"
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n"
    yield "an old version", b"GET /health HTTP/0.9\r\n\r\n"
    yield "no host", b"GET /health HTTP/1.1\r\n\r\n"
    yield "a length below zero", start + b"Content-Length: -1\r\n\r\n"
    yield "a length of letters", start + b"Content-Length: many\r\n\r\n"
    yield "a length of 1e6 digits", start + b"Content-Length: %b\r\n\r\n" % (b"9" * 1_000_000)
    yield "two lengths", start + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    yield (
        "length and chunks",
        start + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    )
    yield "a bad chunk", start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"
    yield "an endless header", start + b"X-Long: " + b"a" * MIB + b"\r\n\r\n"
    yield "100,000 headers", start + b"".join(b"X-%d: 1\r\n" % each for each in range(100_000))
    yield "an endless address", b"GET /%b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % (b"a" * MIB)
    yield "a folded header", start + b"X-A: 1\r\n 2\r\nContent-Length: 2\r\n\r\n{}"
    yield "a zero in a header", start + b"X-A: \x00\r\nContent-Length: 2\r\n\r\n{}"
    yield "a way out", b"GET /static/../../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    yield "a coded way out", b"GET /static/..%2f..%2fapp.py HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def bad_bytes(sizes: Sizes) -> Result:
    """Bodies, heads and clients that are broken, huge or slow."""
    result = Result()
    statuses = Counter[str]()
    async with serving(*SHORT) as server, neighbour(server.address) as beside:
        for path in (CHAT, COMPLETIONS):
            for what, body in bad_bodies(good_body(path)):
                answer = await ask(server.address, "POST", path, body)
                statuses[str(answer.status)] += 1
                if wrong := fault_of_refusal(answer):
                    result.faults.append(f"{what}: {wrong}")
        for what, head in bad_heads():
            status = await _say(server.address, head)
            statuses[status] += 1
            result.must(status == "closed" or status.startswith(("4", "200")), f"{what}: {status}")
        for what, send in (("a length", _send_huge), ("chunks", _send_huge_in_chunks)):
            status = await send(server.address)
            statuses[status] += 1
            result.must(status in ("413", "closed"), f"100 MB with {what}: {status}")
        before = server.num_files
        outcomes = await asyncio.gather(*(_dribble(server.address) for _ in range(200)))
        statuses.update(outcomes)
        result.must(
            set(outcomes) <= {"408", "closed"}, f"slow headers: {Counter(outcomes).most_common()}"
        )
        result.must(
            await settles(lambda: server.num_files <= before + 2), "slow clients leave sockets"
        )
        result.must(server.process.poll() is None, "the server has ended")
    result.figures = {
        "tries": statuses.total(),
        "outcomes": dict(sorted(statuses.items())),
    }
    _note(result, beside)
    return result


async def _say(address: Address, data: bytes) -> str:
    """What a server answers to these bytes, after which the client says no more."""
    async with await connect(address) as connection:
        try:
            await connection.write(data)
            status, _ = await connection.head()
        except (Broken, ValueError):
            return "closed"
    return str(status)


async def _send_huge(address: Address) -> str:
    """100 MB as the head announces."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {100 * MIB}\r\n\r\n"
    return await _pour(address, head.encode(), b" " * MIB, b"")


async def _send_huge_in_chunks(address: Address) -> str:
    """100 MB that no head announces."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    return await _pour(address, head.encode(), b"%x\r\n%b\r\n" % (MIB, b" " * MIB), b"0\r\n\r\n")


async def _pour(address: Address, head: bytes, part: bytes, end: bytes) -> str:
    async with await connect(address) as connection:
        with contextlib.suppress(Broken):  # it may well hang up; the answer says why
            await connection.write(head)
            for _ in range(100):
                await connection.write(part)
            await connection.write(end)
        try:
            status, _ = await connection.head()
        except (Broken, ValueError):
            return "closed"
    return str(status)


async def _dribble(address: Address) -> str:
    """Headers that never end, one letter at a time (slow loris)."""
    async with await connect(address) as connection:
        answer = asyncio.create_task(connection.head())
        with contextlib.suppress(Broken):
            await connection.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
            while not answer.done():
                await connection.write(b"a")
                await asyncio.wait([answer], timeout=0.5)
        try:
            status, _ = await answer
        except Broken:
            return "closed"
    return str(status)
