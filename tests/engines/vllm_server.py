"""vLLM's server in a process of its own, for cases that ask it over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from types import TracebackType

import openai
from prometheus_client.parser import text_string_to_metric_families

NAME = "tiny"
START_SECONDS = 300
SMALL = """
--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 4 --max-num-batched-tokens 512
--kv-cache-memory-bytes 67108864
""".split()
"""Sizes for a CPU; nothing that a checkpoint would need."""


class Server:
    """A server over a checkpoint, while its context is open.

    Attributes:
        address: where it listens.
        client: OpenAI's client for it.
    """

    def __init__(self, model: str, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300
        )
        # Not the command `vllm serve`: it asks for metadata by a name that CPU builds do not have.
        module = ["-m", "vllm.entrypoints.openai.api_server"]
        place = ["--model", model, "--served-model-name", NAME, "--port", str(port)]
        self._command = [sys.executable, *module, *place, *SMALL, *arguments]

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()
        # As in production: the engine core has a process of its own.
        variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self._process = subprocess.Popen(
            self._command,
            env=variables,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self.log()
                self.__exit__(None, None, None)
                raise RuntimeError(f"the server did not start:\n{said[-4000:]}")
            time.sleep(0.5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def log(self) -> str:
        """All that it has said."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over what has these labels; 0 where there is nothing yet."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as response:
            text = response.read().decode()
        samples = (
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        )
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def _is_healthy(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
            return True
        return False
