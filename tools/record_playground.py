"""Records the race that the playground opens with, as an animation.

    python tools/record_playground.py           # writes docs/images/playground.webp

A real run: it starts `dmax serve`, opens the page in Chromium and takes a picture after every
forward. Only the pace is the animation's own.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1000  # pixels of the window; two panes stand side by side
SCALE = 1.25
FORWARD = 1000  # milliseconds
END = 6000
WHERE = "playground  "
AREA = """() => {
  const boxes = [...document.querySelectorAll(".transport, .pane .result")]
    .map((node) => node.getBoundingClientRect());
  const top = Math.min(...boxes.map((box) => box.top)) + scrollY - 12;
  const bottom = Math.max(...boxes.map((box) => box.bottom)) + scrollY + 12;
  return { x: 0, y: top, width: innerWidth, height: bottom - top };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parents[1] / "docs" / "images"
    parser.add_argument("--output", type=Path, default=folder / "playground.webp")
    arguments = parser.parse_args()
    with serving() as url, opened(url) as page:
        pictures = record(page)
    write(pictures, arguments.output)
    size = arguments.output.stat().st_size / 1e3
    print(f"{arguments.output}: {len(pictures)} pictures, {size:.0f} kB")


@contextmanager
def serving() -> Iterator[str]:
    """The address of the playground of a server that runs meanwhile."""
    command = [sys.executable, "-m", "dmax", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield next(line for line in server.stdout if line.startswith(WHERE)).split()[1]
        finally:
            server.terminate()


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The page of that address in the system's Chromium."""
    args = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=args)
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 900},
            device_scale_factor=SCALE,
            reduced_motion="reduce",
        )
        page.goto(url)
        yield page
        browser.close()


def record(page: Any) -> list[Image.Image]:
    """A picture for every moment of the race."""
    page.get_by_label("Slow motion").uncheck()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Finished.").wait_for()
    page.get_by_label("Slow motion").check()
    num_forwards = int(page.get_by_role("slider").get_attribute("max"))
    area = page.evaluate(AREA)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Home")
    pictures = [picture(page, area)]
    for _ in range(num_forwards):
        page.keyboard.press("ArrowRight")
        pictures.append(picture(page, area))
    return pictures


def picture(page: Any, area: dict[str, float]) -> Image.Image:
    content = page.screenshot(full_page=True, clip=area)
    return Image.open(io.BytesIO(content)).convert("RGB")


def write(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write them as one animation that begins anew after a while."""
    durations = [FORWARD] * (len(pictures) - 1) + [END]
    first, *others = pictures
    first.save(
        path,
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        lossless=True,
        minimize_size=True,  # with the slowest method, a tenth of the size
        method=6,
    )


if __name__ == "__main__":
    main()
