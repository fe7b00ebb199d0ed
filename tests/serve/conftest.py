"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI
from running import Running, served

from dmax.serve.settings import ServerOptions


@pytest.fixture(scope="session", name="server")
def server_fixture() -> Iterator[Running]:
    options = ServerOptions()
    models = [served(name, options) for name in ("tiny-dmax", "tiny-base")]
    with Running(*models, options=options) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
