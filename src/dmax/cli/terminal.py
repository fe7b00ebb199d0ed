"""What commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from wrapt import register_post_import_hook

from dmax import __version__
from dmax.errors import InputError, shorten

if TYPE_CHECKING:
    from dmax.evaluation.run import Summary

LONGEST = 1000  # characters of a sentence; what it names is cut much earlier
PERIOD = 30.0  # seconds between two lines in a log

# Names and texts are shown as they are: brackets and colons in them mean nothing.
console = Console(stderr=True, markup=False, emoji=False)


class ConsoleHandler(logging.Handler):
    """Shows what dmax logs on stderr, each message as one plain line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message, above a progress bar if there is one."""
        level = (f"{record.levelname.lower()}: ", "bold yellow")
        say(Text.assemble(level, record.getMessage()))


def prepare_streams() -> None:
    """Make stdout and stderr take every text, whatever the locale and whoever closed them.

    Raises:
        InputError: stdout is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the exit
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise InputError("stdout is closed", hint="send what is not wanted to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def quiet_transformers() -> None:
    """Once transformers is imported, turn off its warnings and its bars.

    What is wrong with a checkpoint is said in our own sentence, and loading takes less time than a
    bar. Downloads keep theirs, and warnings can be asked for as transformers documents it.
    """

    def hide(logging: Any) -> None:
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

        were_disabled = are_progress_bars_disabled()
        logging.disable_progress_bar()
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()
        if not were_disabled:
            enable_progress_bars()

    register_post_import_hook(hide, "transformers.utils.logging")


def quiet_datasets() -> None:
    """Once datasets is imported, turn off its bars where no terminal would draw them anew."""
    if not console.is_terminal:
        register_post_import_hook(lambda each: each.disable_progress_bars(), "datasets")


def say(text: Text | str) -> None:
    """Show a line on stderr if it can be shown; what goes on does not depend on it."""
    with suppress(OSError, SystemExit):  # rich exits where nobody reads
        console.print(text, soft_wrap=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what happens next, before it takes its time; a terminal shows it while it lasts."""
    line = Text(f"{shorten(what)} …")
    if console.is_terminal:
        with console.status(line):
            yield
    else:
        console.print(line, soft_wrap=True)
        yield


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr that is fed `(done, total)`, and a note if there is one."""
    columns = (
        SpinnerColumn(),  # moves while the first results take their time
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


class Lines:
    """Progress as a line every half minute, for the logs of jobs that nobody watches.

    Args:
        what: is done.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = self._told = time.monotonic()
        self._done_before: int | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Tell how many of how many are done, with a note, and how long the others will take."""
        now = time.monotonic()
        if self._done_before is None:
            self._done_before = done
        num_new = done - self._done_before
        if not num_new or now - self._told < PERIOD:
            return
        self._told = now
        left = timedelta(seconds=round((now - self._began) / num_new * (total - done)))
        parts = [f"{self._what}: {done:,} of {total:,}", note, f"{left} left"]
        console.print(", ".join(filter(None, parts)), soft_wrap=True)


@contextmanager
def long_progress(what: str) -> Iterator[Callable[..., None]]:
    """A bar that is fed `(done, total, note)`; without a terminal, `Lines`."""
    if not console.is_terminal:
        yield Lines(what)
        return
    with progress_bar(what) as bar:
        yield bar


def print_error(message: str, hint: str | None = None) -> None:
    """One sentence on stderr, and how to mend it as a second paragraph."""
    console.print(Text.assemble(("error: ", "bold red"), shorten(message, LONGEST)), soft_wrap=True)
    if hint:
        console.print(Text(f"\nhint: {shorten(hint, LONGEST)}"), soft_wrap=True)


def print_version(is_wanted: bool) -> None:
    """Write the version on stdout and end the command, if that is wanted."""
    if is_wanted:
        sys.stdout.write(f"dmax {__version__}\n")
        raise typer.Exit


def print_json(record: Any) -> None:
    """Write one line of JSON on stdout."""
    is_plain = sys.stdout.encoding is not None and sys.stdout.encoding.lower() != "utf-8"
    sys.stdout.write(json.dumps(record, ensure_ascii=is_plain) + "\n")


def in_words(summary: Summary) -> str:
    """The figures of an evaluation on three lines."""
    cost = summary.cost
    low, high = summary.interval
    correct = f"{summary.accuracy:.1%} ({summary.correct}/{summary.total})"
    tokens = f"{summary.generated_tokens} tokens / {cost.num_forwards} forwards"
    others = (
        f"{cost.num_prefill_forwards} encoded prompts, "
        f"{cost.num_commit_forwards} only finished blocks"
    )
    speed = f"{summary.tokens_per_second:.0f} tokens/s at batch {summary.batch_size}"
    return (
        f"accuracy  {correct}, 95 % interval {low:.1%} to {high:.1%}\n"
        f"TPF       {summary.tpf:.2f} ({tokens}; {others})\n"
        f"speed     {speed}\n"
    )
