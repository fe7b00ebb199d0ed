"""What the scripts here have in common: options as given, their values, and their files."""

from __future__ import annotations

import argparse
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeVar

import torch

from dmax import extras
from dmax.environment import environment
from dmax.errors import InputError
from dmax.files import read_record

Options = TypeVar("Options")


def given_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options of the command line that were given, by name; lists as tuples."""
    values = vars(parser.parse_args())
    given = {name: value for name, value in values.items() if value is not None}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


@contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the script with the sentence of an `InputError`, as for an option that is wrong."""
    try:
        yield
    except InputError as error:
        parser.error(str(error))


@contextmanager
def telling() -> Iterator[None]:
    """End the script with an `InputError` in words and exit code 2, as the `dmax` command does."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def changed(parser: argparse.ArgumentParser, options: Options, given: dict[str, Any]) -> Options:
    """The options with what was given in their place; ends the script if they do not fit."""
    with refusing(parser):
        return replace(options, **given)  # type: ignore[type-var]


def check_plots(parser: argparse.ArgumentParser) -> None:
    """End the script now if it could not draw what it has measured then."""
    with refusing(parser):
        extras.require("matplotlib", "eval", "drawing a plot")


def result_path(theme: str, device: torch.device, parts: Sequence[str] = ()) -> Path:
    """bench/results/THEME_HARDWARE_DATE.json; where only parts are measured, they stand in it."""
    record = environment(device)
    hardware = record.get("gpu") or f"{record['cpu']} {record['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    name = "_".join((theme, slug, *parts, record["date"][:10]))
    return Path("bench/results") / f"{name}.json"


def check_page(path: Path, page: str) -> None:
    """Make sure that what stands in the place of a page, if anything does, is such a page.

    Args:
        path: where it is to be written.
        page: a text that begins as the page does, with its title.

    Raises:
        InputError: it is something else, which has to stay as it is.
    """
    if not path.exists():
        return
    held = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "no file"
    if held and held.partition("\n")[0] != page.partition("\n")[0]:
        raise InputError(
            f"{path} exists and was not written by this command", hint="choose another output"
        )


def read_if_there(path: Path) -> dict[str, Any]:
    """What a record holds; empty where there is none, or one that was cut off."""
    return dict(read_record(path) or {}) if path.is_file() else {}


def num_answered(path: Path) -> int:
    """Questions that a file of answers is about, also those whose answer was dropped."""
    files = (path, path.with_suffix(".dropped.jsonl"))
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())


# --- types of options, which refuse a value before anything is measured ---------------------------


def count(text: str) -> int:
    """A whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def seed(text: str) -> int:
    """A whole number from 0 that PyTorch and numpy take."""
    if text.isdecimal() and int(text) < 2**32:
        return int(text)
    raise ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")


def amount(text: str) -> float:
    """A number above 0."""
    value = _number(text)
    if value > 0:
        return value
    raise ArgumentTypeError(f"expected a number above 0, got {text!r}")


def threshold(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if 0 <= value <= 1:
        return value
    raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


def _number(text: str) -> float:
    """A finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return nan
    return value if isfinite(value) else nan
