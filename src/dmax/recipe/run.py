"""`dmax train RECIPE`: from a recipe to a trained checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, set_seed

from dmax import extras
from dmax.adapters import add_adapters, base_name, merged
from dmax.attention import best_for_training
from dmax.checkpoint import Checkpoint, check_target, save_checkpoint, write_ids
from dmax.convert import merge_adapters
from dmax.environment import DTYPES, environment, select_device
from dmax.errors import InputError
from dmax.evaluation.curves import draw_history
from dmax.evaluation.run import evaluate
from dmax.files import leftovers, remove_leftovers
from dmax.hub import is_adapter
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.recipe.arguments import make_arguments
from dmax.recipe.build import build_checkpoint, data_digest, encode_data, held_out, read_data
from dmax.recipe.disk import check_room, num_steps, room
from dmax.recipe.folder import ANEW, TRAINER_STATE, RunFolder
from dmax.recipe.logs import PROJECT, reported_here
from dmax.recipe.places import run_dir
from dmax.recipe.sections import EvalSection, Recipe
from dmax.tasks import Task, get_task
from dmax.tiny import bundled
from dmax.training import get_objective
from dmax.training.config import DMaxConfig
from dmax.training.ranks import num_ranks, rank, wait_for_all
from dmax.training.sharding import start_device
from dmax.training.trainer import DMaxTrainer

CURVES = "curves.png"
NUM_PIECES = 16  # of a file of weights that are read to tell it from another
PIECE = 2**20  # bytes of one; a smaller file is read whole
# Fields of the training arguments, by their first letters, that leave the weights as they are.
UNTRACKED = (
    "ddp",
    "disable_tqdm",
    "do_eval",
    "eval",
    "fsdp",  # what matters of it has its own place
    "gradient_accumulation_steps",  # the same
    "hub",
    "log",
    "output_dir",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
    "save",
    "trackio",
)


def run_recipe(
    recipe: Recipe, *, resume: bool = True, report: Callable[[str], None] = lambda _: None
) -> Path:
    """Train as the recipe says and write the checkpoint to its `output_dir`.

    Intermediate checkpoints go to `<output_dir>-run`. If there are some of the same recipe and
    `resume` holds, training continues there, and a finished run is left as it is. Data is read and
    checked before a model is loaded. Beside the checkpoint stands a picture of what was logged.

    Returns:
        The folder of the checkpoint, or the file of a head.
    """
    if recipe.head is not None:
        if num_ranks() > 1:
            raise InputError(f"a head is trained in one process, not in {num_ranks()}")
        from dmax.recipe.head import train_head

        return train_head(recipe, recipe.head, replace=not resume, report=report)
    if recipe.lora is not None:
        extras.require("peft", "train", "`lora` in a recipe")
    args = _arguments(recipe)
    task = _task(recipe)
    settings = _settings(recipe, args)
    with recipe.file.at("output_dir"):
        run = _run_folder(recipe, args, settings, resume, report)
    if run.is_finished:
        report(f"already finished: {recipe.output_dir}")
        if recipe.lora is not None and recipe.lora.merge and is_adapter(recipe.output_dir):
            report("merging its adapters")
            dtype = DTYPES.get(recipe.model.dtype, "auto")
            merge_adapters(recipe.output_dir, recipe.output_dir, dtype=dtype)
        return recipe.output_dir
    with reported_here(run.path):
        _train_model(run, recipe, args, task, report)
    return recipe.output_dir


def _train_model(
    run: RunFolder,
    recipe: Recipe,
    args: DMaxConfig,
    task: Task | None,
    report: Callable[[str], None],
) -> None:
    """Train from where the run stands to its end, and write the result."""
    trainer, checkpoint = _make_trainer(recipe, args, task, run, report)
    with recipe.file.at("output_dir"):
        num_examples = None if recipe.data.streaming else len(trainer.train_dataset)
        planned = num_steps(args, num_examples, args.world_size) or 0
        merges = recipe.lora is not None and recipe.lora.merge
        needed = room(trainer.model, args, planned, merges=merges)
        check_room(needed, recipe.output_dir, [*run.checkpoints(), *leftovers(recipe.output_dir)])
    start = _copy_of_weights(checkpoint.model) if recipe.model.keep_start and rank() == 0 else {}
    wait_for_all()  # until every rank has seen the folder as it was
    if rank() == 0:
        remove_leftovers(recipe.output_dir)
    run.begin()
    wait_for_all()
    steps = _train(trainer, run)
    trainer.check_weights(steps)
    model = trainer.whole_model()
    if model is not None:
        blend_weights(model, start, recipe.model.keep_start)
        if recipe.lora is not None and recipe.lora.merge:
            model = merged(model)
        run.stop_clock()
        origin = {
            "recipe": recipe.file.path.name,
            "environment": environment(args.device),
            "precision": args.precision,
        }
        save_checkpoint(
            model,
            checkpoint.tokenizer,
            recipe.output_dir,
            checkpoint.special_ids,
            decoding=checkpoint.decoding,
            extra=origin | {"steps": steps, "seconds": round(run.seconds)},
        )
        _draw(trainer, recipe, report)
        run.finish()
    wait_for_all()


def _make_trainer(
    recipe: Recipe,
    args: DMaxConfig,
    task: Task | None,
    run: RunFolder,
    report: Callable[[str], None],
) -> tuple[DMaxTrainer, Checkpoint]:
    """A trainer of the model, and the checkpoint that it starts from; nothing is written yet."""
    held_out_section = held_out(recipe.data)
    conversations = read_data(recipe.data)
    held_out_conversations = held_out_section and read_data(held_out_section)
    set_seed(args.seed)
    device = start_device(rank()) if args.is_sharded else select_device("auto")
    built = build_checkpoint(recipe.model, device, attention=best_for_training(args.device))
    decoding = get_objective(args.objective, args.rollout).decoding
    checkpoint = dataclasses.replace(built, decoding=decoding or built.decoding)
    write_ids(checkpoint.model.config, checkpoint.special_ids, checkpoint.decoding)
    encode = partial(encode_data, checkpoint=checkpoint, eos_labels=args.eos_labels, report=report)
    dataset = encode(recipe.data, conversations)
    eval_dataset = held_out_section and encode(held_out_section, held_out_conversations)
    num_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    num_examples = "a stream of" if recipe.data.streaming else len(dataset)
    size = f"{num_examples} examples, {num_parameters:,} parameters"
    report(f"{size}, products in {args.precision}")
    network: Any = checkpoint.model
    if recipe.lora is not None:
        with recipe.file.at("lora"):
            base = base_name(recipe.model.path or "")
            network = add_adapters(network, recipe.lora.config(network), base)
        report(f"of them learn {network.get_nb_trainable_parameters()[0]:,} in adapters")
    trainer = DMaxTrainer(
        network,
        args,
        dataset,
        eval_dataset,
        special_ids=checkpoint.special_ids,
        eval_hook=_eval_hook(recipe.eval, task, checkpoint) if recipe.eval and task else None,
        processing_class=checkpoint.tokenizer,
        callbacks=[run],
    )
    return trainer, checkpoint


def _run_folder(
    recipe: Recipe,
    args: DMaxConfig,
    settings: Mapping[str, Any],
    resume: bool,
    report: Callable[[str], None],
) -> RunFolder:
    """The folder of the run, which is finished only if its result is there too.

    Raises:
        InputError: something else is in the place of the run or of its result.
    """
    output_dir = recipe.output_dir
    check_target(output_dir)
    run = RunFolder(Path(args.output_dir), settings, fresh=not resume)
    is_written = (output_dir / "config.json").is_file()
    run.is_finished = run.is_finished and is_written
    if run.is_finished:
        return run
    run.find_checkpoint(report)
    if is_written and resume and run.last_checkpoint is None:
        raise InputError(f"{output_dir} holds a checkpoint that is not of this run", ANEW)
    return run


@torch.no_grad()
def blend_weights(model: nn.Module, other: Mapping[str, Tensor], share: float) -> None:
    """Make every weight (1 - share) of itself + share of `other`'s, router biases included."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):  # tied ones come once
        if name in other:  # buffers that follow from the config are in no file
            value.lerp_(other[name].to(value), share)


def _copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _train(trainer: DMaxTrainer, run: RunFolder) -> int:
    """Train to the last step, from the last checkpoint on; how many steps the whole run has."""
    last = run.last_checkpoint
    if last is not None and run.is_trained():  # Trainer would take one step more
        trainer.load_weights(last)
        trainer.state = TrainerState.load_from_json(str(last / TRAINER_STATE))
        return int(trainer.state.global_step)
    result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    steps = int(result.global_step)
    if steps == 0:
        raise InputError(
            "not one step was taken: the data is less than one batch",
            hint="lower `per_device_train_batch_size`, or leave out `dataloader_drop_last`",
        )
    return steps


def _draw(trainer: DMaxTrainer, recipe: Recipe, report: Callable[[str], None]) -> None:
    """Write `curves.png` beside the checkpoint, with all that the whole run has logged."""
    state = trainer.state
    title = f"{recipe.output_dir.name}: {state.global_step:,} steps of {trainer.args.objective}"
    try:
        draw_history(state.log_history, recipe.output_dir / CURVES, title)
    except InputError as error:  # a trained model is worth keeping without its picture
        report(f"no {CURVES}: {error.message}; {error.hint}")


def _arguments(recipe: Recipe) -> DMaxConfig:
    folder = run_dir(recipe.output_dir)
    names = {"run_name": recipe.output_dir.name, "project": PROJECT}
    return make_arguments(recipe.file, names | recipe.training, folder, recipe.fsdp)


def _task(recipe: Recipe) -> Task | None:
    """What evaluations solve, with its examples at hand."""
    if recipe.eval is None:
        return None
    with recipe.file.at("eval.task"):
        return get_task(recipe.eval.task)


def _settings(recipe: Recipe, args: DMaxConfig) -> dict[str, Any]:
    """What the weights depend on; of the training arguments those that are not the default.

    Of a model on the hub only the name is known, of a local one also its weights.

    Any number of processes may go on with a run, as long as a step has as many micro-batches.
    """
    data = asdict(recipe.data)
    for name in ("num_proc", "eval_file"):  # nothing depends on them
        del data[name]
    with recipe.file.at("data.file"):
        data["sha256"] = data_digest(recipe.data)
    defaults = {entry.name: entry.default for entry in dataclasses.fields(args)}
    training = {
        name: value
        for name, value in args.to_dict().items()
        if not name.startswith(UNTRACKED) and value != defaults.get(name)
    }
    micro_batches = args.gradient_accumulation_steps * args.world_size
    training["gradient_accumulation_steps x processes"] = micro_batches
    sharding = recipe.fsdp and {"reduce_dtype": recipe.fsdp.reduce_dtype}
    return {
        "model": asdict(recipe.model) | {"weights": start_digest(recipe.model.path)},
        "data": data,
        "training": training,
        "fsdp": sharding,
        "lora": recipe.lora and {**asdict(recipe.lora), "merge": None},
    }


def start_digest(model: str | None) -> str | None:
    """Tells the weights of a bundled or local model from others, with little read of large files.

    None if there is no such folder, or no weights in it.
    """
    folder = Path(bundled(model or "") or os.path.expanduser(model or ""))
    is_there = bool(model) and os.path.isdir(folder)  # unlike Path.is_dir, takes any length
    files = sorted(folder.glob("*.safetensors")) if is_there else []
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for piece in range(NUM_PIECES):
                content.seek(max(0, size - PIECE) * piece // (NUM_PIECES - 1))
                digest.update(content.read(PIECE))
    return digest.hexdigest()[:16] if files else None


def _eval_hook(
    section: EvalSection, task: Task, checkpoint: Checkpoint
) -> Callable[[nn.Module], dict[str, float]]:
    params = DecodingParams(**{"max_new_tokens": task.max_new_tokens, **section.decoding})

    def hook(model: Any) -> dict[str, float]:
        measured = dataclasses.replace(checkpoint, model=model)
        llm = LLM.from_checkpoint(measured, max_batch_size=32)
        summary, _samples = evaluate(llm, task, params, limit=section.limit, seed=section.seed)
        return {"accuracy": summary.accuracy, "tpf": summary.tpf}

    return hook
