"""A server with OpenAI's interface that answers at once, or fails as it is told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str | None
# What a fault answers: status and body.
STATUS = {
    "400": (400, {"error": {"message": "maximum context length is 512 tokens"}}),
    "401": (401, {"error": {"message": "Incorrect API key"}}),
    "404": (404, {"error": {"message": "The model `no` does not exist."}}),
    "429": (429, {"error": {"message": "slow down"}}),
    "500": (500, {"error": {"message": "out of memory"}}),
}
# What comes after the first two events of a stream: the connection is lost, nothing comes any more,
# it ends as if it were whole, an event is no JSON, or it says what went wrong.
MIDWAY: dict[str | None, list[str]] = {
    "torn": [],
    "hanging": [],
    "unfinished": ["data: [DONE]\n\n"],
    "malformed event": ['data: {"choices": [{"ind\n\n'],
    "another event": ["data: [1]\n\n"],
    "error event": ['data: {"error": {"message": "out of memory"}}\n\n'],
}
BODY = {
    "malformed": b'{"choices": [{"mess',
    "no choices": b"{}",
    "null": b"null",
    "a page": b"<html>Welcome</html>",
    "other types": b'{"choices": [{"message": {"content": [1]}, "finish_reason": 3}], "usage": 7}',
    "half a letter": (
        b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}'
    ),
}


class Server(ThreadingHTTPServer):
    """Answers on a free port of this machine; a context, in which `url` is its address.

    Args:
        fault: what goes wrong with a prompt when it is asked for the n-th time, n from 1: a key of
            `STATUS`, `BODY` or, of streams, `MIDWAY`, "dropped", "cut", "silent" or None.
        delay: seconds that an answer takes.
        wait: called with a prompt before it is answered.
        models: those that it serves.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # connections that wait to be accepted

    def __init__(
        self,
        fault: Callable[[str, int], Fault] = lambda prompt, times: None,
        delay: float = 0.0,
        wait: Callable[[str], object] = lambda prompt: None,
        models: tuple[str, ...] = ("served",),
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault = fault
        self.delay = delay
        self.wait = wait
        self.models = models
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.num_running = self.most_running = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        data = [{"id": name, "object": "model"} for name in self.server.models]
        self.reply(200, json.dumps({"object": "list", "data": data}).encode())

    def do_POST(self) -> None:
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        with server.lock:
            server.asked[prompt] += 1
            server.bodies.append(asked)
            server.keys.add(self.headers["Authorization"])
            server.num_running += 1
            server.most_running = max(server.most_running, server.num_running)
            fault = server.fault(prompt, server.asked[prompt])
        try:
            time.sleep(server.delay)
            server.wait(prompt)
            self.answer(prompt, fault, is_stream=bool(asked.get("stream")))
        finally:
            with server.lock:
                server.num_running -= 1

    def answer(self, prompt: str, fault: Fault, *, is_stream: bool) -> None:
        if fault == "dropped":
            self.close_connection = True
        elif fault == "silent":
            self.server.ended.wait()
            self.close_connection = True
        elif fault in STATUS:
            status, error = STATUS[fault]
            self.reply(status, json.dumps(error).encode(), retry=status in (429, 500))
        elif fault in BODY:
            self.reply(200, BODY[fault])
        else:
            reason = "length" if "endless" in prompt else "stop"
            text = f"answer to {prompt}"
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
            usage = {"completion_tokens": len(text.split())}
            if is_stream:
                self.stream(text, reason, usage, fault)
                return
            body = json.dumps({"choices": [{"index": 0, **choice}], "usage": usage}).encode()
            self.reply(200, body, is_cut=fault == "cut")

    def stream(self, text: str, reason: str, usage: dict[str, int], fault: Fault) -> None:
        """The text as events, a word at a time."""
        deltas = [{"content": word} for word in re.findall(r"\S+\s*", text)]
        parts: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
        ]
        parts.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        parts.append({"choices": [], "usage": usage})
        events = [f"data: {json.dumps(part)}\n\n" for part in parts] + ["data: [DONE]\n\n"]
        if fault in MIDWAY:
            events = [*events[:2], *MIDWAY[fault]]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self.wfile.write(f"{len(event.encode()):x}\r\n{event}\r\n".encode())
        if fault == "hanging":
            self.server.ended.wait()
        if fault != "torn":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def reply(self, status: int, body: bytes, *, retry: bool = False, is_cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry:
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection |= is_cut
