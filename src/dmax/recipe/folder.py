"""The folder of a training run, `<output_dir>-run`: its checkpoints, and what trained them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerState

from dmax.adapters import WEIGHTS as ADAPTERS
from dmax.errors import InputError
from dmax.files import changes, remove_leftovers, write_atomically, writing
from dmax.recipe.logs import TENSORBOARD
from dmax.training.parallel import SCHEDULER
from dmax.training.ranks import rank
from dmax.training.sharding import SHARDS, are_whole

RECORD = "run.json"
WEIGHTS = "model.weights"  # the setting that tells what a run starts from, where it is known
NOT_ALWAYS = {  # settings that count only where both sides have them
    WEIGHTS,  # earlier releases did not write it; and a finished run outlives its start
    "training.do_eval",  # earlier releases wrote it, and evaluations leave the weights alone
}
TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"  # as Trainer calls it; sharded, the states stand with the weights
RNG_STATES = "rng_state*.pth"  # of one process, or one file of each
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of a model in several files
ANEW = "start over with --fresh, or choose another `output_dir`"
MOVE = "move it away, or choose another `output_dir`"


class RunFolder(TrainerCallback):
    """What an interrupted run goes on from, if its settings are the same; counts its seconds.

    The folder is ours if it holds our record. Nothing in another one is changed.

    Args:
        path: the folder; nothing is written before `begin`.
        settings: all that the weights depend on, as JSON has it.
        fresh: forget an earlier run here, whatever its settings.

    Attributes:
        seconds: of training up to the last checkpoint, those of all parts of an interrupted run.
        is_finished: the run has written its result.
        last_checkpoint: what training goes on from, once `find_checkpoint` has looked for it.

    Raises:
        InputError: the folder holds a run of other settings, or something that is not ours.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings, default=str))
        self._fresh = fresh
        self.seconds = 0.0
        self.is_finished = False
        self.last_checkpoint: Path | None = None
        self._unfinished: list[Path] = []  # checkpoints that were not written to their end
        self._since = 0.0
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is not a folder", hint=MOVE)
        record = self._read()
        self._is_ours = record is not None
        if record is None and self.checkpoints():
            raise InputError(
                f"{path} holds checkpoints and no record of what trained them", hint=MOVE
            )
        if fresh or record is None or not (record["is_finished"] or self.checkpoints()):
            return  # there is nothing to go on from
        others = sorted(
            name
            for name, old, new in changes(record["settings"], self._settings)
            if name not in NOT_ALWAYS or None not in (old, new)
        )
        if others:
            names = ", ".join(f"`{name}`" for name in others)
            raise InputError(f"{path} holds a run of a recipe that differs in {names}", hint=ANEW)
        self.seconds = record["seconds"]
        self.is_finished = record["is_finished"]

    def find_checkpoint(self, report: Callable[[str], None]) -> None:
        """Look for the newest checkpoint to go on from; says which ones are passed over.

        Raises:
            InputError: a checkpoint is of no use and there is none before it. Starting over would
                write in its place, and that is for the user to decide.
        """
        folders = [] if self._fresh else self.checkpoints()
        flaws: list[str] = []
        is_lost = False
        for folder in reversed(folders):
            if not (folder / TRAINER_STATE).exists():  # Trainer writes it last
                self._unfinished.append(folder)
                flaws.append(f"{folder.name} was not written to its end")
                continue
            flaw = flaw_of(folder)
            if flaw is None:
                self.last_checkpoint = folder
                break
            flaws.append(f"{folder.name} {flaw}")
            is_lost = True
        if is_lost and self.last_checkpoint is None:
            raise InputError(
                f"in {self.path}, {'; '.join(flaws)}; there is no checkpoint before it", hint=ANEW
            )
        last = self.last_checkpoint
        for flaw in flaws:
            report(f"{flaw}: {'starting over' if last is None else f'going on from {last.name}'}")

    def begin(self) -> None:
        """Write the settings down and start the clock.

        What is of no use any more goes first: of an earlier run if it is to be forgotten, else what
        was being written when it was killed.
        """
        if rank() == 0:  # another could remove what this one is writing
            self._remove_what_is_over()
        if self.last_checkpoint is None:
            self.seconds = 0.0
        self.is_finished = False
        self._write()
        self._since = time.perf_counter()

    def _remove_what_is_over(self) -> None:
        if self._fresh and self._is_ours:
            self._empty()
        with writing(self.path):
            for folder in self._unfinished:
                shutil.rmtree(folder)
        remove_leftovers(self.path / RECORD)

    def is_trained(self) -> bool:
        """Whether the last checkpoint is of the last step, so that only the result is missing."""
        if self.last_checkpoint is None:
            return False
        return _is_last(self.last_checkpoint)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Called by Trainer after each checkpoint."""
        self.stop_clock()
        self._write()

    def stop_clock(self) -> None:
        """Add the time since it was last stopped."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def finish(self) -> None:
        """Write down that the result is written."""
        self.is_finished = True
        self._write()

    def checkpoints(self) -> list[Path]:
        """The folders that Trainer has written, by their step."""
        if not self.path.is_dir():
            return []
        names = re.compile(r"checkpoint-(\d+)")
        numbered = {
            int(found[1]): entry
            for entry in self.path.iterdir()
            if (found := names.fullmatch(entry.name)) and entry.is_dir()
        }
        return [numbered[step] for step in sorted(numbered)]

    def _empty(self) -> None:
        """Remove what runs of ours write, and nothing else."""
        with writing(self.path):
            for folder in self.checkpoints():
                shutil.rmtree(folder)
            shutil.rmtree(self.path / TENSORBOARD, ignore_errors=True)
            (self.path / RECORD).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        """Our record, or None where there is none."""
        file = self.path / RECORD
        try:
            record = json.loads(file.read_bytes())
            seconds = float(record["seconds"])
            if not math.isfinite(seconds):
                raise ValueError("no number of seconds")
            return {
                "settings": dict(record["settings"]),
                "seconds": seconds,
                "is_finished": bool(record["is_finished"]),
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise InputError(f"{file} is not the record of a training run", hint=MOVE) from None

    def _write(self) -> None:
        if rank() != 0:  # which writes for all
            return
        record = {
            "settings": self._settings,
            "seconds": self.seconds,
            "is_finished": self.is_finished,
        }
        write_atomically(self.path / RECORD, json.dumps(record, indent=1) + "\n")


def flaw_of(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint; None if it can."""
    torn = torn_file(folder)
    if torn is not None:
        return f"is damaged, {torn} cannot be read"
    if not _is_state(folder / TRAINER_STATE):
        return f"is of no use, {TRAINER_STATE} holds no state of a training"
    weights = _missing_weights(folder)
    if weights is not None:
        return f"is not whole, {weights} is missing"
    if _is_last(folder):  # only the result is left to write
        return None
    # Trainer would go on without a word, with a new optimiser and a new warm-up.
    names = [SCHEDULER, RNG_STATES]
    if not (folder / SHARDS).exists():
        names.append(OPTIMIZER)
    missing = [name for name in names if not any(folder.glob(name))]
    if missing == names:
        return "holds weights and no optimiser, as `save_only_model` has it"
    return f"is not whole, {missing[0].replace('*', '')} is missing" if missing else None


def _is_state(file: Path) -> bool:
    """Whether a file holds what Trainer goes on from."""
    try:
        state = TrainerState.load_from_json(str(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    steps = (state.global_step, state.max_steps)
    is_counted = all(type(step) is int and step > 0 for step in steps)
    history = state.log_history
    return is_counted and isinstance(history, list) and all(isinstance(x, dict) for x in history)


def _missing_weights(folder: Path) -> str | None:
    """Name of a file of weights that is not there; None if the model or its adapters are whole."""
    if any((folder / name).exists() for name in (SHARDS, MODEL, ADAPTERS)):
        return None
    if not (folder / INDEX).exists():
        return MODEL
    named = json.loads((folder / INDEX).read_bytes()).get("weight_map")
    if not isinstance(named, dict):
        return MODEL
    files = sorted(map(str, named.values()))
    return next((name for name in files if not os.path.exists(folder / name)), None)


def _is_last(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the last step of its run."""
    state = json.loads((checkpoint / TRAINER_STATE).read_bytes())
    return bool(state["global_step"] >= state["max_steps"])


def torn_file(folder: Path) -> str | None:
    """Name of the first file of a checkpoint that was cut off or damaged; None if all are whole."""
    for file in sorted(folder.iterdir()):
        if not _is_whole(file):
            return file.name
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file can be read; weights and optimiser states are not read for it."""
    if file.name == SHARDS:
        return are_whole(file)
    try:
        match file.suffix:
            case ".json":
                return isinstance(json.loads(file.read_bytes()), dict)
            case ".safetensors":
                with safe_open(file, "pt"):  # compares the size with what the header says
                    return True
            case ".pt" | ".pth" | ".bin":
                return zipfile.is_zipfile(file)  # torch writes archives, whose index comes last
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return True
