"""The training arguments of a recipe, tried on a model of one weight before a real one is loaded.

Transformers finds out late what is wrong with its arguments: when the Trainer is made, with the
first optimiser, or with the first line of the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from dmax import extras
from dmax.environment import lacks_compiler
from dmax.errors import InputError, did_you_mean, show
from dmax.recipe.file import RecipeFile
from dmax.recipe.logs import check_loggers
from dmax.training import get_objective, objective_table
from dmax.training.config import DMaxConfig
from dmax.training.objectives import Objective
from dmax.training.sharding import Sharding

DECODED = ("accuracy", "tpf")
"""What evaluations measure of held-out problems (`eval` of a recipe)."""
HELD_OUT = ("loss",)
"""What they measure of held-out records (`data.eval_file`)."""
# Arguments that would do nothing here, or something other than they say: the objective makes the
# loss, the sampler batches by length, evaluation decodes, nothing is sent to the hub, and all
# parameters take part in every loss. (A `deepspeed` that fails would also stay set for every later
# model.)
OUT_OF_PLACE = {
    *("debug", "do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
    *("hub_always_push", "hub_revision", "load_best_model_at_end", "auto_find_batch_size"),
    *("label_smoothing_factor", "label_names", "remove_unused_columns", "use_liger_kernel"),
    *("liger_kernel_config", "train_sampling_strategy", "length_column_name", "use_cache"),
    *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "ignore_data_skip"),
    *("include_num_input_tokens_seen", "local_rank", "trackio_static_space_id"),
    *("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "ddp_broadcast_buffers"),
    *("ddp_find_unused_parameters", "ddp_static_graph", "average_tokens_across_devices"),
    "model_init_kwargs",
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
}
IN_DATA = {"max_length": "max_length", "too_long": "too_long", "dataset_num_proc": "num_proc"}
"""Arguments that a recipe has in its section `data`, and what they are called there."""
_SECTION = "shard the model with a section `fsdp` of the recipe"
OTHER_PLACE = dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _SECTION)
CHOICES = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "save_strategy": SaveStrategy,
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
UNPLANNED = 1_000  # steps after the warm-up for a trial, of a training that counts epochs
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")


def argument_names() -> set[str]:
    """Keys that `training` may have in a recipe."""
    return {entry.name for entry in fields(DMaxConfig)} - {"output_dir"}


def make_arguments(
    file: RecipeFile, training: Mapping[str, Any], output_dir: Path, fsdp: Sharding | None
) -> DMaxConfig:
    """The training arguments of a recipe, and how it shards the model.

    Raises:
        InputError: naming file, line and key of a value that does not fit.
    """
    with file.trying("training", training):
        return DMaxConfig(output_dir=str(output_dir), **training, **_sharded(fsdp))


def _sharded(fsdp: Sharding | None) -> dict[str, Any]:
    return {} if fsdp is None else {"fsdp": True, "fsdp_config": asdict(fsdp)}


def check_arguments(
    file: RecipeFile,
    training: Mapping[str, Any],
    fsdp: Sharding | None,
    *,
    measured: Sequence[str],
) -> None:
    """Make sure that a training can begin with these arguments on this machine.

    Args:
        file: the recipe.
        training: its `training`, the keys known and the plain values of the right type.
        fsdp: its `fsdp`, if any.
        measured: what evaluations of the recipe measure; empty if it has none.

    Raises:
        InputError: naming file, line and key of a value that does not fit.
    """
    extras.require("accelerate", "train", "training a model")
    _check_place(file, training)
    with file.at("training.report_to"):
        check_loggers(training.get("report_to"))
    for name, kind in CHOICES.items():
        _check_choice(file, training, name, [member.value for member in kind])
    _check_choice(file, training, "torch_compile_mode", COMPILE_MODES)
    metrics = [prefix + metric for metric in measured or DECODED for prefix in ("", "eval_")]
    _check_choice(file, training, "metric_for_best_model", metrics)
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        given = training.get(name)
        if isinstance(given, dict):
            file.check_keys(f"training.{name}", given, set(CHECKPOINTING))

    with TemporaryDirectory() as folder, file.trying("training", training):
        args = DMaxConfig(output_dir=folder, **training, **_sharded(fsdp))
        _check_evaluations(args, measured, is_decided="eval_strategy" in training)
        metric = args.metric_for_best_model
        if metric is not None and metric not in metrics:  # transformers takes the loss by itself
            raise InputError(
                f"`metric_for_best_model` must be one of {', '.join(metrics)}, got {metric!r}"
            )
        if (args.torch_compile or args.compile_objective) and (
            missing := lacks_compiler(args.device)
        ):
            raise InputError(
                f"compiling takes a C++ compiler, and {missing} is not here",
                hint="install it, or set CXX",
            )
        _try(args, evaluates=bool(measured))
    _check_settings(file, training, args)


def _check_place(file: RecipeFile, training: Mapping[str, Any]) -> None:
    """Raise `InputError` for an argument that stands elsewhere in a recipe, or nowhere."""
    for name in training:
        if name in IN_DATA:
            raise file.wrong(
                f"training.{name}", f"`training.{name}` is `data.{IN_DATA[name]}` in a recipe"
            )
        if name in OUT_OF_PLACE:
            raise file.wrong(
                f"training.{name}",
                f"`training.{name}` would not do here what it says",
                hint=OTHER_PLACE.get(name, "leave it out"),
            )


def _check_settings(file: RecipeFile, training: Mapping[str, Any], args: DMaxConfig) -> None:
    """Raise `InputError` for a setting of other objectives alone, which would do nothing."""
    # Those of plugins have no arguments of their own.
    names = [name for name, entry in objective_table().items() if entry.startswith("dmax.")]
    settings = {name: _settings(get_objective(name)) for name in names}
    known = settings.get(args.objective, set()) | _settings(args.objective_class)
    for key in training:
        owners = [name for name in names if key in settings[name]]
        if owners and key not in known:
            raise file.wrong(
                f"training.{key}",
                f"`training.{key}` is a setting of {' and '.join(owners)}, and the objective is "
                f"{args.objective}",
                hint="leave it out",
            )


def _settings(objective: type[Objective]) -> set[str]:
    return {entry.name for entry in fields(objective)}


def _check_evaluations(args: DMaxConfig, measured: Sequence[str], *, is_decided: bool) -> None:
    """Raise `InputError` for evaluations without anything to measure, and the other way round."""
    evaluates = args.eval_strategy != IntervalStrategy.NO
    if evaluates and not measured:
        raise InputError(
            "`eval_strategy` needs a section `eval`, which says what to solve, or `data.eval_file`"
        )
    if measured and not is_decided and not args.eval_on_start:
        raise InputError(
            "nothing would be evaluated: `eval` and `data.eval_file` need an `eval_strategy`",
            hint='say when with `eval_strategy: steps`, or leave it at `eval_strategy: "no"`',
        )


def _try(args: DMaxConfig, *, evaluates: bool) -> None:
    """All that a Trainer makes of its arguments before the first step, and the whole schedule."""
    rows = [torch.zeros(1)]
    trainer = Trainer(
        nn.Linear(1, 1), args, train_dataset=rows, eval_dataset=rows if evaluates else None
    )
    trainer.get_train_dataloader()
    num_steps = args.max_steps if args.max_steps > 0 else int(args.warmup_steps) + UNPLANNED
    trainer.create_optimizer_and_scheduler(num_training_steps=num_steps)
    if isinstance(trainer.lr_scheduler, LambdaLR):  # others have no parts that begin later
        _try_schedule(trainer.lr_scheduler, args, num_steps)


def _try_schedule(schedule: LambdaLR, args: DMaxConfig, num_steps: int) -> None:
    """Ask for the learning rates after the warm-up, and for that of the end."""
    warmup = args.get_warmup_steps(num_steps)
    for step in (min(each, num_steps) for each in (warmup, warmup + 1, num_steps)):
        try:
            for rate in schedule.lr_lambdas:
                float(rate(step))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"`lr_scheduler_type` {args.lr_scheduler_type.value} has no learning rate for step "
                f"{step}: {error}",
                hint="change `lr_scheduler_kwargs` or `warmup_steps`",
            ) from error


def _check_choice(
    file: RecipeFile, training: Mapping[str, Any], name: str, choices: Sequence[str]
) -> None:
    value = training.get(name)
    if value is not None and value not in choices:
        raise file.wrong(
            f"training.{name}",
            f"`training.{name}` cannot be {show(value)}",
            did_you_mean(str(value), choices) or f"it may be {', '.join(choices)}",
        )
