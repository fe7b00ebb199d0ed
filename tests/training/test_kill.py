"""SIGKILL at twenty random moments of a run: each resumed run ends as the whole one did."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed import Moment, count_calls, train, train_and_kill
from test_trainer import write_recipe

pytest.importorskip("accelerate")

KILLS = 20
TIMES = {"tokens_per_second"}


def recipe(folder: Path) -> Path:
    """Six steps with a checkpoint after every second one, two of which are kept."""
    folder.mkdir()
    training = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2}
    training |= {"eval_strategy": "steps", "eval_steps": 3}
    return write_recipe(
        folder, training=training, eval={"limit": 1, "decoding": {"max_new_tokens": 8}}
    )


def outcome(folder: Path) -> tuple[str, list[dict[str, float]]]:
    """Digest of the weights, and every line of the log but for its times."""
    weights = (folder / "out" / "model.safetensors").read_bytes()
    state = json.loads((folder / "out-run" / "checkpoint-6" / "trainer_state.json").read_bytes())
    lines = [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in state["log_history"]
    ]
    return hashlib.sha256(weights).hexdigest(), lines


def names(folder: Path) -> set[str]:
    """All files and folders, by their paths."""
    return {str(entry.relative_to(folder)) for entry in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = recipe(tmp_path / "whole")
    calls = count_calls(whole, in_saving=False)
    expected = outcome(whole.parent)
    assert len(expected[1]) == 6 + 2
    written = count_calls(recipe(tmp_path / "saving"), in_saving=True)
    assert outcome(tmp_path / "saving") == expected

    draw = random.Random(13)
    moments = [*spread(calls, draw, in_saving=False), *spread(written, draw, in_saving=True)]
    assert len(moments) == KILLS
    unfinished: set[str] = set()
    for number, moment in enumerate(moments):
        path = recipe(tmp_path / str(number))
        train_and_kill(path, moment)
        unfinished |= being_written(path.parent)
        train(path)
        assert outcome(path.parent) == expected, moment
        assert names(path.parent) == names(whole.parent), moment
    assert unfinished >= {"checkpoint-2", "checkpoint-4", "checkpoint-6", "out"}


def spread(calls: int, draw: random.Random, *, in_saving: bool) -> Iterator[Moment]:
    """Half of the kills: a random moment in each of so many equal parts of a run."""
    part = calls // (KILLS // 2)
    for number in range(KILLS // 2):
        yield Moment(number * part + draw.randrange(1, part), in_saving)


def being_written(folder: Path) -> set[str]:
    """What is there in part only: checkpoints without their last file, and the result."""
    checkpoints = (folder / "out-run").glob("checkpoint-*")
    torn = {each.name for each in checkpoints if not (each / "trainer_state.json").exists()}
    return torn | {each.name.split(".")[1] for each in folder.glob(".*.partial")}
