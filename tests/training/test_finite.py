"""A run whose numbers are no longer finite stops in one sentence and saves nothing of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_head_training import write as write_head_recipe
from test_runs import files, run
from test_trainer import write_recipe
from torch import Tensor, nn

from dmax.baselines import head_training
from dmax.checkpoint import load_checkpoint, save_checkpoint
from dmax.errors import InputError
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.clean_stream import CleanBatch
from dmax.training.finite import check_weights, first_not_finite
from dmax.training.objectives import OPUT
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")

FOUR_STEPS = {"max_steps": 4, "save_steps": 2, "router_bias_speed": 0.0}
INF = float("inf")
NAN = float("nan")


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_the_first_number_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = torch.full((3,), largest, dtype=dtype)  # their sum would overflow
    bad = torch.tensor([[1, value], [NAN, INF]], dtype=dtype)
    named = {"ids": torch.tensor([2**62]), "empty": good[:0], "good": good}
    assert first_not_finite(named.items()) is None
    found = first_not_finite([*named.items(), ("bad", bad), ("worse", bad)])
    assert found is not None
    assert repr(found) == repr(("bad", value))


def test_tensors_of_several_dtypes_are_looked_at_together() -> None:
    tensors = [torch.ones(2), torch.ones(2).bfloat16(), torch.tensor(NAN).double()]
    assert first_not_finite((str(tensor.dtype), tensor) for tensor in tensors[:2]) is None
    found = first_not_finite((str(tensor.dtype), tensor) for tensor in tensors)
    assert found is not None
    assert found[0] == "torch.float64"
    assert first_not_finite([]) is None


def test_buffers_are_weights() -> None:
    model = nn.BatchNorm1d(2)
    check_weights(model)
    model.running_mean = torch.tensor([0.0, INF])
    with pytest.raises(InputError, match="`running_mean` holds inf"):
        check_weights(model)


# --- runs -----------------------------------------------------------------------------------------


def stops(path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(path)
    assert re.fullmatch(message, caught.value.message)
    assert not (path.parent / "out").exists()


def spoil_loss(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """From a step on, the loss of the first micro-batch is wrong, its gradient too."""
    original = DMaxTrainer.compute_loss

    def spoilt(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, *args, **kwargs)
        is_first = not self._losses
        return loss * value if self.state.global_step + 1 >= step and is_first else loss

    monkeypatch.setattr(DMaxTrainer, "compute_loss", spoilt)


@pytest.mark.parametrize(("value", "micro_batches"), [(NAN, 1), (INF, 3)])
def test_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, micro_batches: int
) -> None:
    steps = FOUR_STEPS | {"gradient_accumulation_steps": micro_batches}
    path = write_recipe(tmp_path, training=steps)
    last = tmp_path / "out-run" / "checkpoint-2"
    with monkeypatch.context() as patch:
        spoil_loss(patch, 3, value)
        message = f"step 3: the loss is not finite but {value}; the last good checkpoint is {last}"
        stops(path, message)
        before = files(last)
        stops(path, message)  # it goes on from there
    assert files(last) == before
    run(path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_gradient_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OPUT.loss

    def spoilt(self: OPUT, model: Any, clean: CleanBatch, generator: torch.Generator) -> Any:
        norm = model.model.norm.weight
        norm.register_hook(lambda gradient: gradient * INF)
        return original(self, model, clean, generator)

    monkeypatch.setattr(OPUT, "loss", spoilt)
    path = write_recipe(tmp_path, training=FOUR_STEPS | {"max_grad_norm": 0.0})
    stops(
        path,
        r"step 1: the gradient of `model\.norm\.weight` is not finite but -?(inf|nan); "
        "there is no checkpoint yet",
    )


def test_a_learning_rate_that_blows_the_weights_up(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training=FOUR_STEPS | {"learning_rate": 4.0e9})
    stops(path, r"step [234]: the .* is not finite but (-?inf|nan); .*")


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """After a step, one weight is not a number."""
    original = DMaxTrainer._maybe_log_save_evaluate

    def poisoned(self: DMaxTrainer, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == step:
            with torch.no_grad():
                self.model.get_input_embeddings().weight[3, 1] = NAN
        original(self, *args, **kwargs)

    monkeypatch.setattr(DMaxTrainer, "_maybe_log_save_evaluate", poisoned)


@pytest.mark.parametrize("save_steps", [2, 3])  # the last step has a checkpoint, or has none
def test_weights_that_are_not_finite_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    path = write_recipe(tmp_path, training=FOUR_STEPS | {"save_steps": save_steps})
    first = tmp_path / "out-run" / f"checkpoint-{save_steps}"
    with monkeypatch.context() as patch:
        poison(patch, 4)
        stops(path, rf"step 4: the weight `.*` is not finite but nan; the last good .* is {first}")
    assert [entry.name for entry in first.parent.iterdir() if entry.is_dir()] == [first.name]
    run(path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_checkpoint_is_not_written_of_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    path = write_recipe(tmp_path, training=FOUR_STEPS | {"save_total_limit": 1})
    stops(path, "step 2: the weight `.*` is not finite but nan; there is no checkpoint yet")
    assert not list((tmp_path / "out-run").glob("checkpoint-*"))


def test_a_model_to_start_from_that_is_not_finite(tmp_path: Path) -> None:
    start = load_checkpoint("tiny-base", dtype=torch.float32, device="cpu")
    start.model.get_input_embeddings().weight.data[2, 2] = INF
    folder = tmp_path / "start"
    save_checkpoint(start.model, start.tokenizer, folder, start.special_ids)
    path = write_recipe(tmp_path, model={"path": str(folder)}, training={"max_steps": 1})
    stops(path, r"the model to start from has a weight that is not finite: `.*` holds inf")
    assert not (tmp_path / "out-run").exists()
    head = {"kind": "learn2pd", "max_steps": 1}
    with pytest.raises(InputError, match="the model to start from has a weight"):
        run_recipe(load_recipe(write_head_recipe(tmp_path, str(folder), head=head)))


def test_data_of_less_than_a_batch_trains_nothing_and_says_so(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 17, "dataloader_drop_last": True}
    path = write_recipe(tmp_path, training=changes)
    stops(path, "not one step was taken: the data is less than one batch")


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2])
def test_a_head_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = head_training.filter_loss
    calls: list[int] = []

    def spoilt(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args) * (NAN if len(calls) == step else 1)

    monkeypatch.setitem(head_training.LOSSES, "learn2pd", spoilt)
    path = write_head_recipe(tmp_path, "tiny-base", head={"kind": "learn2pd", "max_steps": 3})
    with pytest.raises(InputError, match=f"^step {step}: `loss` is not finite but nan; nothing"):
        run_recipe(load_recipe(path))
    assert not list(tmp_path.rglob("*.safetensors"))
