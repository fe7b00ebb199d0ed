"""A headless Chromium, and pages of it that complain about errors and foreign requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; on Debian: apt install chromium"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium; root has no sandbox for it."""
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page of a server; its end checks that nothing went wrong and no other host was asked.

    `page.allowed` holds parts of console errors that the test provokes.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.allowed = list[str]()
    said = list[str]()
    asked = list[str]()
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    unexpected = [text for text in said if not any(part in text for part in page.allowed)]
    context.close()
    assert not unexpected, unexpected
    origin = "/".join(url.split("/")[:3])
    foreign = [at for at in asked if not at.startswith((f"{origin}/", "blob:", "data:"))]
    assert not foreign, foreign


def contrasts(page: Any) -> list[dict[str, Any]]:
    """Every visible text with the contrast of its colour to what it stands on (WCAG 2.2)."""
    found: list[dict[str, Any]] = page.evaluate(CONTRASTS)
    return found


CONTRASTS = """() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const flat = (colours) => { // painted over one another, as [red, green, blue]
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
    }
    return [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const luminance = (rgb) => {
    const [red, green, blue] = rgb.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (node) => {
    const colours = [];
    for (let each = node; each; each = each.parentElement) {
      colours.unshift(getComputedStyle(each).backgroundColor);
    }
    return ["white", ...colours];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const isOff = node.closest("script, noscript, option, :disabled, [aria-disabled=true]");
    if (!text || isOff || !node.checkVisibility() || node.closest("svg")) continue;
    const ground = behind(node);
    const ink = getComputedStyle(node).color;
    const pair = [luminance(flat([...ground, ink])), luminance(flat(ground))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    found.push({ text, ratio });
  }
  return found;
}"""
