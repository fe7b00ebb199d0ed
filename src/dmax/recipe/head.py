"""`dmax train` with a recipe that has a `head`: fit a head to states of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from dmax.baselines.head_training import HeadConfig, fit, record
from dmax.baselines.heads import Kind, load_head, save_head, weights_sample
from dmax.environment import select_device, weights_digest
from dmax.errors import InputError
from dmax.files import check_writable
from dmax.recipe.build import build_checkpoint, encode_data, read_data
from dmax.recipe.sections import Recipe


def train_head(
    recipe: Recipe, config: HeadConfig, *, replace: bool, report: Callable[[str], None]
) -> Path:
    """Write `<output_dir>/<kind>.safetensors`, a head that was fitted to states of the model.

    It takes minutes, so it begins anew each time. What a longer run wrote is kept unless `replace`
    says otherwise.
    """
    file = recipe.output_dir / f"{config.kind}.safetensors"
    with recipe.file.at("output_dir"):
        check_writable(file)
    # A file that is to be replaced has to be a head, too.
    held = load_head(str(file), cast(Kind, config.kind)) if file.exists() else None
    if held is not None and held.steps > config.max_steps and not replace:
        raise InputError(
            f"{file} was trained for {held.steps} steps, this run has only {config.max_steps}",
            hint="choose another `output_dir`, or replace it with --fresh",
        )
    conversations = read_data(recipe.data)
    checkpoint = build_checkpoint(recipe.model, select_device("auto"))
    dataset = encode_data(recipe.data, conversations, checkpoint, report=report)
    states = record(checkpoint.model, dataset, checkpoint.special_ids, config)
    report(f"{len(states['masked'])} states of {len(dataset)} responses")
    digest = weights_digest(checkpoint.model)
    hidden_size = checkpoint.model.config.hidden_size
    head = fit(
        states,
        config,
        model_digest=digest,
        hidden_size=hidden_size,
        sample=weights_sample(checkpoint.model.named_parameters()),
        report=report,
    )
    save_head(head, file)
    return file
