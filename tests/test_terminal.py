"""What a command shows while it works."""

from __future__ import annotations

import io
import logging
import os
from contextlib import suppress
from types import SimpleNamespace

import pytest
from rich.console import Console

from dmax.cli import terminal


@pytest.mark.parametrize("note", ["1,185 tokens/s", ""])
def test_a_terminal_shows_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(terminal, "console", console)
    with terminal.long_progress("distilling") as progress:
        progress(10, 200, note)
        progress(20, 200, note)
    assert "distilling" in shown.getvalue()
    assert f"20/200 {note}" in shown.getvalue()
    assert "-:--:--" in shown.getvalue() or "0:00:" in shown.getvalue()  # what is left


def test_a_log_has_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    times = iter([0.0, 1.0, 20.0, 31.0, 40.0, 70.0])  # the first one when it begins
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(terminal, "time", clock)  # threads of others keep theirs
    monkeypatch.setattr(terminal, "console", Console(file=shown, width=120))
    with terminal.long_progress("distilling") as progress:
        for done in (1_000, 1_010, 1_031, 1_040, 1_070):  # an earlier run had answered 1,000
            progress(done, 5_000, "1,185 tokens/s")
    assert shown.getvalue().splitlines() == [
        "distilling: 1,031 of 5,000, 1,185 tokens/s, 1:06:09 left",
        "distilling: 1,070 of 5,000, 1,185 tokens/s, 1:05:30 left",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_of_datasets_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(terminal, "console", Console(force_terminal=is_terminal))
    monkeypatch.setattr(  # as if it were imported now
        terminal, "register_post_import_hook", lambda hook, name: hook(datasets)
    )
    datasets.enable_progress_bars()
    try:
        terminal.quiet_datasets()
        assert datasets.is_progress_bar_enabled() == is_terminal
    finally:
        datasets.enable_progress_bars()


def test_a_log_that_cannot_be_shown_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    record = logging.LogRecord("dmax", logging.WARNING, __file__, 1, "a warning", None, None)
    for target in (writing, "/dev/full"):
        with open(target, "w", buffering=1) as file:
            monkeypatch.setattr(terminal, "console", Console(file=file))
            terminal.ConsoleHandler().emit(record)
            terminal.say("loading")
            with suppress(OSError):  # what is left in the buffer
                file.close()
