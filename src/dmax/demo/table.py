"""The table of the demo and the sentence below it: every figure is measured in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dmax.demo.settings import CAREFUL, DMAX, Setting
from dmax.evaluation.statistics import sign_test
from dmax.outputs import ratio

if TYPE_CHECKING:
    from dmax.evaluation.run import Summary

NAME = "decoding"  # heading of the first column
WIDE = 72  # columns of a terminal from which the figures stand in a table
SIGNIFICANT = 0.05
TPF = "TPF, tokens per forward: how many words, numbers and marks one pass of the network settles."


@dataclass(frozen=True, slots=True)
class Measured:
    """A setting on all problems.

    Attributes:
        setting: how they were decoded.
        summary: what that gave and cost.
        correct: whether each answer is right.
    """

    setting: Setting
    summary: Summary
    correct: tuple[bool, ...]


def table(console: Console, measured: Sequence[Measured]) -> RenderableType:
    """Counts with their intervals, TPF and speed; lists where a table has no room."""
    rows = [cells(each) for each in measured]
    if console.width < WIDE:
        return Group(*(_as_list(row) for row in rows))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in rows[0]:
        grid.add_column(name, justify="left" if name == NAME else "right", no_wrap=True)
    for each, row in zip(measured, rows, strict=True):
        grid.add_row(*row.values(), style="bold" if each.setting == DMAX else None)
    return grid


def _as_list(row: Mapping[str, str]) -> Text:
    figures = [f"  {name}: {value}" for name, value in row.items() if name != NAME]
    return Text.assemble((row[NAME], "bold"), *(f"\n{line}" for line in figures))


def caption(measured: Sequence[Measured]) -> str:
    """What was measured, and where."""
    summary = measured[0].summary
    record = summary.environment
    return (
        f"{summary.total} unseen word problems, exact final answer, one after another; "
        f"{record['cpu']}, one thread, torch {record['torch']}, {summary.dtype}."
    )


def cells(measured: Measured) -> dict[str, str]:
    """A row of the table by its headings."""
    summary = measured.summary
    low, high = summary.interval
    return {
        NAME: measured.setting.label,
        "threshold": f"{measured.setting.threshold:g}",
        "correct": f"{summary.correct}/{summary.total}",
        "95 % interval": f"{100 * low:.0f} to {100 * high:.0f} %",
        "TPF": f"{summary.tpf:.2f}",
        "tokens/s": f"{summary.tokens_per_second:.0f}",
        "seconds": f"{summary.seconds:.2f}",
    }


def closing(measured: Sequence[Measured]) -> str:
    """What DMax gains over the careful base, in one sentence."""
    found = {each.setting: each for each in measured}
    base = found[CAREFUL]
    dmax = found[DMAX]
    more = ratio(dmax.summary.tpf, base.summary.tpf)
    faster = ratio(dmax.summary.tokens_per_second, base.summary.tokens_per_second)
    pairs = list(zip(dmax.correct, base.correct, strict=True))
    gained = sum(ours and not theirs for ours, theirs in pairs)
    lost = sum(theirs and not ours for ours, theirs in pairs)
    chance = sign_test(gained, lost)
    accuracy = "same accuracy within noise"
    if chance < SIGNIFICANT:
        accuracy = "more answers right" if gained > lost else "fewer answers right"
    counts = f"{dmax.summary.correct} and {base.summary.correct} of {dmax.summary.total}"
    return (
        f"DMax against the careful base: {more:.1f} times the tokens per forward, {faster:.1f} "
        f"times the speed, {accuracy} ({counts} right; exact McNemar test, p={chance:.2g})."
    )
