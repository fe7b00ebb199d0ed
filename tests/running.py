"""A server in a thread of the test, on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from dmax import LLM, StreamEvent
from dmax.engine.engine import Engine
from dmax.serve.app import create_app
from dmax.serve.served import ServedModel
from dmax.serve.settings import ServerOptions

TINY = "tiny-dmax"
QUESTION = (
    "Jack starts the week with 8 mugs. Later Jack hands 2 mugs to a teacher. Jack throws away "
    "4 broken mugs. A friend gives Jack 5 more mugs. Jack wins 6 mugs in a game. Jack receives "
    "4 mugs as a present. How many mugs does Jack end up with?"
)


def served(name: str, options: ServerOptions, **settings: Any) -> ServedModel:
    """A bundled model, loaded; in float32, in which the same request always gives the same."""
    open_llm = partial(
        LLM, name, dtype="float32", max_batch_size=options.max_batch_size, **settings
    )
    model = ServedModel(name, open_llm, options)
    model.load()
    return model


class Running:
    """A server; a context, in which `url` is its address.

    Args:
        models: that it serves.
        options: its limits.
    """

    def __init__(self, *models: ServedModel, options: ServerOptions | None = None) -> None:
        self.models = models
        self.app = create_app(models, options or ServerOptions())
        config = uvicorn.Config(self.app, "127.0.0.1", 0, log_level="warning", lifespan="off")
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> Running:
        self._thread.start()
        self._server.is_listening.wait()
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def client(self, **settings: Any) -> OpenAI:
        """A client as its users have it, but for retries, which would hide errors."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        return OpenAI(base_url=f"{self.url}/v1", **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        """The response to a body that no client of OpenAI's would send."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **settings)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


def until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so; fails if it does not become so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


class Gate:
    """Has the models wait before each step, while it is closed. A context, closed at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        self._is_open = threading.Event()
        take_step = Engine.step

        def step(engine: Engine) -> list[StreamEvent]:
            self._is_open.wait()
            self.num_steps += 1
            return take_step(engine)

        monkeypatch.setattr(Engine, "step", step)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        """Let the models go on."""
        self._is_open.set()
