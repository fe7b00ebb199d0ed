"""The page of the interface, in a real browser: all of what the server says of itself."""

from __future__ import annotations

from typing import Any

import pytest
from browser import contrasts, needs_chromium, opened
from running import Running

pytestmark = needs_chromium
WIDTHS = (360, 800, 1400)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_operation_is_shown_with_its_fields(
    browser: Any, server: Running, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 900}
    with opened(browser, f"{server.url}/docs", viewport=size, color_scheme=scheme) as page:
        page.wait_for_selector("#reference section")
        shown = page.locator("#reference").inner_text()
        api = server.app.openapi()
        for path, methods in api["paths"].items():
            for method in methods:
                assert f"{method.upper()} {path}" in shown
        for field in ("messages[].role", "dmax.strategy", "stream_options.include_usage"):
            assert field in shown
        assert "[object Object]" not in shown
        assert "undefined" not in shown
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [each for each in contrasts(page) if each["ratio"] < 4.5] == []


def test_a_server_that_is_gone_is_told(browser: Any, server: Running) -> None:
    with opened(browser, f"{server.url}/") as page:
        page.allowed += ["503"]
        page.route("**/openapi.json", lambda route: route.fulfill(status=503))
        page.goto(f"{server.url}/docs")
        page.wait_for_selector("#reference:not([aria-busy])")
        assert "answered 503" in page.locator("#reference").inner_text()
