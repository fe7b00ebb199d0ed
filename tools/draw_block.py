"""Draws a block of `tiny-dmax` over its forwards, as soft parallel decoding fills and revises it.

    python tools/draw_block.py                  # writes docs/images/block.svg

A row is a forward, a cell is a position of the block. The trajectory is the real one, in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import dmax

QUESTION = (
    "At the beginning Ben keeps 7 cards. Ben gives 2 cards to a friend. The school hands Ben 6 "
    "extra cards. A friend gives Ben 4 more cards. The club tops it up to 2 times the number. Ben "
    "sorts the cards into 2 equal bags and keeps one bag. The club tops it up to 2 times the "
    "number. A storm leaves just one of 2 equal shares. How many cards are there in the end?"
)
PARAMS = dmax.DecodingParams(strategy="spd", threshold=0.5)

# Pixels. Nothing has a background: greys and fills are readable on white and on black.
LEFT = 80
RIGHT = 166
TOP = 44
ROW = 47
CELL = 26
SWATCH = 14
GAP = 4
LETTER = 7.9
PADDING = 11
GREY = "#7a838e"
BLUES = ("#dbe9ff", "#b4d2ff", "#85b4fb", "#4481e8", "#2c6ad2")  # from a confidence of 0.5 to 1
ORANGE = "#f08c2e"
RUST = "#d2691e"
GREEN = "#14805e"
DARK = "#10233f"
WHITE = "#ffffff"
LIGHT = (*BLUES[:-2], ORANGE)


@dataclass(frozen=True, slots=True)
class Cell:
    """A position after a forward.

    Attributes:
        text: its token; empty while it is masked.
        confidence: probability of the token.
        before: the token that was revised, or an empty text.
        settled: whether the block is final.
    """

    text: str
    confidence: float
    before: str
    settled: bool


def trajectory(question: str, params: dmax.DecodingParams) -> list[list[Cell]]:
    """The last block of the answer, a row of cells for each forward, up to the end of the text."""
    llm = dmax.LLM("tiny-dmax", dtype="float32", device="cpu")
    tokenizer = llm.tokenizer
    assert tokenizer is not None, "the bundled models have one"
    *events, finished = llm.stream(question, params)
    start = events[-1].position
    length = len(finished.token_ids) - start
    rows = []
    known = [""] * length
    for event in events:
        if event.position != start:
            continue
        row = []
        for index in range(length):
            word = tokenizer.decode([event.token_ids[index]]).strip(" ").replace("\n", "↵")
            text = "" if event.masked[index] else word
            before = "" if known[index] == text else known[index]
            settled = event.kind == "committed"
            row.append(Cell(text, event.confidence[index], before, settled))
        known = [cell.text for cell in row]
        rows.append(row)
    return rows


def draw(rows: Sequence[Sequence[Cell]]) -> str:
    """The picture as SVG."""
    columns = list(zip(*rows, strict=True))
    widths = [PADDING + LETTER * max(len(cell.text) for cell in column) for column in columns]
    lefts = [LEFT + sum(widths[:index]) + GAP * index for index in range(len(widths))]
    right = lefts[-1] + widths[-1]
    width = round(right + RIGHT)
    height = TOP + ROW * (len(rows) - 1) + CELL + 2

    parts = [legend()]
    was_masked = [True] * len(columns)
    for number, row in enumerate(rows):
        top = TOP + ROW * number
        parts.append(label(0, top, f"forward {number + 1}"))
        for cell, left, wide in zip(row, lefts, widths, strict=True):
            parts.append(draw_cell(cell, left, top, wide))
        parts.append(label(right + 14, top, what_happened(row, was_masked)))
        was_masked = [not cell.text for cell in row]

    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-size="12.5" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">'
    )
    title = f"<title>A block of tiny-dmax over {len(rows)} forwards</title>"
    return "\n".join((head, title, *parts, "</svg>", ""))


def what_happened(row: Sequence[Cell], was_masked: Sequence[bool]) -> str:
    """What a forward did, in a few words."""
    decoded = sum(bool(cell.text) and new for cell, new in zip(row, was_masked, strict=True))
    revised = sum(bool(cell.before) for cell in row)
    counts = {"decoded": decoded, "revised": revised}
    said = [f"{count} {name}" for name, count in counts.items() if count]
    return ", ".join(said) or "nothing changed"


def draw_cell(cell: Cell, left: float, top: float, wide: float) -> str:
    """A position; below a revised one stands the token that it replaces."""
    if not cell.text:
        return box(left, top, wide, None)
    fill = colour(cell)
    ink = DARK if fill in LIGHT else WHITE
    middle = left + wide / 2
    parts = [box(left, top, wide, fill), centred(middle, top + 17.5, cell.text, ink)]
    if cell.before:
        struck = ' font-size="11.5" text-decoration="line-through"'
        parts.append(centred(middle, top + 38, cell.before, RUST, struck))
    return "".join(parts)


def colour(cell: Cell) -> str:
    """The fill of a decoded position."""
    if cell.settled:
        return GREEN
    if cell.before:
        return ORANGE
    shade = int((cell.confidence - 0.5) / 0.5 * len(BLUES))
    return BLUES[min(max(shade, 0), len(BLUES) - 1)]


def legend() -> str:
    """What the fills mean, above the first row."""
    entries = (
        ("masked", (None,)),
        ("provisional (paler: less sure)", BLUES),
        ("revised", (ORANGE,)),
        ("final", (GREEN,)),
    )
    parts = []
    left = float(LEFT)
    for words, fills in entries:
        for fill in fills:
            parts.append(box(left, 1, SWATCH, fill, SWATCH))
            left += SWATCH + 2
        parts.append(f'<text x="{left + 5:.1f}" y="12.5" fill="{GREY}">{words}</text>')
        left += LETTER * len(words) + 28
    return "".join(parts)


def box(left: float, top: float, wide: float, fill: str | None, high: float = CELL) -> str:
    """A rounded rectangle; dashed and empty without a `fill`."""
    look = f'fill="{fill}"'
    if fill is None:
        look = f'fill="none" stroke="{GREY}" stroke-opacity="0.6" stroke-dasharray="3 3"'
    size = f'width="{wide:.1f}" height="{high}"'
    return f'<rect x="{left:.1f}" y="{top}" {size} rx="4" {look}/>'


def label(left: float, top: float, words: str) -> str:
    """Grey words beside a row."""
    return f'<text x="{left:.1f}" y="{top + 17.5:.1f}" fill="{GREY}">{escape(words)}</text>'


def centred(middle: float, base: float, words: str, ink: str, more: str = "") -> str:
    """A token."""
    place = f'x="{middle:.1f}" y="{base:.1f}"'
    return f'<text {place} fill="{ink}" text-anchor="middle"{more}>{escape(words)}</text>'


def main() -> None:
    """Decode, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images/block.svg"))
    output = parser.parse_args().output
    output.write_text(draw(trajectory(QUESTION, PARAMS)), encoding="utf-8")


if __name__ == "__main__":
    main()
