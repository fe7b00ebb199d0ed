"""Answers as server-sent events: settled text as it comes and, if asked for, every forward."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dmax.outputs import StreamEvent
from dmax.serve.answers import Answer, Choice, Piece
from dmax.serve.errors import ApiError, ClientGone
from dmax.serve.replies import DONE
from dmax.serve.served import Ongoing

MEDIA_TYPE = "text/event-stream"
LAST = f"data: {DONE}\n\n".encode()
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy keeps it back


def sse(data: dict[str, Any]) -> bytes:
    """An event with a JSON object."""
    return b"data: %b\n\n" % json.dumps(data, separators=(",", ":")).encode()


class Chunks:
    """The chunks of an answer.

    Args:
        answer: whose events they are made of.
    """

    def __init__(self, answer: Answer) -> None:
        asked = answer.asked
        self._answer = answer
        self._is_chat = asked.is_chat
        self._is_provisional = asked.is_provisional
        self._include_usage = asked.include_usage
        kind = "chat.completion.chunk" if asked.is_chat else "text_completion"
        self._head = {**answer.head, "object": kind}

    def begin(self) -> Iterator[bytes]:
        """What is known before the first forward."""
        for choice in self._answer.choices:
            if self._is_chat:
                yield self._chunk(choice, Piece("", None), role="assistant")
            if self._is_provisional:
                prompt = self._answer.asked.prompts[choice.index]
                header = choice.frames.header(self._answer.model.name, prompt)
                yield self._extra(choice, {"kind": "begin", **header})

    def step(self, events: Sequence[StreamEvent]) -> Iterator[bytes]:
        """What comes of the events of a step."""
        for event in events:
            choice = self._answer.choices[event.index]
            self._answer.note(event)
            choice.follow(event)
            if event.kind == "finished":
                yield from self._finish(choice, event)
                continue
            if self._is_provisional:
                yield self._extra(choice, choice.frames.frame(event).as_record())
            if event.kind == "committed":
                piece = choice.settle(event)
                if piece.text or _has_tokens(piece):
                    yield self._chunk(choice, piece)

    def end(self) -> Iterator[bytes]:
        """What stands after the last choice."""
        if self._include_usage:
            usage = {"choices": [], "usage": self._answer.usage()}
            yield sse({**self._head, **usage})
        yield LAST

    def _finish(self, choice: Choice, event: StreamEvent) -> Iterator[bytes]:
        piece = choice.finish(event)
        if piece.text or _has_tokens(piece):
            yield self._chunk(choice, piece)
        record = {"kind": "finished", "index": choice.index, **choice.record()}
        yield self._chunk(choice, Piece("", None), finish_reason=choice.finish_reason, dmax=record)

    def _chunk(
        self,
        choice: Choice,
        piece: Piece,
        *,
        role: str | None = None,
        finish_reason: str | None = None,
        dmax: dict[str, Any] | None = None,
    ) -> bytes:
        content: dict[str, Any] = {"text": piece.text}
        if self._is_chat:
            is_last = finish_reason is not None
            delta = {} if is_last else {"content": piece.text}
            content = {"delta": delta if role is None else {"role": role, **delta}}
        part = {
            "index": choice.index,
            **content,
            "logprobs": piece.logprobs,
            "finish_reason": finish_reason,
        }
        return self._written({"choices": [part]}, dmax)

    def _extra(self, choice: Choice, dmax: dict[str, Any]) -> bytes:
        """A chunk that standard clients pass over."""
        return self._written({"choices": []}, {"index": choice.index, **dmax})

    def _written(self, chunk: dict[str, Any], dmax: dict[str, Any] | None) -> bytes:
        extra: dict[str, Any] = {"usage": None} if self._include_usage else {}
        if dmax is not None:
            extra["dmax"] = dmax
        return sse({**self._head, **chunk, **extra})


def _has_tokens(piece: Piece) -> bool:
    logprobs = piece.logprobs or {}
    return bool(logprobs.get("content") or logprobs.get("tokens"))


class StreamResponse(Response):
    """An answer that is sent while it is decoded. A client that leaves ends the request.

    Args:
        ongoing: the request, which has been queued.
        answer: what is made of its events.
    """

    media_type = MEDIA_TYPE

    def __init__(self, ongoing: Ongoing, answer: Answer) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._ongoing = ongoing
        self._chunks = Chunks(answer)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; an error that comes after the headers is the last event."""
        with self._ongoing, watched(receive, self._ongoing):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await _send(send, self._chunks.begin())
                async for events in self._ongoing.steps():
                    await _send(send, self._chunks.step(events))
                await _send(send, self._chunks.end())
            except ClientGone:
                self._answer.leave()
                return
            except ApiError as error:
                self._answer.fail(error)
                await _send(send, [sse(error.body()), LAST])
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, chunks: Iterable[bytes]) -> None:
    """Send chunks together; waits while the client does not read."""
    body = b"".join(chunks)
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


@contextmanager
def watched(receive: Receive, ongoing: Ongoing) -> Iterator[None]:
    """Have a request end as soon as its client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ongoing.end(ClientGone())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
