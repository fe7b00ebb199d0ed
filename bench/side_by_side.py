"""Runs side by side: each has a process and a record of its own, which are put together later."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from command_line import count, read_if_there, refusing

from dmax.environment import select_device
from dmax.errors import InputError
from dmax.evaluation.sweep import add_points
from dmax.files import read_record, write_atomically

Pair = tuple[Path, Path]
"""A record of a run's own, and the record of all."""
Work = tuple[Callable[..., Iterable[Pair]], tuple[Any, ...]]
"""A function that gives pairs, and its arguments."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line say where runs are trained, and how many at once."""
    parser.add_argument("--gpu", action="store_true", help="train on a GPU")
    parser.add_argument("--jobs", type=count, default=1, help="runs side by side")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the script if these options cannot be followed here."""
    if options.gpu:  # else the Trainer would take the CPU and not say so
        with refusing(parser):
            select_device("cuda")


def do(work: Mapping[str, Work], num_jobs: int) -> None:
    """Do all the work, `num_jobs` pieces at a time, and put the records together as they come.

    Every piece has a fresh process of one thread. If one fails, the others are still finished, and
    what it had measured is kept in its own record.

    Args:
        work: the pieces by their names.
        num_jobs: how many at once.

    Raises:
        Exception: what the first piece that failed has raised; `InputError` if it was killed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    failed: dict[str, Exception] = {}
    with ThreadPoolExecutor(num_jobs) as pool:
        tasks = {pool.submit(_alone, name, *piece): name for name, piece in work.items()}
        for task in as_completed(tasks):
            try:
                for part, whole in task.result():
                    put_together(part, whole)
            except Exception as error:  # whatever ended one run ends no other
                print(f"error: {tasks[task]}: {error!r}", flush=True)
                failed[tasks[task]] = error
    if len(failed) > 1:
        print(f"not finished: {', '.join(failed)}", flush=True)
    if failed:
        raise next(iter(failed.values()))


def _alone(
    name: str, function: Callable[..., Iterable[Pair]], arguments: tuple[Any, ...]
) -> Iterable[Pair]:
    """What a piece gives in a process of its own: a killed one breaks the pool that it is in."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise InputError(
            f"the process of {name} was killed, or did not start",
            hint="if memory ran out, take fewer --jobs; what is measured is kept",
        ) from None


def begin(part: Path, whole: Path) -> None:
    """Begin a part with what is measured already; what it alone knows of it stays.

    A part of another limit or task stays as it is: who goes on with it says what differs.
    """
    if not whole.exists():
        return
    known = read_record(whole)
    held = read_if_there(part)
    if all(known.get(name, value) == value for name, value in held.items() if _is_plain(value)):
        write_atomically(_begun(part), json.dumps(known, indent=1) + "\n")
        record = merged(known, unknown(known, held))
        write_atomically(part, json.dumps(record, indent=1) + "\n")


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping | list)


def unknown(known: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The entries and points of a part that a record does not have."""
    new = dict(part)
    for name, value in part.items():
        if name == "points":
            places = {_place(point) for point in known.get("points", [])}
            new[name] = [point for point in value if _place(point) not in places]
        elif isinstance(value, Mapping) and name != "environment":
            new[name] = {key: each for key, each in value.items() if key not in known.get(name, {})}
    return new


def put_together(part: Path, whole: Path) -> None:
    """Add to a record what a part of it has measured since it began."""
    if part.exists():
        new = since(read_if_there(_begun(part)), read_record(part))
        record = merged(read_if_there(whole), new)
        write_atomically(whole, json.dumps(record, indent=1) + "\n")


def _begun(part: Path) -> Path:
    """Where it stands what a part began with."""
    return part.with_suffix(".begun.json")


def since(begun: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the entries and points that it began with: others may have newer ones."""
    new = dict(part)
    for name, value in part.items():
        before = begun.get(name)
        if name == "points":
            new[name] = [point for point in value if point not in (before or [])]
        elif isinstance(value, Mapping) and isinstance(before, Mapping) and name != "environment":
            new[name] = {key: each for key, each in value.items() if before.get(key) != each}
    return new


def merged(held: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both records as one; what is in both is the new one's, but for the environment.

    That stays, and points that were measured in another say so.
    """
    record = dict(new) | dict(held)
    for name, value in new.items():
        if isinstance(value, Mapping) and name != "environment":
            record[name] = {**held.get(name, {}), **value}
        elif name not in ("environment", "points"):
            record[name] = value
    if "points" in new:
        is_new = {_place(point) for point in new["points"]}
        kept = [point for point in held.get("points", []) if _place(point) not in is_new]
        record["points"] = kept
        add_points(record, new["points"], new["environment"])
    return record


def _place(point: Mapping[str, Any]) -> tuple[Any, Any]:
    """Points of the same label and value are one point."""
    return point["label"], point["value"]
