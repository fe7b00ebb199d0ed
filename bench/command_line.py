"""What the scripts of the two benchmarks have in common: options as given, and where results go."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from dmax.environment import environment
from dmax.errors import InputError

Options = TypeVar("Options")


def given_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options of the command line that were given, by name; lists as tuples."""
    values = vars(parser.parse_args())
    given = {name: value for name, value in values.items() if value is not None}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def changed(parser: argparse.ArgumentParser, options: Options, given: dict[str, Any]) -> Options:
    """The options with what was given in their place; ends the script if they do not fit."""
    try:
        return replace(options, **given)  # type: ignore[type-var]
    except InputError as error:
        parser.error(str(error))


def result_path(theme: str, device: torch.device, parts: Sequence[str] = ()) -> Path:
    """bench/results/THEME_HARDWARE_DATE.json; where only parts are measured, they stand in it."""
    record = environment(device)
    hardware = record.get("gpu") or f"{record['cpu']} {record['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    name = "_".join((theme, slug, *parts, record["date"][:10]))
    return Path("bench/results") / f"{name}.json"
