"""`dmax demo`: one problem decoded three ways before your eyes, then all three measured."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from dmax.cli.terminal import doing

NUM_PROBLEMS = 32
SEED = 2026  # whatever the seed, test problems are never in the training split
REPLAY_SECONDS = 8.0


def run_demo(*, as_json: bool = False) -> None:
    """Show one problem decoded three ways, the table, and what it comes to.

    With `as_json`, stdout gets only what was measured, as one object.
    """
    with doing("loading tiny-base and tiny-dmax"):
        from dmax.demo.present import load, present  # torch too, so the line above comes first

        models = load()
    console = Console(stderr=as_json, highlight=False)
    record = present(console, models, NUM_PROBLEMS, SEED, 0 if as_json else REPLAY_SECONDS)
    if as_json:
        sys.stdout.write(json.dumps(record) + "\n")
