"""The trace page and its views, in a real Chromium."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from browser import contrasts, needs_chromium, opened

from dmax import LLM, DecodingParams
from dmax.trace import Trace, record
from dmax.trace.page import page as page_of

pytestmark = needs_chromium

QUESTION = (
    "Jack starts the week with 8 mugs. Later Jack hands 2 mugs to a teacher. Jack throws away 4 "
    "broken mugs. A friend gives Jack 5 more mugs. Jack wins 6 mugs in a game. Jack receives 4 "
    "mugs as a present. How many mugs does Jack end up with?"
)
HOSTILE = "</script><script>window.hacked = 1</script><!-- <b>bold</b> **stars** \u2028 [a](b) &lt;"
WIDTHS = (360, 800, 1400)
PIXELS = """() => {
  const canvas = document.querySelector(".grid-canvas canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const counts = {};
  for (let at = 0; at < data.length; at += 4) {
    const key = data.slice(at, at + 4).join(" ");
    counts[key] = (counts[key] ?? 0) + 1;
  }
  return counts;
}"""
COLOUR = """async (name) => {
  const { palette } = await import("dmax/theme.js");
  return palette(document.body, [name])[name].join(" ") + " 255";
}"""

Show = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def spd() -> Trace:
    return record(LLM("tiny-dmax", dtype="float32"), QUESTION, name="tiny-dmax")


@pytest.fixture(scope="module")
def base() -> LLM:
    return LLM("tiny-base", dtype="float32")


@pytest.fixture(scope="module")
def pushed(base: LLM) -> Trace:
    params = DecodingParams(strategy="threshold", threshold=0.3)
    return record(base, QUESTION, params, name="tiny-base")


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Show:
    """Opens the page of traces; its end checks the console."""
    numbers = count()

    def open_page(*traces: Any, **options: Any) -> AbstractContextManager[Any]:
        path = tmp_path / f"{next(numbers)}.html"
        records = [trace.record if isinstance(trace, Trace) else trace for trace in traces]
        path.write_text(page_of(records), encoding="utf-8")
        return opened(browser, path.as_uri(), **options)

    return open_page


def where(page: Any) -> str:
    return str(page.locator(".where").inner_text())


def counter(page: Any, name: str) -> str:
    return str(page.locator(f"[data-counter={name}]").inner_text())


def text_of(page: Any) -> str:
    return str(page.locator(".tokens").evaluate("node => node.textContent"))


# --- the page -------------------------------------------------------------------------------------


def test_the_last_moment_is_the_answer(show: Show, spd: Trace) -> None:
    with show(spd) as page:
        assert text_of(page).startswith(spd.output["text"] + "⟨end⟩")
        assert counter(page, "forwards") == str(spd.output["num_forwards"])
        assert counter(page, "settled") == str(len(spd.output["token_ids"]))
        assert counter(page, "tpf") == f"{spd.output['tokens_per_forward']:.2f}"
        assert page.locator(".prompt p").inner_text() == QUESTION
        assert page.locator("h2").inner_text() == "tiny-dmax, spd, threshold 0.5"


def test_stepping_by_mouse(show: Show, spd: Trace) -> None:
    last = spd.output["num_forwards"]
    with show(spd) as page:
        page.get_by_label("One forward back").click()
        assert where(page) == f"forward {last - 1} of {last}"
        page.get_by_label("First moment").click()
        assert where(page) == f"forward 0 of {last}"
        assert set(text_of(page)) == {"░"}
        page.get_by_label("One forward on").click()
        first = spd.frames[0]
        assert text_of(page).count("░") == sum(first["masked"])
        page.get_by_label("Last moment").click()
        assert where(page) == f"forward {last} of {last}"
        page.get_by_label("moment", exact=True).fill("2")
        assert where(page) == f"forward 2 of {last}"


def test_stepping_and_playing_by_keyboard(show: Show, spd: Trace) -> None:
    last = spd.output["num_forwards"]
    with show(spd) as page:
        for key, moment in [("Home", 0), ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1)]:
            page.keyboard.press(key)
            assert where(page) == f"forward {moment} of {last}"
        page.get_by_label("speed").select_option("25")
        page.locator("h1").click()
        page.keyboard.press("Home")
        page.keyboard.press("Space")
        page.get_by_text(f"forward {last} of {last}").wait_for()
        page.get_by_label("Play").wait_for()  # it stops at the end
        page.get_by_label("Play").focus()
        page.keyboard.press("Space")  # a focused button is pressed once, not twice
        page.get_by_label("Pause").wait_for()
        page.keyboard.press("ArrowLeft")
        page.get_by_label("Play").wait_for()  # stepping ends playing


def test_the_history_of_a_token_shows_on_hover_and_on_focus(show: Show, spd: Trace) -> None:
    revised, entries = revision_of(spd)
    with show(spd) as page:
        card = page.get_by_role("tooltip")
        assert not card.is_visible()
        token = page.locator(f".token[data-position='{revised}']")
        token.hover()
        assert card.locator("caption").inner_text() == f"Position {revised}"
        rows = card.locator("tbody tr")
        assert rows.count() == len(entries)
        assert "revised" in card.inner_text()
        for row, (forward, confidence) in zip(rows.all(), entries, strict=True):
            cells = row.locator("td").all_inner_texts()
            assert (cells[0], cells[2]) == (str(forward), f"{round(100 * confidence)} %")
        page.locator("h1").hover()
        assert not card.is_visible()

        page.locator(".tokens").focus()
        for _ in range(revised + 1):
            page.keyboard.press("ArrowRight")
        assert card.locator("caption").inner_text() == f"Position {revised}"
        described = page.locator(".tokens").get_attribute("aria-activedescendant")
        assert page.locator(f"#{described}").get_attribute("aria-label").endswith("1 change")
        page.keyboard.press("Escape")
        assert not card.is_visible()
        assert where(page).startswith(f"forward {spd.output['num_forwards']}")


def revision_of(trace: Trace) -> tuple[int, list[tuple[int, float]]]:
    """A position whose token changed once, and forward and confidence of its steps."""
    for block in {frame["position"] for frame in trace.frames}:
        frames = [frame for frame in trace.frames if frame["position"] == block]
        for at in range(len(frames[0]["token_ids"])):
            tokens = [frame["token_ids"][at] for frame in frames if not frame["masked"][at]]
            if sum(one != other for one, other in zip(tokens, tokens[1:], strict=False)) == 1:
                steps = [(frame["num_forwards"], frame["confidence"][at]) for frame in frames]
                return block + at, steps
    raise AssertionError("nothing was revised")


def test_revised_tokens_are_marked_by_more_than_colour(show: Show, spd: Trace) -> None:
    revised, _ = revision_of(spd)
    with show(spd) as page:
        line = "node => getComputedStyle(node).textDecorationLine"
        tokens = page.locator(".token")
        assert tokens.nth(revised).evaluate(line) == "underline"
        assert tokens.nth(0).evaluate(line) == "none"
        assert page.locator(".token[data-changed]").count() == int(counter(page, "revisions"))


def test_the_grid_is_drawn_with_a_dot_for_each_revision(
    show: Show, spd: Trace, pushed: Trace
) -> None:
    with show(spd) as page:
        colours, dot = page.evaluate(PIXELS), page.evaluate(COLOUR, "revised")
        full = page.evaluate(COLOUR, "accent")
        assert len(colours) > 20  # shades of confidence
        assert colours[full] > 1000  # sure tokens
        assert colours[dot] >= 20
        label = page.locator(".grid-canvas canvas").first.get_attribute("aria-label")
        assert label.startswith("Grid of 64 positions over 7 forwards. 1 revision")
        page.get_by_text("1 revision in words").click()
        revised, _ = revision_of(spd)
        assert page.locator("figure li").inner_text().startswith(f"position {revised}, forward")
    with show(pushed) as page:
        assert dot not in page.evaluate(PIXELS)


def test_the_grid_is_read_and_pressed(show: Show, spd: Trace) -> None:
    with show(spd) as page:
        canvas = page.locator(".grid-canvas canvas").first
        canvas.focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        assert page.locator(".readout").inner_text().startswith("Position 1, forward 2: “")
        page.keyboard.press("Enter")
        assert where(page) == "forward 2 of 7"
        canvas.click(position={"x": 40, "y": 20})
        assert where(page) == "forward 1 of 7"
        assert page.get_by_role("tooltip").locator("caption").inner_text() == "Position 0"


def test_the_curve_is_drawn_and_pressed(show: Show, spd: Trace) -> None:
    with show(spd) as page:
        assert page.locator(".curve polyline.mean").count() == 2
        box = page.locator(".curve svg").bounding_box()
        page.locator(".curve svg").click(position={"x": box["width"] - 9, "y": 40})
        assert where(page) == "forward 7 of 7"
        page.locator(".curve svg").click(position={"x": 35, "y": 40})
        assert where(page) == "forward 0 of 7"


def test_runs_stand_side_by_side_on_one_timeline(show: Show, spd: Trace, pushed: Trace) -> None:
    with show(spd, pushed) as page:
        assert page.locator("h2").all_inner_texts() == [
            "tiny-dmax, spd, threshold 0.5",
            "tiny-base, threshold, threshold 0.3",
        ]
        page.keyboard.press("Home")
        for _ in range(spd.output["num_forwards"] + 1):
            page.keyboard.press("ArrowRight")
        counts = page.locator("[data-counter=forwards]").all_inner_texts()
        assert counts == ["7", "8"]  # one has ended, the other goes on
        left, right = (page.locator("article").nth(index).bounding_box() for index in (0, 1))
        assert left["y"] == right["y"] and left["x"] < right["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_scheme_can_be_read(
    show: Show, spd: Trace, pushed: Trace, scheme: str
) -> None:
    with show(spd, pushed, color_scheme=scheme) as page:
        for summary in page.locator("article summary:visible").all():
            summary.click()
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            for key in ("End", "Home", "ArrowRight", "ArrowRight", "ArrowRight"):
                page.keyboard.press(key)
                page.evaluate("document.getAnimations().forEach((each) => each.finish())")
                page.locator(".token").nth(31).hover()
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                low = [each for each in contrasts(page) if each["ratio"] < 4.5]
                assert not low, low[:5]


def test_the_theme_can_be_switched(show: Show, spd: Trace) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with show(spd, color_scheme="dark") as page:
        dark, drawn = page.evaluate(background), page.evaluate(PIXELS)
        page.get_by_role("button", name="Switch to light colours").click()
        assert page.evaluate(background) == "rgb(255, 255, 255)" != dark
        assert page.evaluate(PIXELS) != drawn  # the canvas, too
        page.get_by_role("button", name="Switch to dark colours").click()
        assert page.evaluate(background) == dark


def test_texts_are_texts(show: Show, spd: Trace) -> None:
    hostile = json.loads(spd.to_json())
    hostile |= {"prompt": HOSTILE, "model": HOSTILE}
    hostile["output"]["text"] = HOSTILE
    for frame in hostile["frames"]:
        frame["texts"] = ["" if masked else HOSTILE for masked in frame["masked"]]
    with show(hostile) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("b, article script, .token a, .token strong").count() == 0
        assert page.locator(".prompt p").evaluate("node => node.textContent") == HOSTILE
        assert page.locator(".token").first.evaluate("node => node.textContent") == HOSTILE
        assert HOSTILE in page.locator("h2").evaluate("node => node.textContent")


def test_the_trace_is_saved_as_it_was(show: Show, spd: Trace, tmp_path: Path) -> None:
    with show(spd) as page:
        page.get_by_text("Settings and raw trace").click()
        with page.expect_download() as download:
            page.get_by_text("Save the trace as JSON").click()
        download.value.save_as(tmp_path / "saved.json")
    assert Trace.load(tmp_path / "saved.json") == spd


def test_a_run_without_a_forward_is_shown(show: Show, base: LLM) -> None:
    with show(record(base, QUESTION, DecodingParams(deadline=0))) as page:
        assert where(page) == "forward 0 of 0"
        assert text_of(page) == ""


def test_a_long_answer_with_many_open_blocks_is_drawn_within_bounds(show: Show, spd: Trace) -> None:
    with show(long_trace(spd)) as page:
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.keyboard.press("ArrowLeft")
            height = page.locator(".grid-canvas").bounding_box()["height"]
            assert 200 < height < 4000
            assert len(page.evaluate(PIXELS)) > 20
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".token").count() == 1024


def long_trace(trace: Trace) -> dict[str, Any]:
    """1,024 positions in 32 blocks that are all open for 200 forwards."""
    found = json.loads(trace.to_json())
    shape = {"position": 0, "seconds": 1.0, "forced": False, "capped": False}
    found["frames"] = [
        {
            **shape,
            "kind": "provisional" if forward < 200 else "committed",
            "position": start,
            "step": forward,
            "num_forwards": forward,
            "token_ids": [(forward * at) % 7 for at in range(32)],
            "texts": [" word"] * 32,
            "masked": [at > forward for at in range(32)],
            "confidence": [((at + start) * forward % 100) / 100 for at in range(32)],
            "written": [True] * 32,
        }
        for forward in range(1, 201)
        for start in range(0, 1024, 32)
    ]
    found["params"]["max_new_tokens"] = 1024
    found["output"]["token_ids"] = [1] * 1024
    return dict(found)


def test_several_traces_on_the_page_of_a_notebook_do_not_meet(
    browser: Any, tmp_path: Path, spd: Trace, pushed: Trace
) -> None:
    path = tmp_path / "notebook.html"
    cells = "".join(f"<div>{trace._repr_html_()}</div>" for trace in (spd, pushed, spd))
    path.write_text(f"<!doctype html><meta charset=utf-8>{cells}", encoding="utf-8")
    with opened(browser, path.as_uri()) as page:
        frames = page.frames[1:]
        assert len(frames) == 3
        for frame, trace in zip(frames, (spd, pushed, spd), strict=True):
            frame.locator(".token").first.wait_for()
            assert frame.locator("h2").inner_text().startswith(trace.record["model"])
        frames[0].get_by_label("First moment").click()
        assert frames[0].locator(".where").inner_text() == "forward 0 of 7"
        assert frames[2].locator(".where").inner_text() == "forward 7 of 7"
        frames[1].get_by_role("button", name="Switch to dark colours").click()
        assert frames[1].evaluate("document.documentElement.dataset.theme") == "dark"
