"""What a recipe says: its sections, read from YAML and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dmax import models
from dmax.adapters import base_name
from dmax.checkpoint import new_checkpoint
from dmax.decoding import check_strategy
from dmax.environment import DTYPES, total_memory
from dmax.errors import InputError, did_you_mean, show
from dmax.models import LLaDA2MoeConfig
from dmax.params import AUTO, LARGEST_SEED, MOST_PROBLEMS, DecodingParams, check_number
from dmax.recipe.arguments import DECODED, HELD_OUT, argument_names, check_arguments
from dmax.recipe.file import RecipeFile, read_recipe_file
from dmax.recipe.lora import LoraSection
from dmax.recipe.places import check_places
from dmax.records.encoding import check_too_long
from dmax.records.readers import get_reader
from dmax.records.sources import Source
from dmax.tasks.word_problems import Numbers
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training import get_objective
from dmax.training.config import DMaxConfig
from dmax.training.sharding import Sharding

if TYPE_CHECKING:
    from dmax.baselines.head_training import HeadConfig


_SECTIONS = ("output_dir", "model", "data", "training", "fsdp", "lora", "head", "eval")
LONGEST = 2**24  # positions of a sequence
LONGEST_BLOCK = 2**12
MOST_PROCESSES = 1024
BELONGING = {  # keys of `data`, and those of which one has to be there, too
    **dict.fromkeys(("config", "split", "reader", "columns"), ("file", "hub")),
    "revision": ("hub",),
    "numbers": ("problems",),
}
SIZES = {  # of a new model, and how large they may be for it to be made at all
    "num_hidden_layers": 1_000,
    "num_experts": 4_096,
    "block_length": LONGEST_BLOCK,
    **dict.fromkeys(("hidden_size", "vocab_size", "intermediate_size"), 2**32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**32),
}
WHOLE = {  # the least and the largest of whole numbers, by section
    "data": {
        "problems": (1, MOST_PROBLEMS),
        "seed": (0, LARGEST_SEED),
        "max_length": (1, LONGEST),
        "num_proc": (1, MOST_PROCESSES),
    },
    "eval": {"limit": (1, MOST_PROBLEMS), "seed": (0, LARGEST_SEED)},
}
WEIGHT_DTYPES = ("float32", "bfloat16", "auto")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """Where the model comes from.

    Attributes:
        path: of a checkpoint to continue.
        config: of a new model, in place of `path`: the fields of its `model_type`'s configuration,
            llada2_moe or a dense decoder such as llama.
        dtype: of the weights that are trained: float32, whatever dtype their products have (`bf16`
            of `training`); bfloat16, half the memory under adapters, but too coarse for the small
            steps of a full training; or auto, which the files at `path` have.
        add_mask_token: makes an autoregressive checkpoint at `path` a block-diffusion model.
        block_length: of a checkpoint at `path` that names none, or another one.
        shift: whether a token is predicted by the position before it, of a checkpoint at `path`
            that does not say, or the other way; a converted autoregressive model begins so.
        keep_start: share of the weights at `path` in what is saved in the end. A mean of both ends
            of a run often beats either (WiSE-FT, arXiv 2109.01903).
        attn_implementation: of transformers' attention interface; None is `flex_attention` on a
            GPU, and transformers' choice elsewhere.
        experts_implementation: of transformers' experts interface; None chooses.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = "float32"
    add_mask_token: bool = False
    block_length: int | None = None
    shift: bool | None = None
    keep_start: float = 0.0
    attn_implementation: str | None = None
    experts_implementation: str | None = None


@dataclass(frozen=True, slots=True)
class DataSection:
    """What the model learns: records of a file or the hub, or problems of the bundled generator.

    Attributes:
        file: JSONL, JSON or parquet with prompts and responses, or a folder of them.
        hub: id of a data set on the hub, in place of `file`.
        problems: how many problems to draw, in place of `file`.
        config: of a data set that has several.
        split: which part of a data set.
        revision: of a data set on the hub.
        reader: what the columns are, by the name of a reader; None recognises them.
        columns: names of the columns of `prompt` and `response`, in place of `reader`.
        eval_file: held-out records, for the loss of every evaluation.
        numbers: fields of `word_problems.Numbers`.
        seed: of the problems, and of the order of a stream.
        max_length: most tokens of an example with its EOS labels; None is the model's context.
        too_long: what is done about a longer one: error, truncate or skip.
        end_turn: whether the chat template's ending of a turn is learnt before EOS.
        streaming: read while training, and keep nothing on the disk.
        num_proc: processes that read and tokenize; None: as many as pay.
    """

    file: str | None = None
    hub: str | None = None
    problems: int | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    reader: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    eval_file: str | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    max_length: int | None = None
    too_long: str = "error"
    end_turn: bool = True
    streaming: bool = False
    num_proc: int | None = None

    def source(self) -> Source:
        """Where the records lie; there are some unless problems are drawn."""
        name = self.file or self.hub or ""
        return Source(name, self.file is None, self.config, self.split, self.revision)


@dataclass(frozen=True, slots=True)
class EvalSection:
    """Held-out problems that are decoded at every evaluation.

    Attributes:
        task: what to solve.
        limit: how many examples.
        seed: of the examples.
        decoding: fields of `DecodingParams`.
    """

    task: str = "word_problems"
    limit: int = 100
    seed: int = 1
    decoding: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that has been checked: it trains a model, or a head of a model.

    Attributes:
        file: what it was read from.
        output_dir: where the result goes.
        model: where the model comes from.
        data: what it learns.
        training: fields of `DMaxConfig`; empty for a head.
        fsdp: how the model is sharded over processes; None for a model that each one has whole.
        lora: which adapters learn; None for the model itself.
        head: how to train a head; None for a model.
        eval: what to decode on the way; None for nothing.
    """

    file: RecipeFile
    output_dir: Path
    model: ModelSection
    data: DataSection
    training: dict[str, Any] = field(default_factory=dict)
    fsdp: Sharding | None = None
    lora: LoraSection | None = None
    head: HeadConfig | None = None
    eval: EvalSection | None = None


def load_recipe(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, elsewhere: bool = False
) -> Recipe:
    """Read and check a recipe; nothing is computed yet.

    Args:
        path: of the YAML file.
        overrides: replace fields of its `training`, or of its `head`.
        elsewhere: it will run on another machine, so this one's memory may be too small for it.

    Raises:
        InputError: naming file, line and key: not YAML, unknown or missing key, or a value of the
            wrong kind.
    """
    file = read_recipe_file(Path(path))
    content = file.content
    file.check_keys("", content, set(_SECTIONS))
    trains_head = "head" in content
    for key in ("output_dir", "model", "data", "head" if trains_head else "training"):
        if key not in content:
            raise InputError(f"{path}: `{key}` is missing")
    beside = content.keys() & {"training", "eval", "fsdp", "lora"}
    if trains_head and beside:
        key = min(beside)
        raise file.wrong(key, f"a recipe with `head` has no `{key}`: only a head is trained")

    sections: dict[str, Any] = {
        "output_dir": _output_dir(file),
        "model": ModelSection(**_fields(file, "model", ModelSection)),
        "data": DataSection(**_fields(file, "data", DataSection)),
    }
    if content.get("eval") is not None:
        sections["eval"] = EvalSection(**_fields(file, "eval", EvalSection))
    for name, kind in {"fsdp": Sharding, "lora": LoraSection}.items():
        if name in content:
            given = _fields(file, name, kind)
            with file.at(name):
                sections[name] = kind(**given)
    changes = dict(overrides or {})
    if trains_head:
        from dmax.baselines.head_training import HeadConfig

        fields = _fields(file, "head", HeadConfig) | changes
        with file.at("head"):
            sections["head"] = HeadConfig(**fields)
    else:
        sections["training"] = _fields(file, "training", DMaxConfig, argument_names()) | changes

    recipe = Recipe(file, **sections)
    _check_model(recipe, elsewhere=elsewhere)
    _check_lora(recipe)
    _check_data(recipe)
    _check_eval(recipe)
    if recipe.head is None:
        measured = [*(DECODED if recipe.eval else ()), *(HELD_OUT if recipe.data.eval_file else ())]
        check_arguments(file, recipe.training, recipe.fsdp, measured=measured)
    return recipe


def model_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a new model for a tokenizer; raises what its class raises."""
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | config
    model_type = fields.pop("model_type", LLaDA2MoeConfig.model_type)
    return CONFIG_MAPPING[model_type](**fields)


def _output_dir(file: RecipeFile) -> Path:
    name = file.content["output_dir"]
    if not isinstance(name, str) or Path(name).name in ("", ".."):
        raise file.wrong(
            "output_dir", f"`output_dir` must be the path of a folder, got {show(name)}"
        )
    return Path(os.path.expanduser(name))


def _fields(
    file: RecipeFile, section: str, kind: type, known: set[str] | None = None
) -> dict[str, Any]:
    """What a section says, its keys and types checked against the fields of a dataclass."""
    content = file.content[section]
    file.check_keys(section, content, _names(kind) if known is None else known)
    file.check_types(section, content, kind)
    return dict(content)


def _check_model(recipe: Recipe, *, elsewhere: bool) -> None:
    file = recipe.file
    model = recipe.model
    if (model.path is None) == (model.config is None):
        raise file.wrong("model", "`model` needs exactly one of `path` and `config`")
    of_a_path = (model.add_mask_token, model.block_length, model.shift)
    if model.path is None and any(value not in (None, False) for value in of_a_path):
        raise file.wrong(
            "model",
            "`add_mask_token`, `block_length` and `shift` of `model` belong to a `path`",
            hint="a new model's block length and shift are fields of its `config`",
        )
    _check_dtype(recipe)
    with file.at("model.block_length"):
        check_number(
            "block_length", model.block_length, low=1, high=LONGEST_BLOCK, whole=True, optional=True
        )
    if recipe.head is None:  # which is one file, written beside whatever its folder holds
        data = {"data.file": recipe.data.file, "data.eval_file": recipe.data.eval_file}
        check_places(file, recipe.output_dir, {"model.path": model.path, **data})
    if recipe.head is not None and model.path is None:
        raise file.wrong("model", "a head belongs to a trained model, so `model` needs a `path`")
    has_start = model.path is not None and recipe.head is None
    if not 0 <= model.keep_start <= 1 or (model.keep_start and not has_start):
        raise file.wrong(
            "model.keep_start",
            "`model.keep_start` must be a share between 0 and 1 of the weights at `model.path`, "
            f"got {model.keep_start}",
        )
    if model.config is not None:
        made = _check_config(file, model, model.config)
        if not elsewhere:
            _check_memory(file, made)


def _check_lora(recipe: Recipe) -> None:
    if recipe.lora is None:
        return
    file = recipe.file
    if recipe.model.path is None:
        raise file.wrong("lora", "adapters need a model to adapt, so `model` needs a `path`")
    with file.at("model.path"):
        base_name(recipe.model.path)
    for key, is_given in (
        ("model.keep_start", recipe.model.keep_start),
        ("training.router_bias_speed", recipe.training.get("router_bias_speed")),
        ("fsdp", recipe.fsdp),
    ):
        if is_given:
            raise file.wrong(key, f"`{key}` and `lora` do not go together", hint="leave one out")


def _check_dtype(recipe: Recipe) -> None:
    dtype = recipe.model.dtype
    if dtype not in WEIGHT_DTYPES:
        raise recipe.file.wrong(
            "model.dtype",
            f"`model.dtype` must be one of {', '.join(WEIGHT_DTYPES)}, got {show(dtype)}",
            did_you_mean(dtype, WEIGHT_DTYPES),
        )
    if dtype == "auto" and recipe.model.path is None:
        raise recipe.file.wrong("model.dtype", "a new model has no files whose dtype it could take")
    if dtype != "float32" and recipe.head is not None:
        raise recipe.file.wrong("model.dtype", "a head is trained on states in float32")


def _check_config(
    file: RecipeFile, section: ModelSection, config: dict[str, Any]
) -> PreTrainedModel:
    """Try to make the configuration, and then a model of it that takes no memory."""
    models.register()
    model_type = config.get("model_type", LLaDA2MoeConfig.model_type)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), list(CONFIG_MAPPING))
        raise file.wrong("model.config.model_type", f"unknown model type {show(model_type)}", hint)
    own = {"model_type", "rope_theta", "block_length", "shift"}
    known = _names(CONFIG_MAPPING[model_type]) | own
    file.check_keys("model.config", config, known)
    tokenizer = build_tokenizer()
    with file.trying("model.config", config):
        made = model_config(config, tokenizer)
        for name, most in SIZES.items():
            size = getattr(made, name, None)
            check_number(name, size, low=1, high=most, whole=True, optional=True)
        for name, value in made.to_dict().items():
            if re.search("drop(out)?$|^initializer_range$", name):
                check_number(name, value, low=0, high=1, optional=True)
        with torch.device("meta"):  # the whole model but for its weights
            return new_checkpoint(
                made,
                tokenizer,
                dtype=DTYPES[section.dtype],
                attn_implementation=section.attn_implementation,
                experts_implementation=section.experts_implementation,
            ).model


def _check_memory(file: RecipeFile, model: PreTrainedModel) -> None:
    memory = total_memory("cpu")
    if memory is not None and sum(weight.nbytes for weight in model.parameters()) > memory:
        num_weights = sum(weight.numel() for weight in model.parameters())
        dtype = str(model.dtype).removeprefix("torch.")
        raise file.wrong(
            "model.config",
            f"the model would have {num_weights:,} weights in {dtype}, more than fit into "
            f"{memory / 2**30:.0f} GiB of memory",
        )


def _check_data(recipe: Recipe) -> None:
    file = recipe.file
    data = recipe.data
    if sum(each is not None for each in (data.file, data.hub, data.problems)) != 1:
        raise file.wrong("data", "`data` needs exactly one of `file`, `hub` and `problems`")
    for key, owners in BELONGING.items():
        if key in file.content["data"] and all(getattr(data, each) is None for each in owners):
            names = " or ".join(f"`data.{owner}`" for owner in owners)
            raise file.wrong(f"data.{key}", f"`data.{key}` belongs to {names}")
    with file.at("data.columns" if data.columns else "data.reader"):
        get_reader(data.reader, data.columns)
    with file.at("data.too_long"):
        check_too_long(data.too_long)
    if data.streaming and recipe.training.get("max_steps", -1) == -1:
        raise file.wrong(
            "data.streaming",
            "`data.streaming` needs `training.max_steps`: nobody knows how long a stream is",
        )
    file.check_keys("data.numbers", data.numbers, _names(Numbers))
    file.check_types("data.numbers", data.numbers, Numbers)
    with file.at("data.numbers"):
        Numbers(**data.numbers)
    _check_whole(file, "data", data)


def _check_eval(recipe: Recipe) -> None:
    if recipe.eval is None:
        return
    file = recipe.file
    _check_whole(file, "eval", recipe.eval)
    file.check_keys("eval.decoding", recipe.eval.decoding, _names(DecodingParams))
    with file.at("training"):
        objective = get_objective(
            recipe.training.get("objective", DMaxConfig.objective),
            recipe.training.get("rollout", DMaxConfig.rollout),
        )
    with file.at("eval.decoding"):
        params = DecodingParams(**recipe.eval.decoding)
        if params.strategy == AUTO and objective.decoding is not None:
            params = replace(params, strategy=objective.decoding)
        if params.strategy != AUTO:
            check_strategy(params)


def _check_whole(file: RecipeFile, section: str, values: object) -> None:
    for name, (low, high) in WHOLE[section].items():
        with file.at(f"{section}.{name}"):
            check_number(name, getattr(values, name), low=low, high=high, whole=True, optional=True)


def _names(kind: Any) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}
