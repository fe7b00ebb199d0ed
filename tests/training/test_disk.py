"""Room on the disk: a run that cannot end is refused before it begins, whatever fills the disk."""

from __future__ import annotations

import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_runs import files, run, with_callback
from test_trainer import CONFIG, write_recipe
from torch import nn
from transformers import TrainerCallback

from dmax.errors import InputError
from dmax.recipe import disk
from dmax.recipe import run as runs
from dmax.recipe.disk import Room, check_room, in_words, num_checkpoints, num_steps, room
from dmax.training.config import DMaxConfig

pytest.importorskip("accelerate")

WIDE = {"config": {**CONFIG, "hidden_size": 64, "moe_intermediate_size": 256}}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 10}
Usage = namedtuple("Usage", "total used free")


def arguments(folder: Path, **changes: Any) -> DMaxConfig:
    return DMaxConfig(output_dir=str(folder), report_to="none", use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("changes", "steps", "written"),
    [
        ({"save_strategy": "no"}, 100, 0),
        ({"save_steps": 30}, 100, 4),  # the last step has one too
        ({"save_steps": 500}, 100, 1),
        ({"save_steps": 0.25}, 100, 4),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 100, 3),
        (EVALUATED | {"save_strategy": "best", "metric_for_best_model": "accuracy"}, 100, 10),
    ],
)
def test_checkpoints_are_counted_as_trainer_writes_them(
    tmp_path: Path, changes: dict[str, Any], steps: int, written: int
) -> None:
    assert num_checkpoints(arguments(tmp_path, **changes), steps) == written


def test_steps_are_those_of_all_epochs_unless_they_are_given(tmp_path: Path) -> None:
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    epochs = arguments(tmp_path, num_train_epochs=2.5, **batches)
    assert num_steps(epochs, 17, 1) == 8  # 9 batches in 3 steps an epoch
    assert num_steps(epochs, 17, 2) == 5
    assert num_steps(epochs, None, 1) is None
    dropping = arguments(tmp_path, num_train_epochs=2.5, dataloader_drop_last=True, **batches)
    assert num_steps(dropping, 17, 1) == 5
    assert num_steps(dropping, 1, 1) == 3
    assert num_steps(arguments(tmp_path, max_steps=5), None, 1) == 5


@pytest.mark.parametrize(
    ("changes", "checkpoint", "number"),
    [
        ({}, 12 + 24, 10),  # weights of 4 bytes, and AdamW's two values of each that is trained
        ({"save_total_limit": 2}, 12 + 24, 3),  # and the one that is being written
        ({"save_total_limit": 20}, 12 + 24, 10),
        ({"save_only_model": True}, 12, 10),
        ({"optim": "sgd"}, 12, 10),
    ],
)
def test_room_is_weights_and_optimiser_of_every_checkpoint_and_the_result(
    tmp_path: Path, changes: dict[str, Any], checkpoint: int, number: int
) -> None:
    args = arguments(tmp_path, save_steps=10, **changes)
    assert room(nn.Linear(2, 1), args, 100) == Room(checkpoint, number, 12)


def test_a_frozen_weight_has_no_optimiser_state_and_an_adapter_goes_without_its_base(
    tmp_path: Path,
) -> None:
    model = nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    args = arguments(tmp_path, save_steps=10, save_total_limit=1)
    assert room(model, args, 100) == Room(12 + 8, 2, 12)
    model.peft_config = {}
    model.get_base_model = lambda: model
    assert room(model, args, 100) == Room(4 + 8, 2, 4)
    assert room(model, args, 100, merges=True) == Room(4 + 8, 2, 12)


def test_numbers_of_bytes_are_said_with_their_unit() -> None:
    said = {4: "4 bytes", 999_499: "999 kB", 999_500: "1 MB", 195.07e9: "195 GB", 3e15: "3e+03 TB"}
    assert {number: in_words(number) for number in said} == said


def test_what_a_run_writes_is_what_was_counted(tmp_path: Path) -> None:
    training = {"max_steps": 3, "save_steps": 1}
    path = write_recipe(tmp_path, model=WIDE, training=training)
    counted: list[Room] = []

    def count(*args: Any, **options: Any) -> Room:
        counted.append(room(*args, **options))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "room", count)
        run(path)
    (needed,) = counted
    assert needed.num_checkpoints == 3
    beside = 400_000  # the tokenizer, the log, the picture
    for folder, size in (
        *((tmp_path / "out-run" / f"checkpoint-{step}", needed.checkpoint) for step in (1, 2, 3)),
        (tmp_path / "out", needed.result),
    ):
        written = sum(map(len, files(folder).values()))
        assert size <= written <= size + beside
    assert needed.result > beside


def test_too_little_room_is_said_with_both_numbers_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, training={"max_steps": 4, "save_steps": 1, "save_total_limit": 2})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(10**9, 0, 1_300_000))
    with pytest.raises(InputError) as error:
        run(path)
    assert error.value.message == (
        f"{path}:1: in `output_dir`, the run needs 1.43 MB of disk (3 checkpoints of 430 kB and a "
        f"result of 143 kB), and {tmp_path} has 1.3 MB free"
    )
    assert "`save_total_limit`" in str(error.value.hint)
    assert not [entry for entry in tmp_path.rglob("*") if entry.is_file() and entry != path]


def test_what_a_run_has_written_counts_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "out-run" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    free = shutil.disk_usage(tmp_path).free
    needed = Room(checkpoint=0, num_checkpoints=0, result=10 * free)
    with pytest.raises(InputError, match="the run needs"):
        check_room(needed, tmp_path / "out", [])
    check_room(Room(500, 1, 500), tmp_path / "out", [folder])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda _: Usage(0, 0, 0))
        check_room(Room(500, 1, 500), tmp_path / "out", [folder])
        with pytest.raises(InputError, match="the run needs 1 bytes of disk"):
            check_room(Room(500, 1, 501), tmp_path / "out", [folder])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_small_disk_is_refused_and_takes_the_run_that_keeps_less(small_disk: Path) -> None:
    training = {"max_steps": 12, "save_steps": 1}
    with pytest.raises(InputError, match="the run needs 5.3 MB of disk .* 4.19 MB free"):
        run(write_recipe(small_disk, training=training))
    run(write_recipe(small_disk, training=training | {"save_total_limit": 1}))
    assert (small_disk / "out" / "model.safetensors").is_file()


def test_a_disk_that_others_fill_ends_the_run_in_one_sentence_and_the_next_goes_on(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 3, "save_steps": 1}
    (tmp_path / "whole").mkdir()
    run(write_recipe(tmp_path / "whole", training=training))
    path = write_recipe(small_disk, training=training)
    filler = small_disk / "of somebody else"

    class Filler(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                free = shutil.disk_usage(small_disk).free
                filler.write_bytes(bytes(free - 200_000))  # room for the weights only

    with monkeypatch.context() as patch:
        patch.setattr(runs, "DMaxTrainer", partial(with_callback, Filler()))
        with pytest.raises(InputError, match=r"cannot write a checkpoint to .*out-run") as error:
            run(path)
    assert "\n" not in error.value.message
    filler.unlink()
    told = run(path)
    assert told[0].endswith("going on from checkpoint-1")
    whole, broken = tmp_path / "whole" / "out", small_disk / "out"
    assert files(whole)["model.safetensors"] == files(broken)["model.safetensors"]
