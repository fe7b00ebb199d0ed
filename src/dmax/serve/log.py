"""The log of a server: one line a request, for which no request ever waits."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from dmax.errors import InputError, printable, shorten
from dmax.outputs import ratio

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000  # lines that are not written yet; more are lost
CLIENT_GONE = 499  # a status that nobody gets; it is what proxies write into their logs
LONGEST_PATH = 100  # characters of a path, which a client may have made up
CLOSE_SECONDS = 1.0  # for what is not written yet, when the server ends


@dataclass(slots=True)
class Record:
    """What is known of a request. Nothing in it was written by a client but method and path.

    Attributes:
        method, path: what was asked for, without the query.
        client: its address.
        request_id: also in the header `x-request-id` of the response.
        began: `time.monotonic()` when the headers were there.
        status: of the response; None: none was sent.
        is_complete: whether all of the response was sent.
        outcome: how the request ended, where status and connection do not tell: "failed" of an
            error within a stream, "slow_reader", "timeout".
        code: of the error body.
        error: what went wrong in the server.
        model: the served one.
        strategy: that decoded it.
        is_stream: whether the answer was sent in pieces.
        prompt_tokens, completion_tokens, num_forwards, num_prefill_forwards: of all choices.
        finish_reason: of the first choice.
        first_block_seconds: from the headers to the first finished block.
        block_seconds: of each finished block, since the one before or since the headers.
    """

    method: str = ""
    path: str = ""
    client: str = ""
    request_id: str = field(default_factory=lambda: uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    is_complete: bool = False
    outcome: str | None = None
    code: str | None = None
    error: str | None = None
    model: str | None = None
    strategy: str | None = None
    is_stream: bool | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    num_forwards: int | None = None
    num_prefill_forwards: int | None = None
    finish_reason: str | None = None
    first_block_seconds: float | None = None
    block_seconds: list[float] = field(default_factory=list)
    _last_blocks: dict[int, float] = field(default_factory=dict)

    def block(self, choice: int = 0) -> None:
        """Note that a block of a choice is finished now."""
        now = time.monotonic()
        if self.first_block_seconds is None:
            self.first_block_seconds = now - self.began
        self.block_seconds.append(now - self._last_blocks.get(choice, self.began))
        self._last_blocks[choice] = now

    def fail(self, code: str | None, cause: BaseException | None = None) -> None:
        """Note an error body, and what in the server has led to it; None: the client has.

        A traceback may quote a request, so it is shown in debugging only.
        """
        self.code = code
        if cause is not None:
            self.error = in_a_line(cause)
            logger.debug("%s", "".join(traceback.format_exception(cause)))

    def ended(self) -> str:
        """How the request ended, in a word."""
        if self.outcome is not None:
            return self.outcome
        if self.status in (None, CLIENT_GONE) or not self.is_complete:
            return "cancelled"
        match self.status:
            case 429 | 503:
                return "overloaded"
            case status if status < 400:
                return "finished"
            case status:
                return "failed" if status >= 500 else "invalid"


def fields_of(record: Record, now: datetime, seconds: float) -> dict[str, Any]:
    """What a line of the log says of a request that has ended; what is not known is left out."""
    known = {
        "time": now.isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client": record.client,
        "method": shorten(record.method, LONGEST_PATH),
        "path": shorten(record.path, LONGEST_PATH),
        "status": record.status,
        "outcome": record.ended(),
        "code": record.code,
        "error": record.error,
        "model": record.model,
        "strategy": record.strategy,
        "stream": record.is_stream,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "num_forwards": record.num_forwards,
        "num_prefill_forwards": record.num_prefill_forwards,
        "finish_reason": record.finish_reason,
        "first_block_seconds": _rounded(record.first_block_seconds),
        "seconds": _rounded(seconds),
    }
    return {name: value for name, value in known.items() if value is not None}


def in_a_line(error: BaseException) -> str:
    """The type of an error and where it was raised; its message could quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}"


def as_json(fields: dict[str, Any]) -> str:
    """A line for programs."""
    return json.dumps(fields)


def as_text(fields: dict[str, Any]) -> str:
    """A line for people."""
    status = fields.get("status", "---")
    parts = [f"{fields['method']} {fields['path']}", f"{fields['seconds']:.3f} s"]
    parts += [fields[name] for name in ("model", "strategy") if name in fields]
    if "num_forwards" in fields:
        tokens, forwards = fields.get("completion_tokens", 0), fields["num_forwards"]
        tpf = ratio(tokens, forwards)
        parts.append(f"{tokens} tokens in {forwards} forwards ({tpf:.2f} per forward)")
    if "first_block_seconds" in fields:
        parts.append(f"first block {fields['first_block_seconds']:.3f} s")
    parts.append(fields["outcome"])
    parts += [fields[name] for name in ("code", "error") if name in fields]
    return printable(f"{fields['time'][11:19]} {status} {', '.join(parts)}")


class Journal:
    """Writes lines in a thread of its own.

    A full disk, a pipe that nobody reads and a stream that is closed cost lines, never a request.

    Args:
        file: lines are added to its end; None: they go to stderr.
        on_lost: told of every line that is not written; called in any thread.

    Raises:
        InputError: the file cannot be opened.
    """

    def __init__(self, file: Path | None, on_lost: Callable[[], None] = lambda: None) -> None:
        self._descriptor = _open(file)
        self._on_lost = on_lost
        self._is_torn = False  # the last line was written in part
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="dmax log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Write a line soon."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._on_lost()

    def close(self) -> None:
        """Write what is left, for as long as a second."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            start = "\n" if self._is_torn else ""
            left = memoryview(f"{start}{line}\n".encode(errors="backslashreplace"))
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
                    self._is_torn = bool(left)
            except OSError:
                self._on_lost()


def _open(file: Path | None) -> int:
    """A descriptor that lines are appended to."""
    if file is None and sys.__stderr__ is not None:
        return os.dup(sys.__stderr__.fileno())
    # A pipe without a reader is an error, and a full one costs lines: neither makes us wait.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(file or os.devnull, flags, 0o640)
    except (OSError, ValueError) as error:  # a name with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot write the log {shorten(str(file))}: {reason}", hint="choose another file"
        ) from None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
