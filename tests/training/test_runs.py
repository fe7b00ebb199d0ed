"""Runs of `dmax train`: a second start, torn files, full disks, and errors before any compute."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_trainer import CONFIG, write_recipe
from transformers import TrainerCallback

from dmax import extras
from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError
from dmax.evaluation.curves import draw_history
from dmax.recipe import build
from dmax.recipe import run as runs
from dmax.recipe.folder import RunFolder
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")

TWO_STEPS = {"max_steps": 2, "save_steps": 1}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(path: Path, **options: Any) -> list[str]:
    """What a run reports."""
    told: list[str] = []
    run_recipe(load_recipe(path), report=told.append, **options)
    return told


@pytest.fixture
def no_compute(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, neither a model nor data is made."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("computing began")

    def forbid() -> None:
        for name in ("load_checkpoint", "new_checkpoint", "load_conversations", "problems"):
            monkeypatch.setattr(build, name, forbidden)

    return forbid


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Run a recipe that dies before a step of its own is over."""
    compute_loss = DMaxTrainer.compute_loss

    def dies(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            run(path)


# --- a second start -------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, no_compute: Callable[[], None]) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS)
    run(path)
    before = files(tmp_path / "out")
    state = (tmp_path / "out-run" / "run.json").read_bytes()
    no_compute()
    assert run(path) == [f"already finished: {tmp_path / 'out'}"]
    assert files(tmp_path / "out") == before
    assert (tmp_path / "out-run" / "run.json").read_bytes() == state


def test_a_run_killed_before_its_result_only_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(write_recipe(whole, training=TWO_STEPS))
    path = write_recipe(broken, training=TWO_STEPS)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    monkeypatch.setattr(DMaxTrainer, "train", dies)
    run(path)
    assert files(broken / "out")["model.safetensors"] == files(whole / "out")["model.safetensors"]
    assert json.loads((broken / "out" / "dmax.json").read_text())["steps"] == 2


def test_seconds_are_those_of_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS)
    state = tmp_path / "out-run" / "run.json"
    killed_at(1, monkeypatch, path)
    record = json.loads(state.read_text())
    assert record["seconds"] > 0 and not record["is_finished"]
    state.write_text(json.dumps(record | {"seconds": 5000.0}))
    run(path)
    assert json.loads((tmp_path / "out" / "dmax.json").read_text())["seconds"] >= 5000
    run(path, resume=False)
    assert json.loads((tmp_path / "out" / "dmax.json").read_text())["seconds"] < 5000


def test_a_checkpoint_cut_off_in_writing_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(write_recipe(whole, training=TWO_STEPS))
    path = write_recipe(broken, training=TWO_STEPS)
    killed_at(1, monkeypatch, path)
    (broken / "out-run" / "checkpoint-2").mkdir()
    run(path)
    assert files(broken / "out")["model.safetensors"] == files(whole / "out")["model.safetensors"]


def test_an_edited_recipe_does_not_go_on_with_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compute: Callable[[], None]
) -> None:
    killed_at(1, monkeypatch, write_recipe(tmp_path, training=TWO_STEPS))
    no_compute()
    wider = {"config": {**CONFIG, "hidden_size": 32}}
    for change, names in (
        ({"training": {**TWO_STEPS, "max_steps": 3}}, "`training.max_steps`"),
        (
            {"training": {**TWO_STEPS, "seed": 4, "rollout": "soft"}},
            "`training.rollout`, `training.seed`",
        ),
        (
            {"training": TWO_STEPS, "model": wider},
            "`model.config.hidden_size`, `model.experts_implementation`",
        ),
        ({"training": TWO_STEPS, "data": {"problems": 16, "seed": 2}}, "`data.seed`"),
    ):
        edited = write_recipe(tmp_path, **change)
        with pytest.raises(InputError) as error:
            run(edited)
        where = f"{edited}:1: in `output_dir`, {tmp_path / 'out-run'}"
        assert error.value.message == f"{where} holds a run of a recipe that differs in {names}"
        assert "--fresh" in str(error.value.hint)


def test_other_data_under_the_same_name_is_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Tom has 3 apples.", "response": "So 3."}\n' * 4)
    path = write_recipe(tmp_path, training=TWO_STEPS, data={"file": str(data)})
    killed_at(1, monkeypatch, path)
    data.write_text('{"prompt": "Tom has 4 apples.", "response": "So 4."}\n' * 4)
    with pytest.raises(InputError, match=r"differs in `data\.sha256`"):
        run(path)


def from_a_local_base(folder: Path) -> tuple[Path, Path]:
    """A recipe that starts from a folder, and the file of the weights there."""
    if not (folder / "base").exists():
        made = run_recipe(load_recipe(write_recipe(folder, training={"max_steps": 1})))
        made.rename(folder / "base")
        shutil.rmtree(folder / "out-run")
    path = write_recipe(folder, training=TWO_STEPS, model={"path": str(folder / "base")})
    return path, folder / "base" / "model.safetensors"


def change(weights: Path) -> None:
    """Turn over the last byte of a file, whose size and time stay."""
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("is_finished", [False, True])
def test_another_model_under_the_same_name_is_another_recipe(
    tmp_path: Path,
    is_finished: bool,
    monkeypatch: pytest.MonkeyPatch,
    no_compute: Callable[[], None],
) -> None:
    path, weights = from_a_local_base(tmp_path)
    if is_finished:
        run(path)
    else:
        killed_at(1, monkeypatch, path)
    os.utime(weights)  # written anew, and the same
    change(weights)
    change(weights)
    no_compute()
    if is_finished:
        assert run(path) == [f"already finished: {tmp_path / 'out'}"]
    change(weights)
    with pytest.raises(InputError, match=r"a recipe that differs in `model\.weights`"):
        run(path)
    if is_finished:
        shutil.rmtree(weights.parent)  # what is finished needs it no more
        assert run(path) == [f"already finished: {tmp_path / 'out'}"]


def test_a_run_of_an_earlier_release_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = from_a_local_base(tmp_path)
    killed_at(1, monkeypatch, path)
    file = tmp_path / "out-run" / "run.json"
    record = json.loads(file.read_text())
    digest = record["settings"]["model"].pop("weights")
    file.write_text(json.dumps(record))
    run(path)
    assert json.loads(file.read_text())["settings"]["model"]["weights"] == digest


def test_weights_are_told_apart_by_pieces_of_their_files(tmp_path: Path) -> None:
    file = tmp_path / "model-00001-of-00002.safetensors"
    assert runs.start_digest(str(tmp_path)) is None
    assert runs.start_digest(None) is None
    assert runs.start_digest("some/hub-id" * 1000) is None
    assert runs.start_digest("tiny-base") not in (None, runs.start_digest("tiny-dmax"))
    seen = set()
    for size in (3, 4, 40 * 2**20):
        file.write_bytes(b"\0" * size)
        seen.add(runs.start_digest(str(tmp_path)))
        change(file)
        seen.add(runs.start_digest(str(tmp_path)))
    file.rename(file.with_name("other.safetensors"))
    seen.add(runs.start_digest(str(tmp_path)))
    assert len(seen) == 7


def test_what_leaves_the_weights_alone_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(1, monkeypatch, write_recipe(tmp_path, training=TWO_STEPS))
    path = write_recipe(
        tmp_path,
        training=TWO_STEPS | {"logging_steps": 2, "save_steps": 2, "lr_scheduler_type": "cosine"},
    )
    run(path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_fresh_starts_over_and_removes_only_what_is_ours(tmp_path: Path) -> None:
    run(write_recipe(tmp_path, training=TWO_STEPS))
    notes = tmp_path / "out-run" / "notes.txt"
    notes.write_text("mine")
    edited = write_recipe(tmp_path, training={"max_steps": 1})
    with pytest.raises(InputError, match=r"`training\.max_steps`"):
        run(edited)
    run(edited, resume=False)
    assert sorted(entry.name for entry in notes.parent.iterdir()) == [
        "checkpoint-1",
        "notes.txt",
        "run.json",
    ]
    assert json.loads((tmp_path / "out" / "dmax.json").read_text())["steps"] == 1


@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_of_something_else_is_never_replaced(tmp_path: Path, resume: bool) -> None:
    path = write_recipe(tmp_path, training={"max_steps": 1})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="exists and was not written by dmax"):
        run(path, resume=resume)
    assert files(tmp_path / "out") == {"config.json": b"{}"}


def test_a_checkpoint_of_another_run_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"max_steps": 1})
    run(path)
    before = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-run")
    with pytest.raises(InputError, match="holds a checkpoint that is not of this run"):
        run(path)
    assert files(tmp_path / "out") == before
    run(path, resume=False)
    assert files(tmp_path / "out").keys() == before.keys()


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, content: str | None, resume: bool
) -> None:
    weights = tmp_path / "out-run" / "checkpoint-1" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("mine")
    if content is not None:
        (tmp_path / "out-run" / "run.json").write_text(content)
    with pytest.raises(
        InputError, match="not the record of a training run|no record of what trained them"
    ):
        run(write_recipe(tmp_path), resume=resume)
    assert weights.read_text() == "mine"


# --- files that were cut off --------------------------------------------------


TORN = (
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.safetensors",
    "config.json",
)


def tear(file: Path) -> None:
    """Cut a file off, as a lost power supply does."""
    data = file.read_bytes()
    assert data
    file.write_bytes(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("name", TORN)
def test_a_torn_checkpoint_falls_back_to_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    training = {"max_steps": 3, "save_steps": 1}
    run(write_recipe(whole, training=training))
    path = write_recipe(broken, training=training)
    killed_at(2, monkeypatch, path)
    tear(broken / "out-run" / "checkpoint-2" / name)
    told = run(path)
    assert told[0] == (
        f"checkpoint-2 is damaged, {name} cannot be read: going on from checkpoint-1"
    )
    assert files(broken / "out")["model.safetensors"] == files(whole / "out")["model.safetensors"]


@pytest.mark.parametrize("name", TORN)
def test_a_torn_checkpoint_without_one_before_it_is_left_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, no_compute: Callable[[], None]
) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS)
    killed_at(1, monkeypatch, path)
    checkpoint = tmp_path / "out-run" / "checkpoint-1"
    tear(checkpoint / name)
    before = files(checkpoint)
    no_compute()
    with pytest.raises(InputError) as error:
        run(path)
    assert f"checkpoint-1 is damaged, {name} cannot be read; there is no" in error.value.message
    assert "--fresh" in str(error.value.hint)
    assert files(checkpoint) == before


def test_a_checkpoint_that_was_never_finished_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS)
    killed_at(1, monkeypatch, path)
    (tmp_path / "out-run" / "checkpoint-1" / "trainer_state.json").unlink()
    assert run(path)[0] == "checkpoint-1 was not written to its end: starting over"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_weights_alone_are_nothing_to_go_on_from_but_enough_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS | {"save_only_model": True})
    killed_at(1, monkeypatch, path)
    with pytest.raises(InputError, match="checkpoint-1 holds weights and no optimiser") as error:
        run(path)
    assert "--fresh" in str(error.value.hint)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            run(path, resume=False)
    monkeypatch.setattr(DMaxTrainer, "train", dies)
    run(path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_was_being_written_when_a_run_was_killed_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS)
    killed_at(1, monkeypatch, path)
    (tmp_path / "out-run" / "checkpoint-7").mkdir()  # the next run need not save at this step
    (tmp_path / "out-run" / ".run.json.0123abcd.partial").touch()
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.0123abcd.partial" / "model.safetensors").touch()
    others = (".out-2.0123abcd.partial", ".out.mine.partial", "out.0123abcd.partial")
    for name in others:
        (tmp_path / name).touch()
    run(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "out-run", path.name, *others}
    assert {entry.name for entry in (tmp_path / "out-run").iterdir()} == {
        "checkpoint-1",
        "checkpoint-2",
        "run.json",
    }


@pytest.mark.parametrize("limit", [2_000, 40_000])  # of the weights, of the optimiser
def test_a_full_disk_ends_the_run_in_one_sentence_and_the_next_goes_on(
    tmp_path: Path,
    limit: int,
    limit_files: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(write_recipe(whole, training=TWO_STEPS))
    path = write_recipe(broken, training=TWO_STEPS)

    class FullAtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                limit_files(limit)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "DMaxTrainer", partial(with_callback, FullAtTwo()))
        with pytest.raises(InputError, match=r"cannot write a checkpoint to .*out-run: ") as error:
            run(path)
    limit_files(-1)
    first = broken / "out-run" / "checkpoint-1"
    assert "\n" not in error.value.message
    before = files(first)
    assert run(path)[0] == "checkpoint-2 was not written to its end: going on from checkpoint-1"
    assert files(first) == before
    assert files(broken / "out")["model.safetensors"] == files(whole / "out")["model.safetensors"]


def with_callback(callback: TrainerCallback, *args: Any, **kwargs: Any) -> DMaxTrainer:
    trainer = DMaxTrainer(*args, **kwargs)
    trainer.add_callback(callback)
    return trainer


# --- what is saved ------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "decoding"),
    [
        ("mdlm", "threshold"),
        ("uniform", "spd"),
        ("oput", "spd"),
        ("d2f", "d2f"),
        ("dparallel", "dparallel"),
        ("mbd_oput", "mbd"),
        ("mmd", "spd"),
    ],
)
def test_a_trained_model_names_the_decoding_that_its_objective_is_for(
    tmp_path: Path, objective: str, decoding: str
) -> None:
    ratios = {"mask_ratio_low": 0.2, "mask_ratio_high": 0.8}
    path = write_recipe(tmp_path, training={"max_steps": 1, "objective": objective, **ratios})
    run(path)
    for folder in (tmp_path / "out", tmp_path / "out-run" / "checkpoint-1"):
        found = load_checkpoint(folder, dtype=torch.float32, device="cpu")
        assert found.decoding == decoding


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_weights_at_the_start_are_kept_only_if_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    run(write_recipe(tmp_path, training={"max_steps": 1}))
    start = tmp_path / "start"
    (tmp_path / "out").rename(start)
    shutil.rmtree(tmp_path / "out-run")
    kept: list[int] = []
    monkeypatch.setattr(runs, "blend_weights", lambda model, other, share: kept.append(len(other)))
    model = {"path": str(start), "keep_start": share}
    run(write_recipe(tmp_path, training={"max_steps": 1}, model=model))
    assert (kept[0] > 0) == (share > 0)


def test_a_resumed_run_draws_its_whole_history_and_its_result_stays_replaceable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[tuple[list[int], str]] = []

    def draw(history: list[dict[str, float]], path: Path, title: str) -> None:
        drawn.append(([int(line["step"]) for line in history if "loss" in line], title))
        draw_history(history, path, title)

    monkeypatch.setattr(runs, "draw_history", draw)
    path = write_recipe(tmp_path, training={"max_steps": 3, "save_steps": 1})
    killed_at(2, monkeypatch, path)
    run(path)
    assert drawn == [([1, 2, 3], "out: 3 steps of oput")]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    run(path, resume=False)  # replaces the result, picture included


def test_a_run_killed_before_its_result_draws_what_it_had_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    path = write_recipe(tmp_path, training=TWO_STEPS)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "draw_history", dies)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert not (tmp_path / "out" / "curves.png").exists()
    told = run(path)
    assert not [line for line in told if "curves.png" in line]
    assert (tmp_path / "out" / "curves.png").is_file()


def test_without_matplotlib_a_line_says_so_and_the_model_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = extras.find_spec
    monkeypatch.setattr(
        extras, "find_spec", lambda module: None if module == "matplotlib" else found(module)
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = run(write_recipe(tmp_path, training={"max_steps": 1}))
    assert told[-1].startswith("no curves.png: drawing a picture of the run needs the package `mat")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- before any compute ---------------------------------------------------------------------------


def test_an_output_dir_that_holds_something_else(
    tmp_path: Path, no_compute: Callable[[], None]
) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    no_compute()
    with pytest.raises(
        InputError, match=r"recipe.yaml:1: in `output_dir`, .* exists and was not written by dmax"
    ):
        run(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.parametrize("head", [False, True])
def test_an_output_dir_that_cannot_be_written(
    tmp_path: Path, head: bool, no_compute: Callable[[], None]
) -> None:
    (tmp_path / "file").touch()
    path = write_recipe(tmp_path, output_dir=str(tmp_path / "file" / "out"))
    if head:
        recipe = yaml.safe_load(path.read_text()) | {
            "head": {"kind": "learn2pd"},
            "model": {"path": "tiny-base"},
        }
        del recipe["training"]
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    no_compute()
    with pytest.raises(InputError, match=r"recipe.yaml:1: in `output_dir`, cannot write"):
        run(path)


@pytest.mark.parametrize("name", ["", ".", "..", "/", 3, None])
def test_an_output_dir_without_a_name(tmp_path: Path, name: Any) -> None:
    with pytest.raises(
        InputError, match=r"recipe.yaml:1: `output_dir` must be the path of a folder, got "
    ):
        load_recipe(write_recipe(tmp_path, output_dir=name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"eval": {"decoding": {"strategy": "spdd"}}},
            r":\d+: in `eval\.decoding`, unknown strategy 'spdd'",
        ),
        (
            {"eval": {"decoding": {"options": {"alpa": 1}}}},
            r":\d+: in `eval\.decoding`, strategy `spd` has no option",
        ),
        (
            {
                "training": {"objective": "mdlm"},
                "eval": {"decoding": {"strategy": "auto", "options": {"alpa": 1}}},
            },
            r":\d+: in `eval\.decoding`, strategy `threshold` has no option",
        ),
        (
            {"eval": {"decoding": {"threshold": 2}}},
            r":\d+: in `eval\.decoding`, `threshold` must be",
        ),
        (
            {"eval": {"limit": 0}},
            r":\d+: in `eval\.limit`, `limit` must be a whole number between 1 and .*, got 0",
        ),
        (
            {"training": {"eval_strategy": "steps"}, "eval": {"task": "sums"}},
            r":\d+: in `eval\.task`, unknown task 'sums'",
        ),
        (
            {"data": {"problems": 0}},
            r":\d+: in `data\.problems`, `problems` must be .* between 1 and .*, got 0",
        ),
        (
            {"data": {"problems": 4, "max_length": -1}},
            r":\d+: in `data\.max_length`, `max_length` must be .*, got -1",
        ),
        ({"training": {"objective": "opud"}}, r":\d+: in `training`, `objective` must be one of"),
        (
            {"model": {"config": {**CONFIG, "hidden_size": "x"}}},
            r":\d+: .*`hidden_size` must be int, got 'x'",
        ),
        (
            {"model": {"config": {**CONFIG, "num_experts": 0}}},
            r":\d+: `model\.config` is not usable: .*num_experts",
        ),
        (
            {"model": {"config": {"model_type": "llama", "hidden_size": "x"}}},
            r":5: .*hidden_size.*expected int",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line_before_any_compute(
    tmp_path: Path, change: dict[str, Any], message: str, no_compute: Callable[[], None]
) -> None:
    path = write_recipe(tmp_path, **change)
    no_compute()
    with pytest.raises(InputError, match=f"^{path}{message}"):
        run(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output_dir: a\nmodel: {}\nmodel: {}\n", "3: the key `model` stands in line 2 already"),
        (b"model:\n  path: a\n  path: b\n", "3: the key `model.path` stands in line 2 already"),
        (b"output_dir: a\nmodel:\n  path: caf\xe9\n", "3: not UTF-8 text"),
        (b"output_dir: a\n\nmodel: [\n", "4: not valid YAML"),
        (b"output_dir: a\nmodel: \x01\n", "2: not valid YAML"),
        (b"model: &a\n  path: *a\n", "2: nested more than 20 deep"),
        (b"output_dir: 2026-13-45\n", "1: "),
        (b"- a\n", "1: a recipe is a mapping"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}:({message})") as error:
        load_recipe(path)
    assert "\n" not in error.value.message


def test_only_the_first_rank_removes_what_killed_runs_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would remove what the first is writing at that moment."""
    partial = tmp_path / "out-run" / ".run.json.0123abcd.partial"
    partial.parent.mkdir()
    for number, is_left in ((1, True), (0, False)):
        partial.touch()
        monkeypatch.setattr("dmax.recipe.folder.rank", lambda number=number: number)
        RunFolder(partial.parent, {}).begin()
        assert partial.exists() is is_left
    assert (partial.parent / "run.json").is_file()
