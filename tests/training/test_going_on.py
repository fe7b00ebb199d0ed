"""What a run may go on from, what --fresh may remove, and what an interrupted one says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Dmax, dmax_fixture  # noqa: F401  (a fixture)
from test_runs import TWO_STEPS, files, killed_at, run
from test_trainer import write_recipe

from dmax.errors import InputError
from dmax.recipe.folder import RunFolder, flaw_of
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")

THREE_STEPS = {"max_steps": 3, "save_steps": 1}
ENDED = "trainer_state.json"


# --- checkpoints that are not whole ---------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps that was killed in the last."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(2, patch, write_recipe(folder, training=THREE_STEPS))
    return folder / "out-run"


def found(run_dir: Path) -> tuple[str | None, list[str]]:
    """What a run goes on from, and what it says about that."""
    settings = json.loads((run_dir / "run.json").read_text())["settings"]
    said: list[str] = []
    folder = RunFolder(run_dir, settings)
    folder.find_checkpoint(said.append)
    last = folder.last_checkpoint
    return last and last.name, said


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_state(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = json.loads((folder / ENDED).read_text())
        (folder / ENDED).write_text(json.dumps(state | changes))

    return edit


def in_parts(*present: str) -> Callable[[Path], None]:
    """Names two files of weights in an index, some of which are there."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "whole")
        names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        for name in present:
            shutil.copy(folder / "whole", folder / name)

    return edit


NO_STATE = f"is of no use, {ENDED} holds no state of a training"


@pytest.mark.parametrize(
    ("spoil", "flaw"),
    [
        (without("optimizer.pt"), "is not whole, optimizer.pt is missing"),
        (without("scheduler.pt"), "is not whole, scheduler.pt is missing"),
        (without("rng_state.pth"), "is not whole, rng_state.pth is missing"),
        (without("model.safetensors"), "is not whole, model.safetensors is missing"),
        (in_parts("model-1.safetensors"), "is not whole, model-2.safetensors is missing"),
        (lambda folder: (folder / ENDED).write_text("{}"), NO_STATE),
        (with_state(newer=1), NO_STATE),
        (with_state(global_step="2"), NO_STATE),
        (with_state(global_step=2.5), NO_STATE),
        (with_state(max_steps=None), NO_STATE),
        (with_state(log_history=[3]), NO_STATE),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_and_passed_over(
    interrupted: Path, tmp_path: Path, spoil: Callable[[Path], Any], flaw: str
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoint-2")
    said = [f"checkpoint-2 {flaw}: going on from checkpoint-1"]
    assert found(tmp_path / "run") == ("checkpoint-1", said)
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(InputError, match=f"checkpoint-2 {flaw}; there is no") as error:
        found(tmp_path / "run")
    assert "--fresh" in str(error.value.hint)


def of_two_ranks(folder: Path) -> None:
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")


@pytest.mark.parametrize(
    "change", [of_two_ranks, in_parts("model-1.safetensors", "model-2.safetensors")]
)
def test_a_checkpoint_of_another_layout_is_whole(
    interrupted: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    change(tmp_path / "run" / "checkpoint-2")
    assert found(tmp_path / "run") == ("checkpoint-2", [])


def test_a_checkpoint_of_adapters_is_whole_with_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    training = {"max_steps": 2, "save_steps": 1, "router_bias_speed": 0.0}
    path = write_recipe(
        tmp_path, training=training, model={"path": "tiny-base"}, lora={"r": 2, "alpha": 4}
    )
    killed_at(1, monkeypatch, path)
    checkpoint = tmp_path / "out-run" / "checkpoint-1"
    assert flaw_of(checkpoint) is None
    (checkpoint / "adapter_model.safetensors").unlink()
    assert "missing" in str(flaw_of(checkpoint))


def test_a_run_without_its_last_optimiser_ends_as_the_whole_one(
    interrupted: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(write_recipe(whole, training=THREE_STEPS))
    shutil.copytree(interrupted, broken / "out-run")
    (broken / "out-run" / "checkpoint-2" / "optimizer.pt").unlink()
    told = run(write_recipe(broken, training=THREE_STEPS))
    assert told[0].endswith("optimizer.pt is missing: going on from checkpoint-1")
    assert files(broken / "out")["model.safetensors"] == files(whole / "out")["model.safetensors"]


@pytest.mark.parametrize("seconds", ["NaN", "1e999", "-Infinity", "1" + "0" * 400])
def test_seconds_that_are_not_finite_are_no_record(
    interrupted: Path, tmp_path: Path, seconds: str
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(re.sub(r'"seconds": [^,]*', f'"seconds": {seconds}', file.read_text()))
    with pytest.raises(InputError, match="is not the record of a training run"):
        found(tmp_path / "run")


# --- evaluations that come later ------------------------------------------------------------------


def test_an_interrupted_run_may_be_evaluated_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(1, monkeypatch, write_recipe(tmp_path, training=TWO_STEPS))
    evaluated = write_recipe(
        tmp_path,
        training=TWO_STEPS | {"eval_strategy": "steps", "eval_steps": 2},
        eval={"limit": 1, "decoding": {"max_new_tokens": 8}},
    )
    run(evaluated)
    state = json.loads((tmp_path / "out-run" / "checkpoint-2" / ENDED).read_text())
    assert any("eval_accuracy" in line for line in state["log_history"])


def test_the_record_of_an_earlier_release_tells_of_evaluations(
    interrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    settings = json.loads(file.read_text())["settings"]
    record["settings"]["training"]["do_eval"] = True
    file.write_text(json.dumps(record))
    assert RunFolder(tmp_path / "run", settings).checkpoints()


# --- what --fresh leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["checkpoint-2", "link", "."])
@pytest.mark.parametrize("key", ["model.path", "data.file", "data.eval_file"])
def test_what_a_run_reads_may_not_lie_where_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, place: str
) -> None:
    start = tmp_path / "out-run" / "checkpoint-2"
    start.mkdir(parents=True)
    (start / "weights").write_text("mine")
    (tmp_path / "link").symlink_to(start)
    path = tmp_path / "link" if place == "link" else tmp_path / "out-run" / place
    section, name = key.split(".")
    rest = {"problems": 4} if key == "data.eval_file" else {}
    recipe = write_recipe(tmp_path, **{section: {name: str(path)} | rest})
    with pytest.raises(InputError, match=rf":\d+: `{key}` lies in .*out-run, where this") as error:
        run_recipe(load_recipe(recipe), resume=False)
    assert "another `output_dir`" in str(error.value.hint)
    assert (start / "weights").read_text() == "mine"


def test_a_bundled_model_is_no_path_in_the_folder_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out-run").mkdir()
    monkeypatch.chdir(tmp_path / "out-run")
    assert load_recipe(write_recipe(tmp_path, model={"path": "tiny-base"})).model.path


def test_fresh_leaves_a_folder_without_a_record_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out-run" / "tensorboard" / "events"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run(write_recipe(tmp_path, training={"max_steps": 1}), resume=False)
    assert mine.read_text() == "mine"


# --- what an interrupted run says -----------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("fresh", [False, True])
def test_an_interrupted_run_says_what_goes_on_with_it(
    dmax: Dmax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool, step: int
) -> None:
    path = write_recipe(tmp_path, training=TWO_STEPS)
    if fresh:
        run(path)  # its checkpoints go, and do not count
    compute_loss = DMaxTrainer.compute_loss

    def dies(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DMaxTrainer, "compute_loss", dies)
    result = dmax("train", path, *(["--fresh"] if fresh else []))
    assert result.code == 130
    said = " ".join(result.err.split())
    if step == 0:
        assert "there is no checkpoint of this run yet, and the same command starts over" in said
        assert "kept" not in said
    else:
        command = "the same command without --fresh" if fresh else "the same command"
        assert f"checkpoints are kept, and {command} goes on from the last one" in said
