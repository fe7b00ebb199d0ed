"""What the guard turns away, and what it hands on untouched."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from toy_server import Served, get, post, read_answer, serving

from dmax.errors import InputError
from dmax.serve.checks import Origins, bearer, check_json, host_of, is_loopback, needs_key
from dmax.serve.errors import ApiError


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(max_body_bytes=10_000, max_json_depth=3) as server:
        yield server


def refused(call: Any, *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as info:
        call(*arguments)
    return info.value


# --- hosts and origins ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "[::1]", "::1"]
)
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "10.0.0.1", "localhost.evil.com", "127.0.0.1.nip.io"]
)
def test_names_of_others(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("Localhost:8000", "localhost"),
        ("[::1]:8000", "[::1]"),
        ("a.example", "a.example"),
        ("localhost:8000@evil.com", ""),
        ("localhost:evil.com", ""),
        ("localhost/evil.com", ""),
        ("::1", ""),
        ("", ""),
    ],
)
def test_the_host_in_an_authority(authority: str, host: str) -> None:
    assert host_of(authority) == host


@pytest.mark.parametrize(
    "hosts",
    [["evil.com"], ["evil.com:8000"], [], [""], ["localhost", "evil.com"], ["10.0.0.1:8000"]],
)
def test_on_loopback_other_hosts_are_refused(hosts: list[str]) -> None:
    error = refused(Origins("127.0.0.1").check, hosts, [])
    assert (error.status, error.code) == (403, "host_not_allowed")


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.1", "::"])
def test_elsewhere_any_host_may_be_addressed_unless_some_are_named(address: str) -> None:
    Origins(address).check(["my-gpu:8000"], [])
    named = Origins(address, ["my-gpu"])
    for host in ("my-gpu:8000", "MY-GPU", "localhost:8000"):
        named.check([host], [])
    assert refused(named.check, ["evil.com"], []).code == "host_not_allowed"


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.com",
        "http://localhost:3000",  # another program of this machine
        "http://localhost",
        "null",
        "",
        "file://",
        "chrome-extension://localhost:8000",
        "http://localhost:8000.evil.com",
        "http://evil.com#localhost:8000",
    ],
)
def test_pages_of_others_may_not_call(origin: str) -> None:
    for address in ("127.0.0.1", "0.0.0.0"):
        error = refused(Origins(address).check, ["localhost:8000"], [origin])
        assert (error.status, error.code) == (403, "origin_not_allowed")


def test_the_own_page_and_those_that_were_permitted_may_call() -> None:
    Origins("127.0.0.1").check(["localhost:8000"], ["http://localhost:8000"])
    Origins("127.0.0.1").check(["LOCALHOST:9"], ["http://localhost:9"])  # a forwarded port
    Origins("127.0.0.1", [], ["https://a.example"]).check(["localhost"], ["https://A.example"])
    Origins("127.0.0.1", [], ["*"]).check(["localhost"], ["https://a.example", "null"])
    behind_a_proxy = Origins("127.0.0.1", ["llm.example"])
    behind_a_proxy.check(["127.0.0.1:8000"], ["https://llm.example"])
    behind_a_proxy.check(["llm.example"], ["https://llm.example"])
    assert refused(behind_a_proxy.check, ["llm.example"], ["https://evil.com"]).status == 403


@pytest.mark.parametrize("name", ["a.example:80", "https://a.example", "a/b", ""])
def test_a_host_that_would_never_match_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(InputError, match="--allowed-host"):
        Origins("127.0.0.1", [name])
    with pytest.raises(InputError, match="--cors-origin"):
        Origins("127.0.0.1", [], [name.removeprefix("https://")])


def test_a_page_of_others_drives_nothing(served: Served) -> None:
    served.api.bodies.clear()
    for headers in (("Origin: https://evil.com",), ("Origin: null", "Content-Type: text/plain")):
        answer = served.ask(post("/echo", b"{}", *headers))
        assert (answer.status, answer.code) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers
    rebound = post("/echo", b"{}").replace(b"Host: localhost", b"Host: evil.com")
    assert served.ask(rebound).code == "host_not_allowed"
    assert served.api.bodies == []


def preflight(origin: str) -> bytes:
    asked = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
    return get("/v1/echo", f"Origin: {origin}", *asked).replace(b"GET", b"OPTIONS")


def test_cors_is_off_unless_it_is_asked_for(served: Served) -> None:
    assert served.ask(preflight("https://a.example")).status == 403
    with serving(cors_origins=("https://a.example",), api_keys=("key",)) as asked:
        allowed = asked.ask(preflight("https://a.example"))
        assert allowed.status == 200  # although a preflight never carries a key
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert asked.ask(preflight("https://b.example")).status == 403
        wrong = asked.ask(post("/v1/echo", b"{}", "Origin: https://a.example"))
        assert wrong.status == 401  # which the page is allowed to read
        assert wrong.headers["access-control-allow-origin"] == "https://a.example"


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([b"Bearer key"], b"key"),
        ([b"bearer  key "], b"key"),
        ([b"Bearer "], b""),
        ([b"Basic key"], None),
        ([b"key"], None),
        ([b""], None),
        ([], None),
        ([b"Bearer key", b"Bearer key"], None),
    ],
)
def test_the_key_in_a_header(headers: list[bytes], key: bytes | None) -> None:
    assert bearer(headers) == key


@pytest.mark.parametrize("path", ["/", "/health", "/static/a.js", "/docs", "/openapi.json"])
def test_open_paths_are_open_for_reading_only(path: str) -> None:
    assert not needs_key("GET", path) and not needs_key("HEAD", path)
    assert needs_key("POST", path)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "//", "/static", "/health/", "/%2fhealth", "/anything", ""]
)
def test_everything_else_needs_a_key(path: str) -> None:
    assert needs_key("GET", path)


def test_missing_wrong_and_many_keys_get_401_every_time() -> None:
    keys = tuple(f"key-{number}" for number in range(100))
    with serving(api_keys=keys) as locked:
        wrong = [
            (),
            ("Authorization: Bearer",),
            ("Authorization: Bearer key-100",),
            ("Authorization: Bearer key-",),
            ("Authorization: Bearer key-0 key-1",),
            ("Authorization: Basic key-0",),
            ("Authorization: Bearer k\xe9y",),
            ("Authorization: Bearer key-0", "Authorization: Bearer key-1"),
            ("X-Api-Key: key-0",),
        ]
        for headers in wrong:
            for request in (get("/metrics", *headers), post("/v1/echo", b"{}", *headers)):
                answer = locked.ask(request)
                assert (answer.status, answer.code) == (401, "invalid_api_key"), headers
                assert answer.headers["www-authenticate"] == "Bearer"
                assert b"key-" not in answer.body
        for key in (keys[0], keys[-1]):
            right = post("/v1/echo", b"{}", f"Authorization: Bearer {key}")
            assert locked.ask(right).body == b"{}"
        assert locked.ask(get("/")).status == locked.ask(get("/health")).status == 200


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe{}",
        b'{"a": "\xc3"}',
        b'{"a": "\\ud800"}',
        b'{"\\uDFFF": 1}',
        b"{",
        b"{} {}",
        b"nonsense",
        b" ",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b"9" * 5000,
        b'{"a": -' + b"1" * 5000 + b"}",
        b"[" * 4 + b"]" * 4,
        b'{"a":[{"b":{}}]}',
        b"[" * 5000,
        b'{"a":' * 2000,
        "{}".encode("utf-16"),
    ],
)
def test_a_body_that_is_no_use_gets_400(served: Served, body: bytes) -> None:
    served.api.bodies.clear()
    answer = served.ask(post("/echo", body))
    assert (answer.status, answer.code) == (400, "invalid_json")
    assert len(answer.body) < 500
    assert served.api.bodies == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[[[]]]",
        b'{"a": [{"b": 1}]}',
        b'{"a": "[[[[[[{{{{{{"}',
        '{"a": "\U0001f600 \u00e9"}'.encode(),
        b'{"a": "\\ud83d\\ude00"}',
        b"0." + b"1" * 4000,
        b"1" * 4000,
        b"17",
    ],
)
def test_any_other_body_is_handed_on_as_it_came(served: Served, body: bytes) -> None:
    assert served.ask(post("/echo", body)).body == body


@pytest.mark.parametrize(
    "number", [b"9" * 10**6, b"-" + b"9" * 10**6, b"0." + b"9" * 10**6, b"1e" + b"9" * 10**6]
)
def test_numbers_of_a_million_digits_are_refused_at_once(number: bytes) -> None:
    limit = sys.get_int_max_str_digits()
    assert "more than 4300 digits" in refused(check_json, b'{"seed": %b}' % number, 3).message
    assert sys.get_int_max_str_digits() == limit


@given(
    st.recursive(
        st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_depth_is_counted_as_people_do(value: Any) -> None:
    def depth(node: Any) -> int:
        if not isinstance(node, list | dict):
            return 0
        children = node.values() if isinstance(node, dict) else node
        return 1 + max(map(depth, children), default=0)

    body = json.dumps(value).encode()
    check_json(body, depth(value))
    if depth(value):
        assert "deeper" in refused(check_json, body, depth(value) - 1).message


@given(st.binary())
def test_every_body_is_json_or_refused(body: bytes) -> None:
    with suppress(ApiError):
        check_json(body, 32)
        json.dumps(json.loads(body), ensure_ascii=False, allow_nan=False).encode()


def chunked(body: bytes, size: int) -> bytes:
    start = post("/echo", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = [body[place : place + size] for place in range(0, len(body), size)]
    return (
        start + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    )


@pytest.mark.parametrize(
    "request_",
    [
        post("/echo", b" " * 10_001),
        post("/echo", b" " * 10**7),
        post("/echo", b"").replace(b"Length: 0", b"Length: 99999999"),  # nothing follows
        chunked(b" " * 10_001, 100),
        chunked(b" " * 10**7, 10**5),
    ],
    ids=["a little", "much", "only claimed", "chunked", "much, chunked"],
)
def test_a_large_body_gets_413_which_the_client_can_read(served: Served, request_: bytes) -> None:
    answer = served.ask(request_)
    assert (answer.status, answer.code) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"


def test_a_body_of_the_largest_size_is_taken_whole_or_in_chunks(served: Served) -> None:
    body = b'"' + b"a" * 9998 + b'"'
    assert served.ask(post("/echo", body)).body == body
    assert served.ask(chunked(body, 7)).body == body


def test_more_than_was_claimed_is_no_part_of_the_body(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(post("/echo", b"{}") + b"nonsense\r\n\r\n")
        data = b""
        while more := connection.recv(2**16):
            data += more
    assert data.count(b"HTTP/1.1 200 ") == data.count(b"HTTP/1.1 400 ") == 1


def test_a_client_that_leaves_within_its_body_leaves_nothing(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(post("/leaves", b"").replace(b"Length: 0", b"Length: 100") + b"{")
    record = served.record(path="/leaves")
    assert (record.status, record.ended()) == (None, "cancelled")


def test_who_asks_whether_to_go_on_is_told_before_it_sends(served: Served) -> None:
    with served.connect() as connection:
        expecting = post("/echo", b"{}", "Expect: 100-continue")
        connection.sendall(expecting[:-2])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert read_answer(connection).body == b"{}"
        connection.sendall(expecting.replace(b"Length: 2", b"Length: 20000")[:-2])
        assert read_answer(connection).status == 413  # and no 100


# --- what nobody foresaw --------------------------------------------------------------------------


def test_a_bug_is_an_answer_without_a_trace(served: Served) -> None:
    answer = served.ask(post("/fail", b"{}"))
    assert (answer.status, answer.code) == (500, "internal_error")
    record = served.record(path="/fail")
    assert (record.status, record.ended()) == (500, "failed")
    assert record.error is not None and record.error.startswith("ValueError in fail (")
    assert b"secret" not in answer.body and "secret" not in record.error
    assert b"Traceback" not in answer.body


def test_a_bug_within_an_answer_cuts_the_connection(served: Served) -> None:
    answer = served.ask(post("/fail_late", b"{}"))
    assert answer.status == 200 and b"begun" in answer.body
    assert not answer.body.endswith(b"0\r\n\r\n")  # the client knows that it is not whole
    assert served.record(path="/fail_late").ended() == "failed"


def test_every_answer_has_an_id_of_its_own(served: Served) -> None:
    answers = [served.ask(request) for request in (get("/"), get("/"), post("/echo", b"{"))]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert [served.record(request_id=each).request_id for each in ids] == ids


def test_many_clients_get_their_own_bodies(served: Served) -> None:
    bodies = [json.dumps([number] * 100).encode() for number in range(200)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: served.ask(post("/echo", body)).body, bodies))
    assert answers == bodies
