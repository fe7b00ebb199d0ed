"""`dmax train RECIPE`: one YAML file says what model, what data, what objective, and how to measure it on the way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor, nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from dmax.checkpoint import Checkpoint, load_checkpoint, resolve_block_length, save_checkpoint
from dmax.environment import environment, select_device
from dmax.errors import InputError, did_you_mean
from dmax.evaluation.run import evaluate
from dmax.llm import LLM
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.params import DecodingParams
from dmax.tasks import get_task
from dmax.tasks.word_problems import Numbers, problems
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.data import ResponseDataset, read_records
from dmax.training.trainer import DMaxConfig, DMaxTrainer


@dataclass(frozen=True, slots=True)
class ModelSection:
    """Where the model comes from: `path` of a checkpoint to continue, or `config` for a new one.

    `keep_start` is the share of the weights at `path` in what is saved in the end: a mean of both ends of a run often
    beats either (WiSE-FT, arXiv 2109.01903).
    """

    path: str | None = None
    config: dict[str, Any] | None = None
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
    """A validated recipe; `training` holds the fields of `DMaxConfig`."""

    path: Path
    output_dir: Path
    model: ModelSection
    data: DataSection
    training: dict[str, Any]
    eval: EvalSection | None = None


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` replace fields of its `training` section. Nothing is computed yet.

    Raises:
        InputError: naming file, line and key: not YAML, unknown or missing key, or a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"recipe `{path}` is not a file", hint="see recipes/ for the ones that come with dmax")
    text = path.read_text(encoding="utf-8")
    try:
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML ({error.__class__.__name__})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}:1: a recipe is a mapping with output_dir, model, data and training")
    lines = _key_lines(root)
    _check_keys(path, lines, "", content, {"output_dir", "model", "data", "training", "eval"})
    for key in ("output_dir", "model", "data", "training"):
        if key not in content:
            raise InputError(f"{path}: `{key}` is missing")
    if not isinstance(content["output_dir"], str):
        raise InputError(f"{path}:{lines['output_dir']}: `output_dir` must be a path, got {content['output_dir']!r}")
    sections: dict[str, Any] = {}
    for key, kind in (("model", ModelSection), ("data", DataSection), ("eval", EvalSection)):
        if key != "eval" or content.get(key) is not None:
            _check_keys(path, lines, f"{key}.", content[key], _names(kind))
            _check_types(path, lines, f"{key}.", content[key], kind)
            sections[key] = kind(**content[key])
    _check_keys(path, lines, "training.", content["training"], _names(DMaxConfig) - {"output_dir"})
    _check_types(path, lines, "training.", content["training"], DMaxConfig)
    training = {**content["training"], **(overrides or {})}
    recipe = Recipe(path, Path(content["output_dir"]), training=training, **sections)
    if (recipe.model.path is None) == (recipe.model.config is None):
        raise InputError(f"{path}:{lines['model']}: `model` needs exactly one of `path` and `config`")
    if not 0 <= recipe.model.keep_start <= 1 or (recipe.model.keep_start and recipe.model.path is None):
        raise InputError(
            f"{path}:{lines['model.keep_start']}: `model.keep_start` must be a share between 0 and 1 of the weights "
            f"at `model.path`, got {recipe.model.keep_start}"
        )
    if (recipe.data.file is None) == (recipe.data.problems is None):
        raise InputError(f"{path}:{lines['data']}: `data` needs exactly one of `file` and `problems`")
    _check_keys(path, lines, "model.config.", recipe.model.config or {}, _names(LLaDA2MoeConfig) | {"rope_theta"})
    _check_keys(path, lines, "data.numbers.", recipe.data.numbers, _names(Numbers))
    if recipe.eval is not None:
        _check_keys(path, lines, "eval.decoding.", recipe.eval.decoding, _names(DecodingParams))
        DecodingParams(**recipe.eval.decoding)
    return recipe


def _check_types(path: Path, lines: dict[str, int], prefix: str, section: dict[str, Any], kind: Any) -> None:
    # Fields of plain types only: what transformers converts by itself is left to it. YAML reads 5e-4 as a text.
    hints = get_type_hints(kind)
    for key, value in section.items():
        members = (hints[key],) if get_origin(hints[key]) is dict else get_args(hints[key]) or (hints[key],)
        types = {get_origin(member) or member for member in members}
        if not types <= {int, float, str, bool, dict, type(None)}:
            continue
        allowed = types | ({int} if float in types else set())
        if type(value) not in allowed:
            names = " or ".join(sorted(member.__name__ for member in types - {type(None)}))
            where = f"{path}:{lines.get(f'{prefix}{key}', 1)}"
            raise InputError(f"{where}: `{prefix}{key}` must be {names}, got {value!r}")


def _names(kind: Any) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def _check_keys(path: Path, lines: dict[str, int], prefix: str, section: Any, known: set[str]) -> None:
    if not isinstance(section, dict):
        raise InputError(f"{path}:{lines.get(prefix[:-1], 1)}: `{prefix[:-1]}` must be a mapping")
    for key in section:
        if key not in known:
            where = f"{path}:{lines.get(f'{prefix}{key}', 1)}"
            raise InputError(f"{where}: unknown key `{prefix}{key}`", hint=did_you_mean(str(key), sorted(known)))


def _key_lines(node: Any, prefix: str = "") -> dict[str, int]:
    """1-based line of every key, by dotted path."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            lines |= _key_lines(value, f"{prefix}{key.value}.")
    return lines


def run_recipe(recipe: Recipe, *, resume: bool = True, report: Callable[[str], None] = lambda _: None) -> Path:
    """Train as the recipe says and write the checkpoint to its `output_dir`; returns that folder.

    Intermediate checkpoints go to `<output_dir>-run`; if there are some and `resume` holds, training continues there.
    Data is read and checked before the first step.
    """
    run_dir = recipe.output_dir.with_name(recipe.output_dir.name + "-run")
    try:
        args = DMaxConfig(output_dir=str(run_dir), **recipe.training)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{recipe.path}: `training` is not usable: {str(error).splitlines()[0]}") from error
    set_seed(args.seed)
    checkpoint = _build_checkpoint(recipe.model)
    dataset = _build_data(recipe, checkpoint)
    report(f"{len(dataset)} examples, {sum(p.numel() for p in checkpoint.model.parameters()):,} parameters")
    trainer = DMaxTrainer(
        checkpoint.model,
        args,
        dataset,
        mask_token_id=checkpoint.mask_token_id,
        eos_token_id=checkpoint.eos_token_ids[0],
        block_length=checkpoint.block_length,
        eval_hook=_eval_hook(recipe.eval, checkpoint) if recipe.eval else None,
        processing_class=checkpoint.tokenizer,
    )
    start = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    last = get_last_checkpoint(str(run_dir)) if resume and run_dir.is_dir() else None
    began = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=last)
    blend_weights(checkpoint.model, start, recipe.model.keep_start)
    record = {"recipe": recipe.path.name, "steps": result.global_step, "seconds": round(time.perf_counter() - began)}
    save_checkpoint(
        checkpoint.model,
        checkpoint.tokenizer,
        recipe.output_dir,
        mask_token_id=checkpoint.mask_token_id,
        eos_token_id=checkpoint.eos_token_ids[0],
        block_length=checkpoint.block_length,
        extra=record | {"environment": environment()},
    )
    return recipe.output_dir


@torch.no_grad()
def blend_weights(model: nn.Module, other: Mapping[str, Tensor], share: float) -> None:
    """Replace every weight by (1 - share) of itself + share of `other`'s, router biases included."""
    for name, value in model.state_dict().items():
        value.lerp_(other[name].to(value), share)


def _build_checkpoint(section: ModelSection) -> Checkpoint:
    if section.path is not None:
        device, _ = select_device("auto")
        return load_checkpoint(
            section.path,
            dtype=torch.float32,
            device=device,
            attn_implementation=section.attn_implementation,
            experts_implementation=section.experts_implementation,
        )
    tokenizer = build_tokenizer()
    mask, eos, pad = tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"vocab_size": len(tokenizer), "mask_token_id": mask, "eos_token_id": eos, "pad_token_id": pad}
    config = LLaDA2MoeConfig(**ids, **(section.config or {}))
    config._attn_implementation = section.attn_implementation or "sdpa"
    config._experts_implementation = section.experts_implementation or "eager"
    model = LLaDA2MoeModelLM(config)
    return Checkpoint(model, tokenizer, mask, (eos,), pad, resolve_block_length(config), "")


def _build_data(recipe: Recipe, checkpoint: Checkpoint) -> ResponseDataset:
    data, context = recipe.data, checkpoint.model.config.max_position_embeddings
    limit = min(data.max_length or context, context)
    if data.file is not None:
        return ResponseDataset(read_records(data.file), checkpoint.tokenizer, limit, data.file)
    drawn = problems(data.problems or 0, seed=data.seed, split="train", numbers=Numbers(**data.numbers))
    records = [([{"role": "user", "content": problem.question}], problem.response) for problem in drawn]
    return ResponseDataset(records, checkpoint.tokenizer, limit, "word_problems")


def _eval_hook(section: EvalSection, checkpoint: Checkpoint) -> Callable[[nn.Module], dict[str, float]]:
    task = get_task(section.task)
    params = DecodingParams(**{"max_new_tokens": task.max_new_tokens, **section.decoding})
    llm = LLM.from_checkpoint(checkpoint, max_batch_size=32)

    def hook(_: nn.Module) -> dict[str, float]:
        summary, _samples = evaluate(llm, task, params, limit=section.limit, seed=section.seed)
        return {"accuracy": summary.accuracy, "tpf": summary.tpf}

    return hook
