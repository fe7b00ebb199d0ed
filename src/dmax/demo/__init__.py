"""`dmax demo`: one problem decoded three ways before your eyes, then all three measured."""

from __future__ import annotations

import json
import sys

from rich.console import Console

NUM_PROBLEMS = 32
SEED = 2026  # whatever the seed, test problems are never in the training split
REPLAY_SECONDS = 8.0


def run_demo(*, as_json: bool = False) -> None:
    """Show one problem decoded three ways, the table, and what it comes to.

    With `as_json`, stdout gets only what was measured, as one object.
    """
    console = Console(stderr=as_json, highlight=False)
    console.print("loading tiny-base and tiny-dmax ...")
    from dmax.demo.present import present  # loads torch, so the line above comes first

    record = present(console, NUM_PROBLEMS, SEED, 0 if as_json else REPLAY_SECONDS)
    if as_json:
        sys.stdout.write(json.dumps(record) + "\n")
