"""Connections that a client does not use, over real sockets: the server closes them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from toy_server import Served, get, post, read_answer, serving

from dmax.serve import protocol


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    with serving(header_seconds=0.2, body_seconds=0.2, max_body_bytes=1000) as served:
        yield served


def drip(connection: socket.socket, text: bytes) -> bytes:
    """Send a byte at a time until the server has had enough; what it says."""
    connection.settimeout(0.05)
    answer = b""
    for number in range(2000):
        try:
            connection.send(text[number % len(text) :][:1])
            while more := connection.recv(2**16):
                answer += more
            return answer
        except TimeoutError:
            continue
        except OSError:  # closed while we were sending
            return answer
    raise AssertionError("the server waits for ever")


@pytest.mark.parametrize("start", [b"", b"GE", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_headers_that_come_byte_by_byte_are_not_waited_for(impatient: Served, start: bytes) -> None:
    with impatient.connect() as connection:
        connection.sendall(start)
        answer = drip(connection, b"a")
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"headers_too_slow"' in answer


def test_a_connection_that_says_nothing_is_closed_without_a_word(impatient: Served) -> None:
    with impatient.connect() as connection:
        assert connection.recv(1) == b""


def test_headers_of_a_second_request_are_not_waited_for_either(impatient: Served) -> None:
    with impatient.connect() as connection:
        connection.sendall(get("/"))
        assert read_answer(connection).body == b"a page"
        answer = drip(connection, b"GET / HTTP/1.1\r\nX: " + b"a" * 2000)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(impatient: Served) -> None:
    with impatient.connect() as connection:
        connection.sendall(post("/echo", b"").replace(b"Content-Length: 0", b"Content-Length: 900"))
        answer = drip(connection, b"a")
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"body_too_slow"' in answer


def test_a_body_that_is_still_coming_after_the_answer_is_not_waited_for(impatient: Served) -> None:
    with impatient.connect() as connection:
        connection.sendall(get("/", "Content-Length: 100000"))
        answer = drip(connection, b"a")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_others_are_answered_while_slow_ones_are_waited_for(impatient: Served) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(impatient.connect()).sendall(b"GET / HT")
        assert impatient.ask(get("/")).status == 200


def test_connections_are_kept_for_further_requests_and_pipelines(impatient: Served) -> None:
    with impatient.connect() as connection:
        for _ in range(3):
            connection.sendall(post("/echo", b"{}"))
            assert read_answer(connection).body == b"{}"
        connection.sendall(get("/") + get("/health", "Connection: close"))
        data = b""
        while more := connection.recv(2**16):
            data += more
    assert data.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        get("/" + "a" * 10**6),
        get("/", "X: " + "a" * 10**6),
        post("/echo", b"{}").replace(b"Content-Length: 2", b"Content-Length: -2"),
        post("/echo", b"{}").replace(b"Content-Length: 2", b"Content-Length: " + b"9" * 40),
        post("/echo", b"zz\r\n{}\r\n").replace(b"Content-Length: 8", b"Transfer-Encoding: chunked"),
    ],
    ids=range(9),
)
def test_what_is_no_http_gets_the_standard_body(impatient: Served, request_: bytes) -> None:
    answer = impatient.ask(request_)
    assert (answer.status, answer.code) == (400, "invalid_http")
    assert answer.headers["content-type"] == "application/json"


def busy(served: Served, stack: ExitStack, num: int) -> list[socket.socket]:
    """Connections with requests in progress, which end when the model ends all."""
    connections = [stack.enter_context(served.connect()) for _ in range(num)]
    for connection in connections:
        connection.sendall(get("/heeds"))
        while not connection.recv(2**16).endswith(b"begun\n\r\n"):
            pass
    return connections


def test_connections_beyond_the_limit_are_told_so() -> None:
    with serving(max_connections=2) as served, ExitStack() as stack:
        first, _ = busy(served, stack, 2)
        answer = served.ask(get("/"))
        assert (answer.status, answer.code) == (503, "too_many_connections")
        assert answer.headers["retry-after"] and answer.headers["connection"] == "close"
        assert b"dmax:refused_connections_total 1.0" in served.metrics.page()
        first.close()
        while (answer := served.ask(get("/"))).status == 503:  # until its end is noticed
            pass
        assert answer.status == 200


def test_of_those_beyond_the_limit_only_the_latest_stays() -> None:
    with serving(max_connections=1) as served, ExitStack() as stack:
        busy(served, stack, 1)
        refused = [stack.enter_context(served.connect()) for _ in range(5)]
        assert all(ended(connection) for connection in refused[:-1])
        refused[-1].sendall(get("/"))
        assert read_answer(refused[-1]).status == 503


def ended(connection: socket.socket) -> bool:
    """Whether the server closes a connection without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_those_who_only_hold_connections_keep_nobody_out() -> None:
    with serving(max_connections=10) as served, ExitStack() as stack:
        working = busy(served, stack, 1)[0]
        used = stack.enter_context(served.connect())
        used.sendall(get("/"))
        assert read_answer(used).status == 200
        holders = [stack.enter_context(served.connect()) for _ in range(50)]
        for holder in holders[-8:]:
            holder.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert served.ask(get("/")).status == 200
        assert ended(used) and all(ended(holder) for holder in holders[:40])
        served.server.should_exit = True
        assert b"shutting_down" in working.recv(2**16)  # it was never closed


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.2)
    with serving() as served, served.connect() as connection:
        connection.sendall(get("/large"))
        served.record(path="/large")  # it ends although nobody reads


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="of Linux")
def test_the_system_lets_go_of_what_the_server_has_sent() -> None:
    with serving() as served, served.connect() as connection:
        connection.sendall(get("/"))
        assert read_answer(connection).status == 200
        [each] = served.server.server_state.connections
        its_socket = each.transport.get_extra_info("socket")  # type: ignore[union-attr]
        seconds = its_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
        assert seconds == protocol.STALL_SECONDS
