"""The playground in a real browser, against a real server with the bundled models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from browser import contrasts, needs_chromium, opened
from openai import OpenAI
from own_server import running
from running import Running

from dmax import DecodingParams
from dmax.serve.app import create_app
from dmax.serve.guard import protect
from dmax.serve.settings import ServerOptions
from dmax.trace import Trace, record

pytestmark = needs_chromium

KEY = "a-key-for-tests"
HOSTILE = (
    "<script>hacked = true</script><img src=x onerror='hacked = true'> **bold** [a](b) &amp; "
    "</textarea>"
)


@pytest.fixture(scope="module")
def address(server: Running) -> str:
    return f"{server.url}/"


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


def pane(page: Any, name: str) -> Any:
    return page.get_by_role("region", name=f"{name} pane")


def text(page: Any, name: str) -> str:
    """The completion that a pane shows, without what stands for special tokens."""
    tokens = pane(page, name).locator(".token:not([data-role=end]):not([data-role=after])")
    return "".join(tokens.all_text_contents())


def run(page: Any, prompt: str | None = None, speed: str | None = None) -> None:
    """Have the page decode, in slow motion if a speed is given."""
    page.get_by_label("Slow motion").set_checked(speed is not None)
    if speed is not None:
        page.get_by_role("combobox", name="speed").select_option(speed)
    if prompt is not None:
        page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Run", exact=True).click()


def wait_for_the_end(page: Any) -> None:
    page.get_by_text("Finished.").wait_for()


def test_opens_with_a_race_that_the_pushed_base_loses(page: Any, client: OpenAI) -> None:
    run(page)
    wait_for_the_end(page)
    assert "✗ 5 is wrong; 2 is right" in pane(page, "Left").inner_text()
    assert "✓ 2 is right" in pane(page, "Right").inner_text()
    for name in ("Left", "Right"):
        shown = pane(page, name)
        model, strategy = (
            shown.get_by_role("combobox", name=label).input_value()
            for label in ("Model", "Strategy")
        )
        threshold = shown.get_by_role("spinbutton", name="Threshold").input_value()
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": page.get_by_label("Prompt").input_value()}],
            max_completion_tokens=256,
            temperature=0,
            extra_body={
                "dmax": {
                    "strategy": strategy,
                    "threshold": float(threshold),
                }
            },
        )
        assert text(page, name) == answer.choices[0].message.content
        forwards = shown.locator("[data-counter=forwards]").inner_text()
        assert int(forwards) == answer.model_dump()["choices"][0]["dmax"]["num_forwards"]


def test_a_block_sharpens_from_masks_to_settled_tokens(page: Any) -> None:
    run(page)
    wait_for_the_end(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Home")
    seen = []
    for _ in range(11):
        statuses = page.evaluate(
            "[...document.querySelectorAll('.pane .token')].map((token) => token.dataset.status)"
        )
        seen.append(set(statuses))
        page.keyboard.press("ArrowRight")
    assert seen[0] == {"mask"}
    assert {"mask", "provisional", "revised", "settled"} == set().union(*seen)
    assert seen[-1] == {"settled"}


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    page.get_by_role("button", name="Run", exact=True).wait_for()
    press_until(page, "Tab", "document.activeElement.name == 'prompt'")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("Eve has 2 mugs. Eve buys 3 mugs at the market. How many has Eve?")
    page.keyboard.press("Control+Enter")
    press_until(page, "Tab", "document.activeElement.type == 'range'")
    page.keyboard.press("End")
    wait_for_the_end(page)
    page.keyboard.press("ArrowLeft")
    slider = page.get_by_role("slider")
    assert int(slider.input_value()) == int(slider.get_attribute("max")) - 1


def press_until(page: Any, key: str, condition: str) -> None:
    for _ in range(50):
        page.keyboard.press(key)
        if page.evaluate(condition):
            return
    raise AssertionError(f"{key} does not lead to where {condition}")


def test_steps_back_and_forth_and_pauses(page: Any) -> None:
    run(page)
    wait_for_the_end(page)
    slider = page.get_by_role("slider")
    last = slider.get_attribute("max")
    page.get_by_role("button", name="One forward back").click()
    page.get_by_role("button", name="One forward back").click()
    page.get_by_role("button", name="One forward on").click()
    assert int(slider.input_value()) == int(last) - 1
    assert "right" not in pane(page, "Left").inner_text()  # no verdict before the end
    page.get_by_role("button", name="First moment").click()
    assert set(text(page, "Right")) == {"░"}
    page.get_by_role("combobox", name="speed").select_option("0.5")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").click()
    assert slider.input_value() == "0"


def save(page: Any, path: Path) -> Path:
    """Have the right pane save its run."""
    with page.expect_download() as download:
        pane(page, "Right").get_by_role("button", name="Save run").click()
    download.value.save_as(path)
    return path


def test_a_run_is_saved_and_opened(page: Any, tmp_path: Path) -> None:
    run(page)
    wait_for_the_end(page)
    path = save(page, tmp_path / "run.json")
    answer = text(page, "Right")
    open_file(page, "Left", path)
    pane(page, "Left").get_by_role("heading", name="tiny-dmax · run.json").wait_for()
    wait_for_the_end(page)
    assert text(page, "Left") == answer
    assert "✓ 2 is right" in pane(page, "Left").inner_text()


def test_a_saved_run_is_the_trace_of_its_request(
    page: Any, server: Running, tmp_path: Path
) -> None:
    run(page)
    wait_for_the_end(page)
    saved = Trace.load(save(page, tmp_path / "run.json"))
    llm = next(model.llm for model in server.models if model.name == "tiny-dmax")
    params = DecodingParams("spd", 0.5, max_new_tokens=256)
    recorded = record(llm, page.get_by_label("Prompt").input_value(), params)
    assert saved.header.keys() == recorded.header.keys()
    assert saved.output.keys() == recorded.output.keys()
    assert untimed(saved.frames) == untimed(recorded.frames)


def untimed(frames: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**frame, "seconds": 0} for frame in frames]


def open_file(page: Any, name: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        pane(page, name).get_by_role("button", name="Open a run").click()
    chooser.value.set_files(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("hello", "It is not JSON."),
        ("[1, 2]", "several traces"),
        ('{"format": "dmax-trace", "version": 99}', "version"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(
    page: Any, tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    open_file(page, "Right", path)
    problem = pane(page, "Right").get_by_role("alert")
    problem.wait_for()
    assert problem.inner_text().startswith("other.json cannot be shown.")
    assert reason in problem.inner_text()


def test_a_hostile_prompt_is_text(page: Any, tmp_path: Path) -> None:
    run(page, HOSTILE)
    wait_for_the_end(page)
    assert page.evaluate("typeof hacked") == "undefined"
    trace = json.loads(save(page, tmp_path / "run.json").read_text(encoding="utf-8"))
    assert trace["prompt"][0]["content"] == HOSTILE


def test_hostile_tokens_are_text(page: Any, tmp_path: Path) -> None:
    run(page)
    wait_for_the_end(page)
    trace = json.loads(save(page, tmp_path / "run.json").read_text(encoding="utf-8"))
    trace["model"] = HOSTILE
    for frame in trace["frames"]:
        frame["texts"] = [HOSTILE if given else "" for given in frame["texts"]]
    path = tmp_path / "<img src=x onerror=hacked=true>.json"
    path.write_text(json.dumps(trace), encoding="utf-8")
    num_elements = "document.querySelectorAll('script, img, b, strong').length"
    before = page.evaluate(num_elements)
    open_file(page, "Right", path)
    pane(page, "Right").get_by_text(path.name).wait_for()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("End")
    assert HOSTILE in text(page, "Right")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate(num_elements) == before


def test_a_wrong_setting_is_told_in_its_pane(page: Any) -> None:
    page.allowed.append("400")
    page.get_by_label("Tokens at most").fill("100000")
    run(page)
    problem = pane(page, "Right").get_by_role("alert")
    problem.wait_for()
    assert problem.inner_text().endswith(".")
    assert page.get_by_role("button", name="Run", exact=True).is_enabled()


def test_one_pane_runs_alone(page: Any) -> None:
    page.get_by_label("Race two settings").uncheck()
    assert not pane(page, "Left").is_visible()
    run(page)
    wait_for_the_end(page)
    assert "✓ 2 is right" in pane(page, "Right").inner_text()


def test_a_key_is_asked_for_and_kept_for_the_session_only(browser: Any, server: Running) -> None:
    options = ServerOptions(api_keys=(KEY,))
    app = protect(create_app(server.models, options), options, "127.0.0.1")
    with running(app) as address, opened(browser, address) as page:
        page.allowed.append("401")
        field = page.get_by_label("API key")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_role("alert").first.wait_for()
        field.fill(KEY)
        field.press("Tab")
        run(page)
        wait_for_the_end(page)
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
        assert page.evaluate("Object.values(localStorage)") == []
        assert KEY not in page.url


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_is_cut_off(browser: Any, address: str, width: int, tmp_path: Path) -> None:
    with opened(browser, address, viewport={"width": width, "height": 800}) as page:
        run(page)
        wait_for_the_end(page)
        page.evaluate(
            "document.querySelectorAll('details').forEach((each) => { each.open = true })"
        )
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)  # to be looked at
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """[...document.querySelectorAll("button, input, select, textarea, h1, h2, p, dd")]
              .filter((node) => node.checkVisibility())
              .map((node) => [node.textContent, node.getBoundingClientRect()])
              .filter(([, box]) => box.left < 0 || box.right > innerWidth)
              .map(([text]) => text)"""
        )
        assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_readable(browser: Any, address: str, scheme: str) -> None:
    with opened(browser, address, color_scheme=scheme) as page:
        run(page)
        wait_for_the_end(page)
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("Home")
        for _ in range(9):
            page.keyboard.press("ArrowRight")
            low = [found for found in contrasts(page) if found["ratio"] < 4.5]
            assert low == []


def test_the_theme_can_be_switched(page: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.get_by_role("button", name="Switch to dark colours").click()
    assert page.evaluate(colour) != before
    page.reload()
    assert page.evaluate(colour) != before
