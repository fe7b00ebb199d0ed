"""A server from its start to its end, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import toy_server
from toy_server import Answer, get, post, read_answer

from dmax.errors import InputError
from dmax.serve.run import bind, greeting, url_of

PROMPTLY = 120  # seconds that nothing here takes, by far


class Process:
    """The toy server as a process of its own."""

    def __init__(self, **given: Any) -> None:
        words = [sys.executable, toy_server.__file__, json.dumps(given)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.child = subprocess.Popen(words, text=True, **pipes)  # type: ignore[call-overload]
        self.port = int(self.line())

    def line(self) -> str:
        """The next line that it writes."""
        return self.child.stdout.readline().strip()

    def ready(self) -> Process:
        """Itself, once its model is loaded."""
        assert self.line() == "ready"
        return self

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PROMPTLY)

    def ask(self, request: bytes) -> Answer:
        with self.connect() as connection:
            connection.sendall(request)
            return read_answer(connection)

    def begin(self, request: bytes) -> socket.socket:
        """A connection with a request whose answer has begun."""
        connection = self.connect()
        connection.sendall(request)
        while not connection.recv(2**16).endswith(b"begun\n\r\n"):
            pass
        return connection

    def is_listening(self) -> bool:
        try:
            self.connect().close()
        except ConnectionError:
            return False
        return True

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal, and wait until no more connections are taken."""
        self.child.send_signal(number)
        while self.is_listening():
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(0.02)

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """The code that it exits with, and the lines of its log."""
        _, stderr = self.child.communicate(timeout=PROMPTLY)
        return self.child.returncode, [json.loads(line) for line in stderr.splitlines()]


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    processes = []

    def start_one(**given: Any) -> Process:
        processes.append(Process(**given))
        return processes[-1]

    yield start_one
    for process in processes:
        process.child.kill()
        process.child.communicate()


def rest(connection: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    data = b""
    while more := connection.recv(2**16):
        data += more
    connection.close()
    return data


# --- the beginning --------------------------------------------------------------------------------


def test_it_answers_while_its_model_is_loaded(start: Start) -> None:
    server = start(load="never")
    assert server.ask(get("/health")).status == 503
    server.child.send_signal(signal.SIGTERM)
    code, lines = server.end()  # although the loading goes on
    assert code == 0
    assert [line["path"] for line in lines] == ["/health"]


def test_once_it_is_ready_it_says_so(start: Start) -> None:
    assert start().ready().ask(get("/health")).status == 200


@pytest.mark.parametrize(
    ("load", "said"),
    [("bad input", "dmax.errors.InputError: there is no model"), ("bug", "RuntimeError: a bug")],
)
def test_a_model_that_cannot_be_loaded_ends_it(start: Start, load: str, said: str) -> None:
    server = start(load=load)
    _, stderr = server.child.communicate(timeout=PROMPTLY)
    assert said in stderr  # raised again: `dmax` makes a sentence of it
    assert server.child.returncode == 1


def test_a_port_in_use_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use") as info:
            bind("127.0.0.1", port)
    assert "--port" in str(info.value)
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "a\ud800", "127.0.0.1:80"])
def test_an_address_that_this_machine_has_not(host: str) -> None:
    with pytest.raises(InputError, match="this machine has no address"):
        bind(host, 0)


def test_the_address_that_is_shown_is_one_that_works() -> None:
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")):
        with bind(host, 0) as listener:
            assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6")
def test_the_address_of_the_newer_protocol_is_shown_in_brackets() -> None:
    with bind("::1", 0) as listener:
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_the_command_to_try_is_one_for_the_shell() -> None:
    text = greeting("http://127.0.0.1:8000", ["it's mine", "other"], has_keys=True)
    assert "playground  http://127.0.0.1:8000/\n" in text
    [line] = [each for each in text.splitlines() if each.startswith("try ")]
    command = line.removeprefix("try").replace("curl", "printf '%s\\n'")
    done = subprocess.run(
        ["sh", "-c", command],
        env=os.environ | {"DMAX_API_KEY": "my-key"},
        capture_output=True,
        text=True,
        check=True,
    )
    url, flag, key, *_, body = done.stdout.splitlines()
    assert (url, flag) == ("http://127.0.0.1:8000/v1/chat/completions", "-H")
    assert key == "Authorization: Bearer my-key"
    assert json.loads(body)["model"] == "it's mine"
    assert "Authorization" not in greeting("http://127.0.0.1:8000", ["a"], has_keys=False)


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_begun_is_finished(start: Start, number: signal.Signals) -> None:
    server = start(shutdown_seconds=PROMPTLY).ready()
    running = server.begin(get("/told"))
    idle, slow = server.connect(), server.connect()
    slow.sendall(b"GET / HT")
    server.stop(number)
    assert rest(idle) == rest(slow) == b""
    server.child.stdin.write("the end\n")
    server.child.stdin.flush()
    assert rest(running).endswith(b"the end\n\r\n0\r\n\r\n")
    code, lines = server.end()
    assert code == 0
    assert [line["outcome"] for line in lines] == ["finished"]


def test_what_does_not_finish_in_time_gets_an_error(start: Start) -> None:
    server = start(shutdown_seconds=0.5).ready()
    heeds = server.begin(get("/heeds"))  # its model is told to end it
    with server.connect() as ignores, server.connect() as sends:
        ignores.sendall(get("/ignores"))
        assert server.line() == "ignoring"
        sends.sendall(post("/echo", b"").replace(b"Length: 0", b"Length: 10") + b"{")
        server.child.send_signal(signal.SIGTERM)
        assert b'"code": "shutting_down"' in rest(heeds)
        for connection in (ignores, sends):
            answer = read_answer(connection)
            assert (answer.status, answer.code) == (503, "shutting_down")
    code, lines = server.end()
    assert code == 0
    assert sorted(line["outcome"] for line in lines) == ["finished", "stopped", "stopped"]


def test_who_comes_while_it_ends_keeps_it_from_nothing(start: Start) -> None:
    server = start(shutdown_seconds=3600).ready()
    server.child.send_signal(signal.SIGTERM)
    while server.is_listening():  # as many as there can be are accepted at the last moment
        pass
    assert server.end()[0] == 0


def test_without_any_time_it_ends_at_once(start: Start) -> None:
    server = start(shutdown_seconds=0).ready()
    running = server.begin(get("/heeds"))
    server.child.send_signal(signal.SIGTERM)
    assert b"begun" not in rest(running)
    assert server.end()[0] == 0


def test_a_model_that_does_not_end_is_left_behind(start: Start) -> None:
    server = start(load="closes never", shutdown_seconds=0.2).ready()
    server.child.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start: Start, second: signal.Signals) -> None:
    server = start(shutdown_seconds=3600).ready()
    running = server.begin(get("/told"))
    server.stop()
    server.child.send_signal(second)
    assert server.child.wait(PROMPTLY) == -second
    running.close()


def test_after_a_kill_the_port_is_free(start: Start) -> None:
    first = start().ready()
    running = first.begin(get("/told"))
    first.child.kill()
    first.child.wait()
    again = start(port=first.port).ready()
    assert again.port == first.port
    assert again.ask(get("/")).body == b"a page"
    running.close()


def test_its_log_can_be_a_full_disk(start: Start) -> None:
    server = start(log_file="/dev/full").ready()
    for _ in range(3):
        assert server.ask(post("/echo", b"{}")).body == b"{}"
    server.stop()
    assert server.end() == (0, [])


def test_it_serves_without_anything_to_write_to() -> None:
    words = [sys.executable, toy_server.__file__, json.dumps({"shutdown_seconds": 0})]
    closed = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *words]
    with subprocess.Popen(closed, stdout=subprocess.PIPE, text=True) as child:
        port = int(child.stdout.readline())
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), timeout=PROMPTLY) as connection:
                connection.sendall(post("/echo", b"{}"))
                assert read_answer(connection).body == b"{}"
        child.terminate()
        assert child.wait(PROMPTLY) == 0


def test_its_log_is_in_a_file_and_has_neither_keys_nor_bodies(start: Start, tmp_path: Path) -> None:
    server = start(log_file=str(tmp_path / "log"), api_keys=["my-key"]).ready()
    with_key = "Authorization: Bearer my-key"
    for request in (
        post("/echo?my-key", b'"my prompt"', with_key),
        post("/echo", b'"my prompt', with_key),
        post("/fail", b"{}", with_key),
        post("/echo", b'"my prompt"', "Authorization: Bearer my-wrong-key"),
    ):
        server.ask(request)
    server.stop()
    assert server.end() == (0, [])
    text = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 400, 500, 401]
    assert lines[2]["error"].startswith("ValueError in fail")
    assert "my-" not in text and "prompt" not in text and "secret" not in text
