"""The folder of a training run, `<output_dir>-run`: Trainer's checkpoints, and what they were trained by."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dmax.errors import InputError
from dmax.files import write_atomically

STATE = "run.json"
TRAINER_STATE = "trainer_state.json"
ANEW = "start over with --fresh, or choose another `output_dir`"


class RunFolder(TrainerCallback):
    """What an interrupted run goes on from, if its settings are the same; counts the seconds that it takes.

    Args:
        path: the folder; nothing is written before `begin`.
        settings: all that the weights depend on, as JSON has it.
        fresh: forget an earlier run here, whatever its settings.

    Attributes:
        seconds: of training up to the last checkpoint, those of all parts of an interrupted run.
        is_finished: the run has written its result.

    Raises:
        InputError: the folder holds a run of other settings, or one that does not say which.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings, default=str))
        self._fresh = fresh
        self.seconds = 0.0
        self.is_finished = False
        self._since = 0.0
        if path.exists() and not path.is_dir():
            raise InputError(
                f"{path} is not a folder", hint="move it away, or choose another `output_dir`"
            )
        if fresh:
            return
        held = self._read()
        if held is None and self._checkpoints():
            raise InputError(
                f"{path} holds checkpoints and no record of what trained them", hint=ANEW
            )
        if held is None or not (held["is_finished"] or self._checkpoints()):
            return  # nothing was trained yet
        if others := sorted(differing(held["settings"], self._settings)):
            names = ", ".join(f"`{name}`" for name in others)
            raise InputError(f"{path} holds a run of a recipe that differs in {names}", hint=ANEW)
        self.seconds = held["seconds"]
        self.is_finished = held["is_finished"]

    def begin(self) -> None:
        """Write the settings down and start the clock; with `fresh`, what an earlier run left goes first."""
        if self._fresh:
            self._empty()
        if self.last_checkpoint() is None:
            self.seconds = 0.0
        self.is_finished = False
        self._write()
        self._since = time.perf_counter()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = [folder for folder in self._checkpoints() if (folder / TRAINER_STATE).is_file()]
        return whole[-1] if whole else None

    def is_trained(self) -> bool:
        """Whether the last checkpoint is that of the last step, so that only the result has to be written."""
        last = self.last_checkpoint()
        if last is None:
            return False
        state = json.loads((last / TRAINER_STATE).read_text(encoding="utf-8"))
        return bool(state["global_step"] >= state["max_steps"])

    def on_save(self, *_: Any, **__: Any) -> None:
        """Called by Trainer behind each checkpoint."""
        self.stop_clock()
        self._write()

    def stop_clock(self) -> None:
        """Add the time since it was last stopped."""
        now = time.perf_counter()
        self.seconds = self.seconds + now - self._since
        self._since = now

    def finish(self) -> None:
        """Write down that the result is written."""
        self.is_finished = True
        self._write()

    def _checkpoints(self) -> list[Path]:
        """Trainer's folders, by their step."""
        entries = self.path.iterdir() if self.path.is_dir() else ()
        numbered = {
            int(entry.name[11:]): entry
            for entry in entries
            if re.fullmatch(r"checkpoint-\d+", entry.name)
        }
        return [numbered[step] for step in sorted(numbered) if numbered[step].is_dir()]

    def _empty(self) -> None:
        """Remove what runs of ours write, and nothing else."""
        try:
            for folder in self._checkpoints():
                shutil.rmtree(folder)
            (self.path / STATE).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot empty {self.path}: {error.strerror}", hint="choose another `output_dir`"
            ) from None

    def _read(self) -> dict[str, Any] | None:
        file = self.path / STATE
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            seconds = float(held["seconds"])
            is_finished = bool(held["is_finished"])
            return {
                "settings": dict(held["settings"]),
                "seconds": seconds,
                "is_finished": is_finished,
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{file} is not the record of a training run", hint=ANEW) from None

    def _write(self) -> None:
        record = {
            "settings": self._settings,
            "seconds": self.seconds,
            "is_finished": self.is_finished,
        }
        write_atomically(self.path / STATE, json.dumps(record, indent=1) + "\n")


def differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that are not the same in both; one that is missing counts as None."""
    for name in old.keys() | new.keys():
        before = old.get(name)
        now = new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differing(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}"
