"""What the playground makes of a connection, in a real browser against a scripted server.

Its models are scripts: each says in its own way what a server may say.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from browser import needs_chromium, opened

from dmax.serve.page import document
from dmax.web.page import media_type, static_files

pytestmark = needs_chromium

Script = Callable[[BaseHTTPRequestHandler], None]
SCRIPTS: dict[str, Script] = {}
"""What the server does for a model, by its name."""
DISCONNECTED = threading.Event()
MAY_GO_ON = threading.Event()
READ = """async (model) => {
  const { streamChat } = await import("dmax/client.js");
  const chunks = [];
  try {
    for await (const chunk of streamChat({ model }, "", new AbortController().signal)) {
      chunks.push(chunk);
    }
  } catch (error) {
    return { chunks, error: error.message, wantsKey: error.wantsKey };
  }
  return { chunks };
}"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.removeprefix("/static/")
        if self.path == "/":
            html = document("playground", "dmax playground").html
            self.answer(200, html.encode(), "text/html; charset=utf-8")
        elif name in static_files():
            self.answer(200, static_files()[name], media_type(name))
        else:
            own = {"strategy": "threshold", "threshold": 0.5, "strategies": {"threshold": {}}}
            models = {"data": [{"id": script, "dmax": own} for script in SCRIPTS]}
            self.answer(200, json.dumps(models).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SCRIPTS[body["model"]](self)

    def answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self) -> None:
        """Begin a stream that ends with the connection."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def tell(self, *records: dict[str, Any]) -> None:
        for record in records:
            chunk = {"choices": [], "dmax": record}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


def script(function: Script) -> Script:
    SCRIPTS[function.__name__] = function
    return function


@script
def ends_well(handler: Any) -> None:
    handler.begin()
    handler.wfile.write(b'data: {"n": 1}\n\n: still here\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n')


@script
def breaks_off(handler: Any) -> None:
    handler.begin()
    handler.wfile.write(b'data: {"n": 1}\n\ndata: {"n": ')


@script
def fails_midway(handler: Any) -> None:
    handler.begin()
    handler.wfile.write(b'data: {"n": 1}\n\ndata: {"error": {"message": "the logits are NaN"}}\n\n')


@script
def speaks_another_language(handler: Any) -> None:
    handler.begin()
    handler.wfile.write(b"data: <p>hello</p>\n\n")


@script
def wants_a_key(handler: Any) -> None:
    handler.answer(401, b'{"error": {"message": "a key is missing"}}', "application/json")


@script
def is_full(handler: Any) -> None:
    body = b'{"error": {"message": "the queue is full"}}'
    handler.answer(429, body, "application/json", Retry_After="3")


@script
def is_a_proxy(handler: Any) -> None:
    handler.answer(502, b"<h1>Bad gateway</h1>", "text/html")


@script
def goes_on(handler: Any) -> None:
    """Stream until the client is gone."""
    handler.begin()
    try:
        while True:
            handler.wfile.write(b'data: {"n": 1}\n\n')
    except OSError:
        DISCONNECTED.set()


@script
def breaks_off_in_a_block(handler: Any) -> None:
    handler.begin()
    handler.tell(HEADER, FRAME)


@script
def waits_in_a_block(handler: Any) -> None:
    handler.begin()
    handler.tell(HEADER, FRAME)
    MAY_GO_ON.wait(timeout=60)
    handler.tell(LAST_FRAME, OUTPUT)
    handler.wfile.write(b"data: [DONE]\n\n")


HEADER = {
    "kind": "begin",
    "model": "scripted",
    "params": {"strategy": "threshold", "max_new_tokens": 2, "ignore_eos": False, "options": {}},
    "threshold": 0.5,
    "stop_confidence": None,
    "eos_token_ids": [0],
}
FRAME = {
    "kind": "provisional",
    "position": 0,
    "step": 1,
    "num_forwards": 1,
    "seconds": 0.1,
    "token_ids": [5, 1],
    "texts": ["half", ""],
    "masked": [False, True],
    "confidence": [0.8, 0.2],
    "written": [True, False],
    "forced": False,
    "capped": False,
}
LAST_FRAME = FRAME | {
    "kind": "committed",
    "step": 2,
    "num_forwards": 2,
    "token_ids": [5, 6],
    "texts": ["half", " done"],
    "masked": [False, False],
}
OUTPUT = {"kind": "finished", "text": "half done", "token_ids": [5, 6], "seconds": 0.2}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


def test_events_are_read_however_the_bytes_are_cut(page: Any) -> None:
    stream = (
        "\ufeffdata: é1\r\ndata:  two\r\n\r\n: ping\n\n"
        "event: x\ndata\n\rdata:😀\r\rid: 3\ndata: lost"
    )
    wanted = ["é1\n two", "", "😀"]
    found = page.evaluate(
        """async (text) => {
          const { serverEvents } = await import("dmax/stream.js");
          const bytes = new TextEncoder().encode(text);
          const read = async (parts) => {
            const body = new ReadableStream({
              start(controller) {
                parts.filter((part) => part.length).forEach((part) => controller.enqueue(part));
                controller.close();
              },
            });
            const events = [];
            for await (const event of serverEvents(body)) events.push(event);
            return JSON.stringify(events);
          };
          const seen = new Set([await read([...bytes].map((byte) => new Uint8Array([byte])))]);
          for (let first = 0; first <= bytes.length; first++) {
            for (let second = first; second <= bytes.length; second++) {
              const cuts = [[0, first], [first, second], [second, bytes.length]];
              seen.add(await read(cuts.map(([from, to]) => bytes.slice(from, to))));
            }
          }
          return [...seen];
        }""",
        stream,
    )
    assert [json.loads(events) for events in found] == [wanted]


def test_a_stream_that_is_left_is_cancelled(page: Any) -> None:
    is_cancelled = page.evaluate(
        """async () => {
          const { serverEvents } = await import("dmax/stream.js");
          let isCancelled = false;
          const body = new ReadableStream({
            pull(controller) { controller.enqueue(new TextEncoder().encode("data: 1\\n\\n")); },
            cancel() { isCancelled = true; },
          });
          for await (const event of serverEvents(body)) break;
          return isCancelled;
        }"""
    )
    assert is_cancelled


def test_chunks_come_in_order_up_to_the_end(page: Any) -> None:
    assert page.evaluate(READ, "ends_well") == {"chunks": [{"n": 1}, {"n": 2}]}


@pytest.mark.parametrize(
    ("model", "num_chunks", "error"),
    [
        ("breaks_off", 1, "The connection broke before the answer was finished."),
        ("fails_midway", 1, "The logits are NaN."),
        ("speaks_another_language", 0, "The answer is not one of dmax serve."),
        ("wants_a_key", 0, "A key is missing."),
        ("is_full", 0, "The queue is full. Try again in 3 s."),
        ("is_a_proxy", 0, "The server answered with status 502."),
    ],
)
def test_what_goes_wrong_is_a_sentence(page: Any, model: str, num_chunks: int, error: str) -> None:
    page.allowed.append("Failed to load resource")
    found = page.evaluate(READ, model)
    assert len(found["chunks"]) == num_chunks
    assert found["error"].startswith(error)
    assert found["wantsKey"] is (model == "wants_a_key")


def test_a_server_that_is_gone_is_told(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.allowed.append("Failed to load resource")
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        found = page.evaluate(READ, "ends_well")
    assert found["error"] == "The server does not answer. Is dmax serve still running?"


def test_a_key_that_no_header_can_carry_is_refused(page: Any) -> None:
    error = page.evaluate(
        """async () => {
          const { listModels } = await import("dmax/client.js");
          return listModels("schlüssel €").catch((error) => error.message);
        }"""
    )
    assert error == "An API key has letters, digits and punctuation of ASCII only."


def test_stopping_closes_the_connection(page: Any) -> None:
    DISCONNECTED.clear()
    name = page.evaluate(
        """async () => {
          const { streamChat } = await import("dmax/client.js");
          const controller = new AbortController();
          try {
            for await (const chunk of streamChat({ model: "goes_on" }, "", controller.signal)) {
              controller.abort();
            }
          } catch (error) {
            return error.name;
          }
        }"""
    )
    assert name == "AbortError"
    assert DISCONNECTED.wait(timeout=30)


@pytest.mark.parametrize(
    ("strategies", "race"),
    [
        (["spd"], [("m0", "threshold", 0.25), ("m0", "spd", 0.5)]),
        (["threshold"], [("m0", "threshold", 0.25), ("m0", "threshold", 0.95)]),
        (["spd", "threshold"], [("m1", "threshold", 0.25), ("m0", "spd", 0.5)]),
        (["threshold", "spd", "spd"], [("m0", "threshold", 0.25), ("m1", "spd", 0.5)]),
    ],
)
def test_the_opening_race_goes_with_what_is_served(
    page: Any, strategies: list[str], race: list[tuple[str, str, float]]
) -> None:
    known = {"spd": {"threshold": 0.5}, "threshold": {"threshold": 0.95}}
    models = [
        {"id": f"m{index}", "dmax": {"strategy": strategy, "strategies": known}}
        for index, strategy in enumerate(strategies)
    ]
    found = page.evaluate(
        """async (models) => {
          const { openingRace } = await import("dmax/models.js");
          return openingRace(models);
        }""",
        models,
    )
    assert [tuple(settings.values()) for settings in found] == race


def run(page: Any, model: str) -> Any:
    """Have one pane decode by a script, and give that pane."""
    page.get_by_label("Race two settings").uncheck()
    pane = page.get_by_role("region", name="Right pane")
    pane.get_by_role("combobox", name="Model").select_option(model)
    page.get_by_role("button", name="Run", exact=True).click()
    return pane


def test_a_connection_that_breaks_leaves_what_there_was(page: Any) -> None:
    pane = run(page, "breaks_off_in_a_block")
    pane.get_by_text("The connection broke before the answer was finished.").wait_for()
    page.get_by_role("button", name="Last moment").click()
    assert pane.locator(".token").all_text_contents() == ["half", "░"]
    assert page.get_by_role("button", name="Run", exact=True).is_enabled()
    assert pane.get_by_role("button", name="Save run").is_disabled()


def test_forwards_are_shown_while_more_are_to_come(page: Any) -> None:
    MAY_GO_ON.clear()
    page.get_by_label("Slow motion").uncheck()
    pane = run(page, "waits_in_a_block")
    pane.locator(".token", has_text="half").wait_for()
    assert pane.locator(".token").all_text_contents() == ["half", "░"]
    assert page.get_by_role("button", name="Stop").is_enabled()
    MAY_GO_ON.set()
    page.get_by_text("Finished.").wait_for()
    assert pane.locator(".token").all_text_contents() == ["half", " done"]


def test_a_run_that_is_paused_goes_on_out_of_sight(page: Any) -> None:
    MAY_GO_ON.clear()
    pane = run(page, "waits_in_a_block")
    pane.locator(".token", has_text="half").wait_for()
    page.get_by_role("button", name="Pause").click()
    MAY_GO_ON.set()
    page.locator("#run:enabled").wait_for()
    assert pane.locator(".token").all_text_contents() == ["half", "░"]
    page.get_by_role("button", name="One forward on").click()
    assert pane.locator(".token").all_text_contents() == ["half", " done"]


def test_the_button_stops_a_run(page: Any) -> None:
    DISCONNECTED.clear()
    pane = run(page, "goes_on")
    page.get_by_role("button", name="Stop").click()
    pane.get_by_text("Stopped.").wait_for()
    assert DISCONNECTED.wait(timeout=30)
    assert page.get_by_role("button", name="Run", exact=True).is_enabled()


def test_the_page_waits_for_models_that_are_being_loaded(browser: Any, address: str) -> None:
    answers = iter([503, 503])
    error = json.dumps({"error": {"message": "the model is being loaded"}})

    def answer(route: Any) -> None:
        status = next(answers, None)
        route.continue_() if status is None else route.fulfill(status=status, body=error)

    with opened(browser, address) as page:
        page.allowed.append("503")
        page.route("**/v1/models", answer)
        page.reload()
        page.get_by_text("The model is being loaded.").wait_for()
        page.get_by_role("option", name="ends_well").first.wait_for(state="attached")
        assert not page.get_by_text("The model is being loaded.").is_visible()
