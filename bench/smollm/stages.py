"""What the stages of bench/pretrained.py leave, and from what each was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from command_line import num_answered, read_if_there

from dmax.checkpoint import ORIGIN
from dmax.errors import InputError
from dmax.files import read_record, write_atomically
from dmax.recipe.folder import ANEW, MOVE, RECORD, TRAINER_STATE
from dmax.recipe.run import start_digest
from smollm.size import Size

NEEDS: dict[str, tuple[str, ...]] = {  # what a stage begins with, by the stages that make it
    "convert": (),
    "problems": (),
    "ar": ("convert", "problems"),
    "base": ("ar", "problems"),
    "responses": ("base", "problems"),
    "oput": ("base", "responses"),
    "masks": ("base", "responses"),
    "random": ("base", "responses"),
    "ar-longer": ("ar", "problems"),
    "measure": ("convert", "ar"),
}
TRAINED = ("ar", "base", "oput", "masks", "random", "ar-longer")
MEASURE = "measure"  # the last stage, which reads whatever is there
MADE_FROM = "made_from"

Log = list[dict[str, float]]


def output(size: Size, stage: str) -> Path:
    """The folder or the file that a stage makes."""
    return files(size, stage)[0] if files(size, stage) else size.folder(folder_name(stage))


def folder_name(stage: str) -> str:
    """What the folder of a stage's model is called."""
    return "original" if stage == "convert" else stage


def files(size: Size, stage: str) -> tuple[Path, ...]:
    """The files that a stage makes in place of a folder."""
    made = {
        "problems": (size.problems, size.held_out),
        "responses": (size.responses, size.held_out_responses),
    }
    return made.get(stage, ())


def is_done(size: Size, stage: str) -> bool:
    """Whether a stage has written all that it makes."""
    if stage == "responses":
        asked = {size.responses: size.num_responses, size.held_out_responses: size.num_held_out}
        return all(num_answered(path) == number for path, number in asked.items())
    path = output(size, stage)
    return (path / "config.json").is_file() or path.is_file()


# --- what was logged ------------------------------------------------------------------------------


def run_folder(folder: Path) -> Path:
    """Where the checkpoints of a stage lie until it ends."""
    return folder.with_name(f"{folder.name}-run")


def history(folder: Path) -> Log:
    """What the run of a stage has logged up to its last whole checkpoint, or to its end."""
    states = run_folder(folder).glob(f"checkpoint-*/{TRAINER_STATE}")
    for path in sorted(states, key=_step, reverse=True):
        state = read_record(path)
        if state is not None:  # it was not cut off
            return list(state["log_history"])
    return list(result_of(folder).get("log", []))


def result_of(folder: Path) -> dict[str, Any]:
    """What a finished stage says of itself; empty if it has not been run to its end."""
    return read_if_there(folder / ORIGIN)


def seconds(folder: Path) -> float:
    """How long a stage has trained, all parts of an interrupted run together."""
    for path in (folder / ORIGIN, run_folder(folder) / RECORD):
        record = read_if_there(path)
        if "seconds" in record:
            return float(record["seconds"])
    times = [entry["train_runtime"] for entry in history(folder) if "train_runtime" in entry]
    ends = [now for now, then in pairwise([*times, 0.0]) if then < now]  # a new part begins at 0
    return sum(ends)


def _step(state: Path) -> int:
    return int(re.sub(r"\D", "", state.parent.name) or 0)


# --- from what it was made ------------------------------------------------------------------------


def digests(size: Size, stage: str) -> dict[str, str | None]:
    """What a stage begins with, by the stages that made it."""
    return {needed: digest(size, needed) for needed in NEEDS[stage]}


def digest(size: Size, stage: str) -> str | None:
    """Tells what a stage has made from what it made another time; None if it is not there."""
    if not is_done(size, stage):
        return None
    paths = files(size, stage)
    if not paths:
        return start_digest(str(output(size, stage)))
    content = b"".join(path.read_bytes() for path in paths if path.is_file())
    return hashlib.sha256(content).hexdigest()[:16]


def keep_origin(size: Size, stage: str, made_from: Mapping[str, str | None]) -> None:
    """Write down beside what a stage has made from what it was made."""
    path = _note(size, stage)
    record = read_if_there(path) | {MADE_FROM: made_from}
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def _note(size: Size, stage: str) -> Path:
    made = output(size, stage)
    return made.with_suffix(".from.json") if files(size, stage) else made / ORIGIN


def renewed(size: Size, stage: str) -> list[str]:
    """Stages that were made anew since this one was made from them.

    None for a stage of earlier releases, which did not write it down.
    """
    was = read_if_there(_note(size, stage)).get(MADE_FROM, {})
    return [
        needed
        for needed, then in was.items()
        if is_done(size, stage) and digest(size, needed) not in (None, then)
    ]


def check_fits(size: Size, stage: str) -> None:
    """Raise `InputError` if a stage, or one that it needs, is of another base than today's."""
    read = [name for name in NEEDS if stage == MEASURE or name == stage or name in before(stage)]
    if not any(renewed(size, name) for name in read if name != MEASURE):
        return
    found = {name: renewed(size, name) for name in NEEDS if name != MEASURE}
    old = [name for name, others in found.items() if others]
    new = dict.fromkeys(other for others in found.values() for other in others)
    raise InputError(
        f"what is there of {_quoted(old)} was made before {_quoted(new)} was made anew",
        hint=f"remove {leavings(size, old)}, and run `{size.command}` again",
    )


def before(stage: str) -> set[str]:
    """All stages that a stage is made from, directly or not."""
    return {each for needed in NEEDS[stage] for each in (needed, *before(needed))}


def leavings(size: Size, stages: Collection[str]) -> str:
    """What there is of stages and of all that is made from them, as one says it to a shell."""
    named = []
    for stage in NEEDS:
        if stage == MEASURE or not {stage, *before(stage)} & set(stages):
            continue
        paths = files(size, stage)
        made = size.folder(folder_name(stage))
        folders = [each for each in (made, run_folder(made)) if not paths and each.exists()]
        named += [*folders, *(f"{path.with_suffix('')}.*" for path in paths if path.exists())]
    return " ".join(map(str, named))


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@contextmanager
def in_run(folder: Path) -> Iterator[None]:
    """Say which folder to remove where `dmax train` would offer `--fresh`."""
    try:
        yield
    except InputError as error:
        if error.hint not in (ANEW, MOVE):
            raise
        hint = f"remove {run_folder(folder)}, or move it away, to train this stage anew"
        raise InputError(error.message, hint=hint) from None
