"""What commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Shows what dmax logs on stderr, each message as one plain line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message, above a progress bar if there is one."""
        level = (f"{record.levelname.lower()}: ", "bold yellow")
        console.print(Text.assemble(level, record.getMessage()), soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is fed `(done, total)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(record: Any) -> None:
    """Write one line of JSON on stdout."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
