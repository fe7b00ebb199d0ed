"""Where a run reports to besides its own log: TensorBoard, trackio or wandb, on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dmax import extras
from dmax.errors import InputError, did_you_mean, show

LOGGERS = ("tensorboard", "trackio", "wandb")  # which the extra `log` installs
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in that of a run. A resumed run goes on with its curves."""
PROJECT = "dmax"
"""What trackio and wandb gather runs under, unless a recipe or the environment says."""


def check_loggers(report_to: Any) -> None:
    """Make sure that a `report_to` can be followed.

    Raises:
        InputError: one of its names is unknown, or the package that it names is missing.
    """
    names = report_to if isinstance(report_to, list) else [report_to or "none"]
    for name in names:
        if not isinstance(name, str) or name not in {"none", "all", *INTEGRATION_TO_CALLBACK}:
            near = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            raise InputError(
                f"there is no logger {show(name)}",
                hint=near or f"it may be {', '.join(LOGGERS)} or none",
            )
        if name in LOGGERS:
            extras.require(name, "log", f"`report_to: {name}`")


@contextmanager
def reported_here(run_dir: Path) -> Iterator[None]:
    """Have loggers write beside the checkpoints and send nothing, unless the environment says so.

    trackio does so by itself: it sends nothing without a `trackio_space_id`.
    """
    chosen = {
        "TENSORBOARD_LOGGING_DIR": str(run_dir / TENSORBOARD),
        "WANDB_DIR": str(run_dir),
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": PROJECT,
    }
    added = {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
