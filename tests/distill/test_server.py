"""Distillation from a server: many requests in flight, and whatever can go wrong with them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import BODY, Fault, Server
from responder import by_index, counts, lines

from dmax import InputError
from dmax.distill.files import ResponseFiles
from dmax.distill.filters import Filters
from dmax.distill.responses import Prompt
from dmax.distill.run import Report, distill
from dmax.distill.server import ServerAnswerer, ServerOptions

pytest.importorskip("openai")

PROMPTS = [f"question {number}" for number in range(30)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a moment only before it tries again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "responses.jsonl"


def ask(
    server: Server | str,
    output: Path,
    prompts: list[Any] = PROMPTS,
    filters: Filters = Filters(),  # noqa: B008
    **options: Any,
) -> Report:
    url = server if isinstance(server, str) else server.url
    chosen = ServerOptions(url, **{"retries": 3, "timeout": 20.0, **options})
    return distill(ServerAnswerer(chosen), prompts, ResponseFiles(output), filters)


def first_times(fault: str, times: int, prompts: list[str]) -> Callable[[str, int], Fault]:
    """The first requests for these prompts fail."""
    return lambda prompt, number: fault if prompt in prompts and number <= times else None


def test_every_prompt_is_answered_once_with_many_requests_in_flight(output: Path) -> None:
    ten = threading.Barrier(10)  # nobody passes before ten are there
    prompts = [*PROMPTS, "one more"]  # the first goes alone
    with Server(wait=lambda prompt: prompt == PROMPTS[0] or ten.wait(60)) as server:
        report = ask(server, output, prompts, concurrency=10, timeout=60.0)
    assert counts(report) == (31, 31, {})
    assert server.asked == dict.fromkeys(prompts, 1)
    assert server.most_running == 10
    assert [record["index"] for record in by_index(output)] == list(range(31))
    assert by_index(output)[7] == {
        "index": 7,
        "prompt": "question 7",
        "response": "answer to question 7",
        "tokens": 4,
    }
    assert (report.tokens, report.tpf) == (124, None)


def test_what_a_request_says(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat: Prompt = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1, 2"}]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server(models=("one", "two")) as server:
        ask(server, output, [chat], model="two", max_new_tokens=99, fields={"top_p": 0.5})
    assert server.bodies == [
        {"model": "two", "messages": chat, "max_tokens": 99, "temperature": 0, "top_p": 0.5}
    ]
    assert server.keys == {"Bearer secret"}
    assert "secret" not in "".join(file.read_text() for file in output.parent.iterdir())
    [record] = lines(output)
    assert record["messages"] == [*chat, {"role": "assistant", "content": "answer to 1, 2"}]


def test_an_answer_that_did_not_end_by_itself_is_dropped(output: Path) -> None:
    with Server() as server:
        report = ask(server, output, ["one", "endless"], Filters(max_length=3))
        assert counts(report) == (2, 1, {"unfinished": 1})
        assert counts(ask(server, output, ["one", "endless"], Filters(max_length=3))) == counts(
            report
        )
    assert server.asked == {"one": 1, "endless": 1}


# ---- faults that pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429", "500", "dropped", "cut", *BODY])
def test_a_request_that_fails_is_tried_again(output: Path, fault: str) -> None:
    unlucky = PROMPTS[::7]
    with Server(first_times(fault, 2, unlucky)) as server:
        report = ask(server, output, concurrency=8)
    assert counts(report) == (30, 30, {})
    assert server.asked == {prompt: 3 if prompt in unlucky else 1 for prompt in PROMPTS}
    assert sorted(record["index"] for record in lines(output)) == list(range(30))


def test_a_request_that_the_server_forgets_is_tried_again(output: Path) -> None:
    with Server(first_times("silent", 1, PROMPTS[3:5])) as server:
        report = ask(server, output, concurrency=8, timeout=0.5)
    assert counts(report) == (30, 30, {})
    assert server.asked == {prompt: 2 if prompt in PROMPTS[3:5] else 1 for prompt in PROMPTS}


def test_a_prompt_that_the_server_refuses_is_dropped_with_the_reason(output: Path) -> None:
    with Server(first_times("400", 9, PROMPTS[4:6])) as server:
        report = ask(server, output, concurrency=8)
    assert counts(report) == (30, 28, {"refused": 2})
    assert max(server.asked.values()) == 1
    errors = [record["error"] for record in by_index(output.with_suffix(".dropped.jsonl"))]
    assert errors[0] == "prompt 4: the endpoint refuses it: maximum context length is 512 tokens"


# ---- faults that stay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("400", "prompt 0: the endpoint refuses it: maximum context length", None),
        ("401", "answers 401: Incorrect API key", "OPENAI_API_KEY"),
        ("404", "answers 404: The model `no` does not exist.", "/v1"),
        ("429", "answers 429: slow down", "--concurrency"),
        ("500", "answers 500: out of memory", "finished responses are kept"),
        ("dropped", "cannot reach http://127.0.0.1:.* in 4 tries", "finished responses are kept"),
        ("silent", "gave no answer within 0.2 seconds, in 4 tries", "--timeout"),
        ("malformed", "answers with something that is no chat completion", "OpenAI-compatible"),
        ("a page", "answers with something that is no chat completion", "OpenAI-compatible"),
    ],
)
def test_a_server_that_never_answers_is_one_sentence(
    output: Path, fault: str, message: str, hint: str | None
) -> None:
    timeout = 0.2 if fault == "silent" else 20.0
    with (
        Server(lambda prompt, times: fault) as server,
        pytest.raises(InputError, match=message) as caught,
    ):
        ask(server, output, ["one", "two"], timeout=timeout)
    assert "\n" not in caught.value.message
    assert hint is None or hint in str(caught.value.hint)
    # Only a refusal may be the fault of its prompt.
    assert server.asked.keys() == ({"one", "two"} if fault == "400" else {"one"})
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("fault", ["500", "dropped"])
def test_a_server_that_dies_midway_loses_nothing(output: Path, fault: str) -> None:
    later = PROMPTS[17:]
    with (
        Server(lambda prompt, times: fault if prompt in later else None) as dead,
        pytest.raises(InputError, match="500|cannot reach"),
    ):
        ask(dead, output, concurrency=4)
    kept = lines(output)
    assert len(kept) >= 13
    with Server() as server:
        assert counts(ask(server, output, concurrency=4)) == (30, 30, {})
    assert lines(output)[: len(kept)] == kept
    answered = {record["prompt"] for record in kept}
    assert server.asked == {prompt: 1 for prompt in PROMPTS if prompt not in answered}


def test_nobody_listens(output: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot reach http://127.0.0.1:{port}/v1: "):
            ask(f"http://127.0.0.1:{port}", output)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:port/"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="`--endpoint` must be an address, got"):
        ServerAnswerer(ServerOptions(url, model="a"))


def test_an_address_without_a_path_means_v1() -> None:
    with Server() as server:
        answerer = ServerAnswerer(ServerOptions(server.url.removesuffix("/v1")))
    assert answerer.settings()["endpoint"]["model"] == "served"


@pytest.mark.parametrize("models", [(), ("one", "two")])
def test_a_server_with_another_number_of_models_asks_for_a_choice(models: tuple[str, ...]) -> None:
    with Server(models=models) as server, pytest.raises(InputError) as caught:
        ServerAnswerer(ServerOptions(server.url))
    assert ", ".join(models) in caught.value.message
    assert "--endpoint-model" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 10**6}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_an_option_out_of_range(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be"):
        ServerOptions("http://localhost", **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_a_number_that_no_request_can_carry(value: Any) -> None:
    with pytest.raises(InputError, match="`top_p` must have finite numbers only, got") as caught:
        ServerOptions("http://localhost", fields={"top_p": value})
    assert caught.value.hint == "JSON knows neither NaN nor infinity"


def test_white_space_around_the_key_is_no_part_of_it(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " secret\r\n")
    with Server() as server:
        ask(server, output, ["one"])
        assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize("key", ["schlüssel", "one\ntwo"])
def test_a_key_that_no_request_can_carry(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="the key in OPENAI_API_KEY holds characters") as caught:
        ServerAnswerer(ServerOptions("http://127.0.0.1:1", model="served"))
    assert key not in str(caught.value)


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:1", "http://127.0.0.1:port"])
@pytest.mark.parametrize("model", ["served", None])
def test_a_proxy_that_cannot_be_used(
    output: Path, monkeypatch: pytest.MonkeyPatch, proxy: str, model: str | None
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with Server() as server:
        with pytest.raises(InputError, match="a proxy in the environment cannot be used") as caught:
            ask(server, output, ["one"], model=model)
        assert "NO_PROXY='*'" in str(caught.value.hint)
        monkeypatch.setenv("NO_PROXY", "*")
        assert ask(server, output, ["one"], model=model).kept == 1


def test_socks_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(InputError, match="cannot be used: .*socksio") as caught:
        ServerAnswerer(ServerOptions("http://127.0.0.1:1"))
    assert "name an HTTP proxy" in str(caught.value.hint)


def test_another_model_does_not_continue_the_responses(output: Path) -> None:
    with Server(models=("one", "two")) as server:
        ask(server, output, ["one"], model="one")
        with pytest.raises(InputError, match="`endpoint.model` was 'one' and is 'two'"):
            ask(server, output, ["one"], model="two")


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr("dmax.extras.find_spec", lambda module: None)
    with pytest.raises(InputError, match="asking a server needs the package `openai`") as caught:
        ServerAnswerer(ServerOptions("http://localhost"))
    assert "[endpoint]" in str(caught.value.hint)


def test_asking_a_server_loads_no_torch(output: Path) -> None:
    program = (
        "import sys\n"
        "class End:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'transformers'): sys.exit(f'{name} is loaded')\n"
        "sys.meta_path.insert(0, End())\n"
        "from dmax_command import main; main()"
    )
    with Server() as server:
        words = ["distill", "--endpoint", server.url, "--num", "3", "--output", str(output)]
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert len(lines(output)) == 3


def test_tokens_need_not_be_counted(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"choices": [{"message": {"content": "Two."}, "finish_reason": "stop"}]}
    monkeypatch.setitem(BODY, "bare", json.dumps(answer).encode())
    with Server(lambda prompt, times: "bare") as server:
        report = ask(server, output, ["one"])
        assert (report.kept, report.tokens) == (1, 0)
        with pytest.raises(InputError, match="does not say how many tokens"):
            ask(server, output.with_name("other.jsonl"), ["one"], Filters(min_length=1))
    assert lines(output) == [{"index": 0, "prompt": "one", "response": "Two."}]
