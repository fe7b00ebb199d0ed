"""Training in two processes, with gloo: the numbers of one process, and files that fit together.

Float32 sums depend on their order, so equal means: losses within 1e-5, gradients within 1e-6 (the
largest is about 0.2), weights after some steps of Adam at a learning rate of 0.01 within 1e-4.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import write_recipe
from two_ranks import launch

from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError
from dmax.recipe.folder import RunFolder
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.sharding import SHARDS, are_whole
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)

from rank_worker import FAMILIES, LAST, THROUGH_ACCELERATE, train  # noqa: E402  # which imports accelerate

HERE = Path(__file__).parent
REWARDED = {"objective": "mmd", "mmd_groups": 2, "mmd_bandwidth": 0.1, "learning_rate": 1e-5}
WITHIN = 30.0  # seconds between the death of a rank and the end of all


def worker(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What `rank_worker.py` does under a name, in two processes."""
    return launch(HERE / "rank_worker.py", *arguments)


def sharded_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe for two processes that share a model; six steps, a checkpoint after every second."""
    folder.mkdir(parents=True, exist_ok=True)
    training = {
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "gradient_accumulation_steps": 2,
    } | changes.pop("training", {})
    evaluation = {"limit": 2, "decoding": {"max_new_tokens": 16}}
    return write_recipe(folder, training=training, fsdp={}, eval=evaluation, **changes)


def history(folder: Path) -> list[dict[str, float]]:
    """What a finished run has logged, without the times."""
    state = json.loads((folder / "out-run" / "checkpoint-6" / "trainer_state.json").read_text())
    times = ("_per_second", "_runtime")
    return [
        {name: value for name, value in line.items() if not name.endswith(times)}
        for line in state["log_history"]
    ]


def assert_same_run(folder: Path, other: Path) -> None:
    for ours, theirs in zip(history(folder), history(other), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    results = [load_file(each / "out" / "model.safetensors") for each in (folder, other)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks have trained in all ways, and run the recipes `whole` and `next` to their ends."""
    folder = tmp_path_factory.mktemp("compared")
    start = tmp_path_factory.mktemp("start")
    run_recipe(load_recipe(write_recipe(start, training={"max_steps": 1})))
    sharded_recipe(folder / "whole")
    model = {"path": str(start / "out"), "keep_start": 0.5}
    sharded_recipe(folder / "next", model=model)
    records = [{"prompt": f"{k} + {k}", "response": f"{2 * k} " * (k % 5 + 1)} for k in range(64)]
    sharded_recipe(folder / "mmd", model={"path": str(start / "out")}, training=REWARDED)
    (folder / "mmd_ddp").mkdir()
    write_recipe(folder / "mmd_ddp", training=REWARDED | {"gradient_accumulation_steps": 2})
    stream = folder / "stream" / "data.jsonl"
    sharded_recipe(stream.parent, data={"file": str(stream), "streaming": True})
    stream.write_text("".join(json.dumps(record) + "\n" for record in records))
    ended = worker("compare", folder)
    assert ended.returncode == 0, ended.stdout
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process makes of the same batches, by family."""
    folder = tmp_path_factory.mktemp("alone")
    return {family: train(folder, family, checkpointing=True) for family in FAMILIES}


through_accelerate = pytest.param(
    "accelerate", marks=pytest.mark.skipif(not THROUGH_ACCELERATE, reason="torch is built for GPUs")
)
WAYS = ["ddp kept", "ddp recomputed", "fsdp kept", "fsdp recomputed", through_accelerate]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_as_one_process_does(
    compared: Path, alone: dict[str, dict[str, Any]], family: str, way: str
) -> None:
    first, second = (torch.load(compared / f"rank_{rank}.pt") for rank in (0, 1))
    ours, expected = first[f"{family} {way}"], alone[family]
    for line, other in zip(ours["log"], expected["log"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert line["loss_masked"] == pytest.approx(other["loss_masked"], abs=1e-5)
        assert line["rollout_error"] == pytest.approx(other["rollout_error"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
    assert len(ours["held_out"]) == 3
    for line, other in zip(ours["held_out"], expected["held_out"], strict=True):
        assert line["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-5)
        assert line["eval_bytes"] == other["eval_bytes"]  # a whole model, on rank 0
    torch.testing.assert_close(ours["gradients"], expected["gradients"], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["weights"], expected["weights"], atol=1e-4, rtol=0)
    assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 0.05
    assert not second[f"{family} {way}"]["weights"]  # only rank 0 puts the model together

    for rank in (first, second):
        held = rank[f"{family} {way}"]
        if way.startswith("ddp"):
            assert held["module"] == "DistributedDataParallel"
            assert held["num_sharded"] == 0
        else:
            assert held["num_sharded"] == len(expected["gradients"])  # every one is a DTensor
            assert held["share"] <= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", through_accelerate])
def test_experts_compute_in_bfloat16_over_float32_weights(
    compared: Path, alone: dict[str, dict[str, Any]], way: str
) -> None:
    for rank in (0, 1):
        held = torch.load(compared / f"rank_{rank}.pt")[f"{way} bfloat16"]
        assert held["experts"] == {torch.bfloat16}
        assert held["share"] <= 0.6
        assert all(weight.dtype == torch.float32 for weight in held["weights"].values())
        for line, other in zip(held["held_out"], alone["llada2_moe"]["held_out"], strict=True):
            assert line["eval_bytes"] == other["eval_bytes"] / 2  # decoded in bfloat16, too
            assert line["eval_rounded"] == 0
        losses = [line["loss"] for line in held["log"]]
        expected = [line["loss"] for line in alone["llada2_moe"]["log"]]
        assert losses == pytest.approx(expected, abs=0.02)
        assert losses != [float(torch.tensor(loss).bfloat16()) for loss in losses]


@pytest.mark.slow
def test_a_sharded_model_is_saved_whole(compared: Path) -> None:
    ours = load_checkpoint(compared / "saved", dtype=torch.float32, device="cpu").model
    weights = torch.load(compared / "rank_0.pt")[LAST]["weights"]
    torch.testing.assert_close(dict(ours.state_dict()), weights, atol=0, rtol=0)


@pytest.mark.slow
def test_a_stream_is_dealt_out_to_the_ranks(compared: Path, tmp_path: Path) -> None:
    stream = {"file": str(compared / "stream" / "data.jsonl"), "streaming": True}
    sharded_recipe(tmp_path, data=stream, training={"gradient_accumulation_steps": 4})
    run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert_same_run(compared / "stream", tmp_path)


@pytest.mark.slow
def test_a_sharded_model_is_read_by_rank_zero_and_blended_with_its_start(
    compared: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(compared / "next" / "recipe.yaml")
    model = {"path": recipe.model.path, "keep_start": 0.5}
    sharded_recipe(tmp_path, model=model, training={"gradient_accumulation_steps": 4})
    run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert_same_run(compared / "next", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mmd", "mmd_ddp"])
def test_all_ranks_compare_with_the_model_that_rank_zero_began_with(
    compared: Path, tmp_path: Path, way: str
) -> None:
    """Sharded, the other rank had no weights when its frozen copy was made.

    Rounding may decide about a token that is sampled, so later steps are only alike.
    """
    training = REWARDED | {"gradient_accumulation_steps": 4}
    if way == "mmd":
        model = {"path": load_recipe(compared / way / "recipe.yaml").model.path}
        sharded_recipe(tmp_path, model=model, training=training)
    else:
        write_recipe(tmp_path, training=training)
    run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    ours, expected = history(compared / way), history(tmp_path)
    assert ours[0] == pytest.approx(expected[0], abs=1e-5, rel=1e-4)
    for line, other in zip(ours, expected, strict=True):
        for name in {"reward_masked", "reward_predicted"} & other.keys():
            assert line[name] == pytest.approx(other[name], abs=1e-3)
    assert {"reward_masked", "reward_predicted"} <= expected[-2].keys()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_after_the_death_of_one(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sharded_recipe(tmp_path)
    died = worker("dies", tmp_path)
    seconds = time.time() - (tmp_path / "died").stat().st_mtime
    assert died.returncode != 0
    assert seconds < WITHIN, died.stdout
    assert died.stdout.count("error: ") == 1
    assert "another process of this training cannot be reached" in died.stdout
    assert _last_checkpoint(tmp_path) == "checkpoint-2"

    # On one process, which accumulates twice as often; it is interrupted, too.
    with pytest.raises(InputError, match="differs in `training.gradient_accumulation_steps x"):
        run_recipe(load_recipe(path))
    sharded_recipe(tmp_path, training={"gradient_accumulation_steps": 4})
    compute_loss = DMaxTrainer.compute_loss

    def interrupted(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(path))
    assert _last_checkpoint(tmp_path) == "checkpoint-4"

    sharded_recipe(tmp_path)
    ended = launch("-m", "dmax", "train", path)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("'loss':") == 2  # steps 5 and 6, on rank 0 only
    assert ended.stdout.count(str(tmp_path / "out") + "\n") == 1
    assert_same_run(compared / "whole", tmp_path)


def _last_checkpoint(folder: Path) -> str:
    whole = (folder / "out-run").glob("checkpoint-*/trainer_state.json")
    return max(each.parent.name for each in whole)


@pytest.mark.slow
def test_a_rank_that_diverges_ends_all_with_one_sentence(tmp_path: Path) -> None:
    ended = worker("diverges", write_recipe(tmp_path, training={"save_steps": 1}).parent)
    assert ended.returncode != 0
    assert ended.stdout.count("error: ") == 1, ended.stdout
    assert "step 3: the " in ended.stdout
    assert "the last good checkpoint is" in ended.stdout


@pytest.mark.slow
def test_a_bad_recipe_is_told_once(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"adam_beta2": 1.5})
    ended = launch("-m", "dmax", "train", path)
    assert ended.returncode != 0
    assert ended.stdout.count("error: ") == 1, ended.stdout
    assert not (tmp_path / "out-run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["index", "shard", "missing"])
def test_torn_shards_do_not_count(compared: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "out-run"
    shutil.copytree(compared / "whole" / "out-run", run)
    settings = json.loads((run / "run.json").read_text())["settings"]
    record = json.loads((run / "run.json").read_text()) | {"is_finished": False}
    (run / "run.json").write_text(json.dumps(record))
    shards = run / "checkpoint-6" / SHARDS
    assert are_whole(shards)
    file = shards / (".metadata" if damage == "index" else "__1_0.distcp")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    assert not are_whole(shards)
    said: list[str] = []
    folder = RunFolder(run, settings)
    folder.find_checkpoint(said.append)
    assert folder.last_checkpoint == run / "checkpoint-4"
    assert said == ["checkpoint-6 is damaged, shards cannot be read: going on from checkpoint-4"]
