"""An answer that a server streams, and what `dmax serve` says of it beside the text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cache
from itertools import chain
from typing import Any

from dmax.chat.responder import Outcome, Part
from dmax.errors import InputError
from dmax.trace import schema
from dmax.trace.file import json_schema
from dmax.trace.frames import Frame

FRAMES = ("provisional", "committed")
OF_A_STREAM = ("kind", "index")  # of records, which traces have no use for
OF_THE_END = ("frames", "output")  # of a trace, which its header does not have
FIELDS = [field.name for field in fields(Frame)]


class ServerAnswer:
    """As `dmax.chat.responder.Answer`.

    Args:
        stream: chunks of the package `openai`.
        began: when it was asked for, by `time.perf_counter`.
        asking: a context that says in one sentence what goes wrong with a server.

    Attributes:
        num_new: tokens that the answer may have, if the server says so once it has begun.
    """

    def __init__(
        self, stream: Any, began: float, asking: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.eos_token_ids: Collection[int] = ()
        self.outcome: Outcome | None = None
        self.num_new: float = math.inf
        self._stream = stream
        self._began = began
        self._asking = asking
        self._first: list[Any] = []  # chunks that were read to see how it begins
        self._header: dict[str, Any] = {}
        self._frames: list[dict[str, Any]] = []
        self._output: dict[str, Any] = {}

    def begin(self) -> None:
        """Wait until the server says how it decodes, or begins to answer.

        Raises:
            ValueError: it says something else.
        """
        for chunk in self._stream:
            self._first.append(chunk)
            record = _record(chunk)
            if record.get("kind") == "begin":
                self._header = _without(record, OF_A_STREAM)
                _check(self._header, _header_schema())
                self.eos_token_ids = self._header["eos_token_ids"]
                self.num_new = self._header["params"]["max_new_tokens"]
            if record or _text(chunk):
                return

    def __iter__(self) -> Iterator[Part]:
        """Its parts, as the server sends them.

        Raises:
            InputError: the server fails, or ends before the answer does.
        """
        finish_reason = None
        num_tokens = None
        with self._asking():
            for chunk in chain(self._first, self._stream):
                part = Part(_text(chunk), self._frame(_record(chunk)))
                if chunk.choices:
                    finish_reason = chunk.choices[0].finish_reason or finish_reason
                if chunk.usage is not None:
                    num_tokens = chunk.usage.completion_tokens
                if part != Part():
                    yield part
            if finish_reason is None:
                raise EOFError
            self.outcome = Outcome(
                seconds=self._output.get("seconds", time.perf_counter() - self._began),
                finish_reason=str(finish_reason),
                num_tokens=None if num_tokens is None else int(num_tokens),
                num_forwards=self._output.get("num_forwards"),
                tokens_per_forward=self._output.get("tokens_per_forward"),
            )

    def trace(self) -> dict[str, Any]:
        """As `Answer.trace`."""
        if not (self._header and self._output):
            raise InputError("this server shows no forwards, so there is nothing to trace")
        return {**self._header, "frames": self._frames, "output": self._output}

    def close(self) -> None:
        """As `Answer.close`; the server notices, and frees the slot."""
        self._stream.close()

    def _frame(self, record: Mapping[str, Any]) -> Frame | None:
        """A frame, if that is what a record is; it is kept for the trace, as the output is.

        Raises:
            ValueError: the record is damaged.
        """
        kind = record.get("kind")
        if kind in FRAMES:
            frame = _without(record, ("index",))
            _check(frame, _schema_of("frame"))
            self._frames.append(frame)
            known = {name: frame[name] for name in FIELDS if name in frame}
            return Frame(**{"candidates": [], **known})
        if kind == "finished":
            self._output = _without(record, OF_A_STREAM)
            _check(self._output, _schema_of("output"))
        return None


def _text(chunk: Any) -> str:
    """The text in a chunk.

    Raises:
        UnicodeEncodeError: JSON can write what no text holds.
    """
    text = chunk.choices[0].delta.content or "" if chunk.choices else ""
    text.encode()
    return str(text)


def _record(chunk: Any) -> Mapping[str, Any]:
    """What `dmax serve` says in a chunk beside the text; empty if nothing."""
    record = getattr(chunk, "dmax", None)
    return record if isinstance(record, Mapping) else {}


def _without(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _check(value: Any, expected: Mapping[str, Any]) -> None:
    if complaint := schema.complaint(value, expected):
        raise ValueError(complaint)


@cache
def _header_schema() -> dict[str, Any]:
    whole = json_schema()
    required = [name for name in whole["required"] if name not in OF_THE_END]
    return {**whole, "required": required}


@cache
def _schema_of(part: str) -> dict[str, Any]:
    return {**json_schema(), "$ref": f"#/$defs/{part}"}
