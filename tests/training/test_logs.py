"""`report_to`: loggers see all that is logged, stay on this machine, and are named when missing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from test_trainer import write_recipe
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from dmax import extras
from dmax.errors import InputError
from dmax.recipe.logs import LOGGERS, check_loggers, reported_here
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe

pytest.importorskip("accelerate")

EVALUATED = {
    "training": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 1},
    "eval": {"limit": 1, "decoding": {"max_new_tokens": 8}},
}


@pytest.mark.parametrize("name", ["none", "all", None, [], ["none"]])
def test_nothing_has_to_be_installed_to_report_nowhere(name: Any) -> None:
    check_loggers(name)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = extras.find_spec
    monkeypatch.setattr(
        extras, "find_spec", lambda module: None if module == name else found(module)
    )
    monkeypatch.delitem(sys.modules, name, raising=False)
    path = write_recipe(tmp_path, training={"report_to": name})
    with pytest.raises(InputError) as error:
        load_recipe(path)
    needs = f"in `training.report_to`, `report_to: {name}` needs the package `{name}`"
    assert error.value.message.startswith(f"{path}:") and error.value.message.endswith(needs)
    assert error.value.hint == extras.install_hint("log")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tensorbord", "did you mean `tensorboard`?"),
        (["wand"], "did you mean `wandb`?"),
        ([7], "it may be tensorboard, trackio, wandb or none"),
    ],
)
def test_an_unknown_name_is_told_what_it_may_be(tmp_path: Path, name: Any, hint: str) -> None:
    with pytest.raises(InputError, match="there is no logger ") as error:
        load_recipe(write_recipe(tmp_path, training={"report_to": name}))
    assert error.value.hint == hint


def test_loggers_stay_here_until_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with reported_here(tmp_path):
        assert os.environ["WANDB_MODE"] == "offline"
        assert os.environ["WANDB_DIR"] == str(tmp_path)
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
    assert dict(os.environ) == before
    monkeypatch.setenv("WANDB_MODE", "online")
    with reported_here(tmp_path):
        assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["WANDB_MODE"] == "online"


def test_a_logger_sees_the_parts_of_the_loss_and_what_evaluations_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"logs": {}}

    class Logger(TrainerCallback):
        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            seen.update(name=args.run_name, project=args.project, mode=os.environ["WANDB_MODE"])

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            seen["logs"] |= logs

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Logger)
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda module: module == "wandb" or found(module))
    path = write_recipe(
        tmp_path, **EVALUATED | {"training": EVALUATED["training"] | {"report_to": "wandb"}}
    )
    run_recipe(load_recipe(path))
    assert (seen["name"], seen["project"], seen["mode"]) == ("out", "dmax", "offline")
    assert seen["logs"].keys() >= {
        *("loss", "loss_masked", "loss_predicted", "rollout_error", "tokens_per_second"),
        *("eval_accuracy", "eval_tpf"),
    }


def test_where_a_run_reports_to_may_change_before_it_is_resumed(tmp_path: Path) -> None:
    first = write_recipe(tmp_path, training={"max_steps": 2, "project": "mine", "run_name": "one"})
    run_recipe(load_recipe(first))
    record = json.loads((tmp_path / "out-run" / "run.json").read_text())
    assert not record["settings"]["training"].keys() & {"project", "run_name", "report_to"}


@pytest.mark.slow
def test_tensorboard_has_the_curves_of_a_run_and_of_its_next_part(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = EVALUATED["training"] | {"report_to": "tensorboard"}
    path = write_recipe(tmp_path, **EVALUATED | {"training": training})
    run_recipe(load_recipe(path))
    folder = tmp_path / "out-run" / "tensorboard"
    state = json.loads((tmp_path / "out-run" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = {
        (name, line["step"]): value for line in state["log_history"] for name, value in line.items()
    }
    events = EventAccumulator(str(folder)).Reload()
    for tag, name in (
        ("train/loss_masked", "loss_masked"),
        ("train/rollout_error", "rollout_error"),
        ("eval/accuracy", "eval_accuracy"),
        ("eval/tpf", "eval_tpf"),
    ):
        scalars = events.Scalars(tag)
        assert scalars
        for scalar in scalars:
            assert scalar.value == pytest.approx(logged[name, scalar.step], rel=1e-6), tag

    run_recipe(load_recipe(path), resume=False)  # what it replaces is not drawn beneath it
    assert len(list(folder.iterdir())) == 1
