"""`dmax train RECIPE`: one YAML file says what model, what data, what objective, and how to measure it on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from dmax import models
from dmax.baselines.head_training import HeadConfig, fit, record
from dmax.baselines.heads import Kind, load_head, save_head
from dmax.checkpoint import (
    Checkpoint,
    check_target,
    load_checkpoint,
    new_checkpoint,
    save_checkpoint,
    weights_digest,
)
from dmax.decoding import get_strategy
from dmax.environment import environment, select_device
from dmax.errors import InputError, did_you_mean
from dmax.evaluation.run import check_writable, evaluate
from dmax.llm import LLM
from dmax.models import LLaDA2MoeConfig
from dmax.params import DecodingParams, check_number
from dmax.recipe_file import RecipeFile, read_recipe_file
from dmax.run_folder import ANEW, RunFolder
from dmax.special_ids import SpecialIds
from dmax.tasks import Task, get_task
from dmax.tasks.word_problems import Numbers, problems
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.data import Conversation, ResponseDataset, read_records
from dmax.training.trainer import DMaxConfig, DMaxTrainer


@dataclass(frozen=True, slots=True)
class ModelSection:
    """Where the model comes from: `path` of a checkpoint to continue, or `config` for a new one.

    `add_mask_token` and `block_length` turn an autoregressive checkpoint at `path` into a
    block-diffusion model. `config` holds the fields of its `model_type`'s configuration:
    llada2_moe, or a dense decoder such as llama. `keep_start` is the share of the weights at `path`
    in what is saved in the end: a mean of both ends of a run often beats either (WiSE-FT, arXiv
    2109.01903).
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    add_mask_token: bool = False
    block_length: int | None = None
    keep_start: float = 0.0
    attn_implementation: str | None = None
    experts_implementation: str | None = None


@dataclass(frozen=True, slots=True)
class DataSection:
    """What it learns: `file`, a JSONL of prompts and responses, or `problems` drawn from the bundled generator.

    `numbers` holds fields of `word_problems.Numbers`.
    """

    file: str | None = None
    problems: int | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class EvalSection:
    """Held-out problems decoded at every evaluation; `decoding` holds `DecodingParams` fields."""

    task: str = "word_problems"
    limit: int = 100
    seed: int = 1
    decoding: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A validated recipe: `training` holds the fields of `DMaxConfig`, or `head` says what head of a model to train."""

    file: RecipeFile
    output_dir: Path
    model: ModelSection
    data: DataSection
    training: dict[str, Any] = field(default_factory=dict)
    head: HeadConfig | None = None
    eval: EvalSection | None = None


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` replace fields of its `training`, or `head`. Nothing is computed yet.

    Raises:
        InputError: naming file, line and key: not YAML, unknown or missing key, or a value of the
            wrong kind.
    """
    file = read_recipe_file(Path(path))
    content = file.content
    file.check_keys("", content, {"output_dir", "model", "data", "training", "head", "eval"})
    what = "head" if "head" in content else "training"
    for key in ("output_dir", "model", "data", what):
        if key not in content:
            raise InputError(f"{path}: `{key}` is missing")
    if what == "head" and (beside := content.keys() & {"training", "eval"}):
        key = min(beside)
        raise file.wrong(key, f"a recipe with `head` has no `{key}`: a head alone is trained")
    output_dir = content["output_dir"]
    if not isinstance(output_dir, str) or Path(output_dir).name in ("", ".."):
        raise file.wrong(
            "output_dir", f"`output_dir` must be the path of a folder, got {output_dir!r}"
        )
    sections: dict[str, Any] = {}
    for key, kind in (("model", ModelSection), ("data", DataSection), ("eval", EvalSection)):
        if key != "eval" or content.get(key) is not None:
            file.check_keys(key, content[key], _names(kind))
            file.check_types(key, content[key], kind)
            sections[key] = kind(**content[key])
    chosen = HeadConfig if what == "head" else DMaxConfig
    file.check_keys(what, content[what], _names(chosen) - {"output_dir"})
    file.check_types(what, content[what], chosen)
    sections[what] = {**content[what], **(overrides or {})}
    if what == "head":
        with file.at("head"):
            sections["head"] = HeadConfig(**sections["head"])
    recipe = Recipe(file, Path(os.path.expanduser(output_dir)), **sections)
    _check_together(recipe)
    return recipe


def _check_together(recipe: Recipe) -> None:
    """What only several keys together, or the keys of mappings within a section, can get wrong."""
    file = recipe.file
    model = recipe.model
    data = recipe.data
    if (model.path is None) == (model.config is None):
        raise file.wrong("model", "`model` needs exactly one of `path` and `config`")
    if model.path is None and (model.add_mask_token or model.block_length):
        raise file.wrong(
            "model",
            "`add_mask_token` and `block_length` of `model` belong to a `path`",
            hint="a new model's block length is a field of its `config`",
        )
    if recipe.head is not None and model.path is None:
        raise file.wrong("model", "a head belongs to a trained model, so `model` needs a `path`")
    if not 0 <= model.keep_start <= 1 or (
        model.keep_start and (model.path is None or recipe.head is not None)
    ):
        raise file.wrong(
            "model.keep_start",
            "`model.keep_start` must be a share between 0 and 1 of the weights at `model.path`, "
            f"got {model.keep_start}",
        )
    if model.config is not None:
        _check_config(file, model.config)
    if (data.file is None) == (data.problems is None):
        raise file.wrong("data", "`data` needs exactly one of `file` and `problems`")
    file.check_keys("data.numbers", data.numbers, _names(Numbers))
    with file.at("data.problems"):
        check_number("problems", data.problems, low=1, whole=True, optional=True)
    with file.at("data.max_length"):
        check_number("max_length", data.max_length, low=1, whole=True, optional=True)
    if recipe.eval is not None:
        with file.at("eval.limit"):
            check_number("limit", recipe.eval.limit, low=1, whole=True)
        file.check_keys("eval.decoding", recipe.eval.decoding, _names(DecodingParams))
        with file.at("eval.decoding"):
            get_strategy(DecodingParams(**recipe.eval.decoding))


def _check_config(file: RecipeFile, config: dict[str, Any]) -> None:
    models.register()
    kind = config.get("model_type", LLaDA2MoeConfig.model_type)
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(str(kind), list(CONFIG_MAPPING))
        raise file.wrong("model.config.model_type", f"unknown model type {kind!r}", hint)
    known = _names(CONFIG_MAPPING[kind]) | {"model_type", "rope_theta", "block_length"}
    file.check_keys("model.config", config, known)
    try:
        _model_config(config, build_tokenizer())
    except (TypeError, ValueError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        key = next((key for key in config if re.search(rf"\b{key}\b", told)), "")
        raise file.wrong(f"model.config.{key}", f"`model.config` is not usable: {told}") from error


def _names(kind: Any) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def run_recipe(
    recipe: Recipe, *, resume: bool = True, report: Callable[[str], None] = lambda _: None
) -> Path:
    """Train as the recipe says and write the checkpoint to its `output_dir`; returns that folder, or a head's file.

    Intermediate checkpoints go to `<output_dir>-run`; if there are some of the same recipe and
    `resume` holds, training continues there, and a finished run is left as it is. Data is read and
    checked before the first step.
    """
    if recipe.head is not None:
        return _run_head(recipe, recipe.head, replace=not resume, report=report)
    run_dir = recipe.output_dir.with_name(recipe.output_dir.name + "-run")
    args = _arguments(recipe, run_dir)
    task = _task(recipe)
    with recipe.file.at("output_dir"):
        check_target(recipe.output_dir)
        run = RunFolder(run_dir, _settings(recipe, args), fresh=not resume)
        is_written = (recipe.output_dir / "config.json").is_file()
        if run.is_finished and is_written:
            report(f"already finished: {recipe.output_dir}")
            return recipe.output_dir
        if is_written and resume and run.last_checkpoint() is None:
            raise InputError(
                f"{recipe.output_dir} holds a checkpoint that is not of this run", ANEW
            )
    set_seed(args.seed)
    checkpoint = _build_checkpoint(recipe.model)
    dataset = _build_data(recipe, checkpoint)
    report(
        f"{len(dataset)} examples, {sum(p.numel() for p in checkpoint.model.parameters()):,} parameters"
    )
    trainer = DMaxTrainer(
        checkpoint.model,
        args,
        dataset,
        special_ids=_special_ids(checkpoint),
        eval_hook=_eval_hook(recipe.eval, task, checkpoint) if recipe.eval and task else None,
        processing_class=checkpoint.tokenizer,
        callbacks=[run],
    )
    start = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    run.begin()
    steps = _train(trainer, run)
    blend_weights(checkpoint.model, start, recipe.model.keep_start)
    run.stop_clock()
    save_checkpoint(
        checkpoint.model,
        checkpoint.tokenizer,
        recipe.output_dir,
        mask_token_id=checkpoint.mask_token_id,
        eos_token_id=checkpoint.eos_token_ids[0],
        block_length=checkpoint.block_length,
        extra={"recipe": recipe.file.path.name, "steps": steps, "seconds": round(run.seconds)}
        | {"environment": environment()},
    )
    run.finish()
    return recipe.output_dir


def _train(trainer: DMaxTrainer, run: RunFolder) -> int:
    """Train from the last checkpoint to the last step; how many steps that are, earlier parts included."""
    last = run.last_checkpoint()
    if last is not None and run.is_trained():  # Trainer would take one step more
        trainer._load_from_checkpoint(str(last))
        return int(last.name.removeprefix("checkpoint-"))
    result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return int(result.global_step)


def _arguments(recipe: Recipe, run_dir: Path) -> DMaxConfig:
    with recipe.file.at("training"):
        try:
            return DMaxConfig(output_dir=str(run_dir), **recipe.training)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(str(error).splitlines()[0]) from error


def _task(recipe: Recipe) -> Task | None:
    """What evaluations solve, with its examples at hand."""
    if recipe.eval is None:
        return None
    with recipe.file.at("eval.task"):
        return get_task(recipe.eval.task)


# Fields of the training arguments, by their first letters, that leave the weights as they are.
UNTRACKED = (
    "disable_tqdm",
    "eval",
    "hub",
    "log",
    "output_dir",
    "push_to_hub",
    "report_to",
    "run_name",
    "save",
)


def _settings(recipe: Recipe, args: DMaxConfig) -> dict[str, Any]:
    """All that the weights depend on; of the training arguments what is not their default."""
    data = asdict(recipe.data)
    defaults = {entry.name: entry.default for entry in dataclasses.fields(args)}
    if data["file"] is not None and os.path.isfile(data["file"]):
        data["sha256"] = hashlib.sha256(Path(data["file"]).read_bytes()).hexdigest()
    training = {
        name: value
        for name, value in args.to_dict().items()
        if not name.startswith(UNTRACKED) and value != defaults.get(name)
    }
    return {"model": asdict(recipe.model), "data": data, "training": training}


def _run_head(
    recipe: Recipe, config: HeadConfig, *, replace: bool, report: Callable[[str], None]
) -> Path:
    """Record states in the model, fit the head to them and write `<output_dir>/<kind>.safetensors`.

    A run takes minutes, so it begins anew each time; what a longer run wrote is kept unless
    `replace` says otherwise.
    """
    file = recipe.output_dir / f"{config.kind}.safetensors"
    with recipe.file.at("output_dir"):
        check_writable(file)
    held = (
        load_head(str(file), cast(Kind, config.kind)).steps if file.exists() and not replace else 0
    )
    if held > config.max_steps:
        raise InputError(
            f"{file} was trained for {held} steps, this run has only {config.max_steps}",
            hint="choose another `output_dir`, or replace it with --fresh",
        )
    checkpoint = _build_checkpoint(recipe.model)
    dataset = _build_data(recipe, checkpoint)
    states = record(checkpoint.model, dataset.examples, _special_ids(checkpoint), config)
    report(f"{len(states['masked'])} states of {len(dataset)} responses")
    digest = weights_digest(checkpoint.model)
    hidden_size = checkpoint.model.config.hidden_size
    save_head(
        fit(states, config, model_digest=digest, hidden_size=hidden_size, report=report), file
    )
    return file


def _special_ids(checkpoint: Checkpoint) -> SpecialIds:
    return SpecialIds(
        checkpoint.mask_token_id,
        checkpoint.eos_token_ids,
        checkpoint.pad_token_id,
        checkpoint.block_length,
    )


@torch.no_grad()
def blend_weights(model: nn.Module, other: Mapping[str, Tensor], share: float) -> None:
    """Replace every weight by (1 - share) of itself + share of `other`'s, router biases included."""
    for name, value in (
        *model.named_parameters(),
        *model.named_buffers(),
    ):  # tied weights come once
        if name in other:  # buffers that follow from the config are in no file
            value.lerp_(other[name].to(value), share)


def _build_checkpoint(section: ModelSection) -> Checkpoint:
    if section.path is not None:
        device, _ = select_device("auto")
        return load_checkpoint(
            section.path,
            dtype=torch.float32,
            device=device,
            block_length=section.block_length,
            attn_implementation=section.attn_implementation,
            experts_implementation=section.experts_implementation,
            add_mask_token=section.add_mask_token,
        )
    tokenizer = build_tokenizer()
    return new_checkpoint(
        _model_config(section.config or {}, tokenizer),
        tokenizer,
        attn_implementation=section.attn_implementation,
        experts_implementation=section.experts_implementation or "eager",
    )


def _model_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a new model for a tokenizer; raises what its class raises."""
    mask = tokenizer.mask_token_id
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    fields = {
        "vocab_size": len(tokenizer),
        "mask_token_id": mask,
        "eos_token_id": eos,
        "pad_token_id": pad,
    } | config
    return CONFIG_MAPPING[fields.pop("model_type", LLaDA2MoeConfig.model_type)](**fields)


def _build_data(recipe: Recipe, checkpoint: Checkpoint) -> ResponseDataset:
    data = recipe.data
    context = checkpoint.model.config.max_position_embeddings
    limit = min(data.max_length or context, context)
    if data.file is not None:
        return ResponseDataset(read_records(data.file), checkpoint.tokenizer, limit)
    drawn = problems(
        data.problems or 0, seed=data.seed, split="train", numbers=Numbers(**data.numbers)
    )
    records = [
        Conversation(
            [{"role": "user", "content": problem.question}],
            problem.response,
            f"word_problems, {number}",
        )
        for number, problem in enumerate(drawn, 1)
    ]
    return ResponseDataset(records, checkpoint.tokenizer, limit)


def _eval_hook(
    section: EvalSection, task: Task, checkpoint: Checkpoint
) -> Callable[[nn.Module], dict[str, float]]:
    params = DecodingParams(**{"max_new_tokens": task.max_new_tokens, **section.decoding})
    llm = LLM.from_checkpoint(checkpoint, max_batch_size=32)

    def hook(_: nn.Module) -> dict[str, float]:
        summary, _samples = evaluate(llm, task, params, limit=section.limit, seed=section.seed)
        return {"accuracy": summary.accuracy, "tpf": summary.tpf}

    return hook
