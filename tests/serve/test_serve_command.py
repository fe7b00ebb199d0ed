"""`dmax serve` as its users start it, with a bundled model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
from test_boundary import ENVIRONMENT, command
from test_cli import Dmax, assert_refused, dmax_fixture  # noqa: F401  (a fixture)

from dmax import extras
from dmax.engine.engine import Engine
from dmax.params import DecodingParams
from dmax.serve.run import bind
from dmax.serve.served import ServedModel

QUESTION = [{"role": "user", "content": "How many legs do 3 cats have?"}]
SERVED = "tiny-dmax"


class Server:
    """`dmax serve` with a bundled model, in a process of its own.

    Attributes:
        greeting: what it has said on stdout.
        url: where it is.
    """

    def __init__(self, log: Path, *words: str, **variables: str) -> None:
        self._log = log
        with log.open("w") as stderr:
            self.child = subprocess.Popen(
                command("serve", "--model", SERVED, "--port", "0", "--log-json", *words),
                env=ENVIRONMENT | variables,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.child.stdout is not None
        self.greeting = [self.child.stdout.readline() for _ in range(4)]
        self.url = self.greeting[1].split()[-1].rstrip("/")

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300)

    def lines(self) -> list[dict[str, object]]:
        """The lines of its log about requests."""
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "log", "--shutdown-timeout", "300", DMAX_API_KEY="my-key")
    yield server
    server.child.kill()
    server.child.communicate()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_what_it_says_works_and_a_signal_ends_it_cleanly(keyed: Server) -> None:
    names = [line.split()[0] for line in keyed.greeting]
    assert names == ["serving", "playground", "API", "try"]
    shell = ["sh", "-c", keyed.greeting[3].removeprefix("try").replace("curl", "curl -sS")]
    done = subprocess.run(
        shell, env=os.environ | {"DMAX_API_KEY": "my-key"}, capture_output=True, check=True
    )
    assert "#### 17" in json.loads(done.stdout)["choices"][0]["message"]["content"]
    with pytest.raises(openai.AuthenticationError, match="the key is wrong"):
        keyed.client("wrong").models.list()
    assert httpx.get(f"{keyed.url}/metrics").status_code == 401
    figures = httpx.get(f"{keyed.url}/metrics", headers={"Authorization": "Bearer my-key"}).text
    answered = r'dmax:requests_total\{model_name="tiny-dmax",outcome="finished",route="/v1/chat/'
    assert re.search(answered, figures)

    def stream(number: int) -> str:
        """What came of an answer that was being written when the server was told to end."""
        with keyed.client("my-key") as client:
            chunks = client.chat.completions.create(
                model=SERVED,
                messages=QUESTION,  # type: ignore[arg-type]
                max_tokens=200,
                stream=True,
                extra_body={"dmax": {"ignore_eos": True}},
            )
            reasons = []
            for chunk in chunks:
                has_begun.append(number)
                reasons += [choice.finish_reason for choice in chunk.choices]
        return str(reasons[-1])

    has_begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, number) for number in range(4)]
        while len(set(has_begun)) < 4:
            with suppress(subprocess.TimeoutExpired):
                keyed.child.wait(0.01)
        keyed.child.send_signal(signal.SIGTERM)
        assert [each.result() for each in running] == ["length"] * 4
    assert keyed.child.wait(300) == 0
    outcomes = [line["outcome"] for line in keyed.lines() if line["path"] == "/v1/chat/completions"]
    assert outcomes == ["finished"] * 5
    assert "my-key" not in str(keyed.lines()) and "legs" not in str(keyed.lines())


@pytest.mark.parametrize(("words", "num_warmed"), [((), 1), (("--no-warm-up",), 0)])
def test_a_model_gets_ready_before_its_first_request(
    dmax: Dmax, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], num_warmed: int
) -> None:
    served = list[ServedModel]()
    warmed = list[Engine]()

    def keep(_: object, models: list[ServedModel], *rest: object, **more: object) -> None:
        served.extend(models)

    def warm_up(engine: Engine, params: DecodingParams) -> None:
        warmed.append(engine)

    monkeypatch.setattr("dmax.serve.run.run", keep)
    monkeypatch.setattr("dmax.serve.run.leave", lambda: None)
    monkeypatch.setattr("dmax.llm.warm_up", warm_up)
    dmax("serve", "--model", SERVED, "--port", "0", *words)
    (model,) = served
    assert warmed == []
    model.load()
    assert len(warmed) == num_warmed
    model.close()


def test_wrong_models_ports_and_keys_are_one_sentence(
    dmax: Dmax,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(dmax("serve", "--port", port), f"port {port} is in use")
    assert_refused(dmax("serve", "--port", "0", "--model", "tiny-dmx"), "tiny-dmx")
    missing = str(tmp_path / "keys")
    assert_refused(dmax("serve", "--api-key-file", missing), "No such file")
    monkeypatch.setenv("DMAX_API_KEY", "")
    assert_refused(dmax("serve"), "DMAX_API_KEY holds no key")
    monkeypatch.delenv("DMAX_API_KEY")
    assert_refused(dmax("serve", "--max-queue", "-1"), "`max_queue` must be")
    for words in (("--allowed-host", "https://a.example"), ("--cors-origin", "a.example")):
        assert_refused(dmax("serve", "--port", "0", *words), f"`{words[0]}` must be", words[1])
    twice = dmax("serve", "--port", "0", "--model", SERVED, "--model", SERVED)
    assert_refused(twice, "no two of the same name")
    assert_refused(
        dmax("serve", "--log-file", str(tmp_path), "--port", "0"), "cannot write the log"
    )


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    has = extras.has
    monkeypatch.setattr(extras, "has", lambda name: name != package and has(name))
    result = dmax("serve")
    assert_refused(result, f"needs the package `{package.replace('_', '-')}`")
    assert "pip" in result.err and "serve" in result.err


def test_help_loads_no_server() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: sys.stderr.write(' '.join(sys.modules)));"
        "from dmax_command import main; sys.argv = ['dmax', 'serve', '--help']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fastapi", "starlette", "uvicorn", "torch"} & set(done.stderr.split())
