"""`dmax train --dry-run`: what a recipe takes on so many GPUs, before there is a GPU or a weight.

Each figure says how far it can be trusted. Weights, gradients and optimiser states are exact. What
a step holds besides is counted on the recipe's own objective at full size, where tensors have
shapes and no numbers. Time, traffic and cost are estimates, and rest on the constants beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor
from transformers.training_args import OptimizerNames

from dmax.errors import InputError
from dmax.params import check_number
from dmax.recipe.arguments import make_arguments
from dmax.recipe.disk import num_steps
from dmax.recipe.estimate.advice import advise
from dmax.recipe.estimate.batch import largest_batch, read_examples
from dmax.recipe.estimate.cluster import Cluster, Traffic, step_time
from dmax.recipe.estimate.plan import (
    Plan,
    gathered_bytes,
    replicated_traffic,
    sharded_traffic,
    units,
    unreduced_bytes,
)
from dmax.recipe.estimate.result import Estimate, Part, Run
from dmax.recipe.estimate.shape import ModelShape, checkpoint_layers, gather_in, read_shape
from dmax.recipe.estimate.state import StateBytes, held_weights, state_bytes
from dmax.recipe.estimate.step import StepCount, count_step
from dmax.recipe.sections import Recipe
from dmax.training.config import DMaxConfig
from dmax.training.vocabulary import IGNORE

MOST_EXAMPLES = 10**12


def estimate(recipe: Recipe, cluster: Cluster, *, examples: int | None = None) -> Estimate:
    """What a recipe takes on a cluster; nothing is loaded but settings and tokenizer.

    Args:
        recipe: loaded for another machine (`load_recipe`).
        cluster: the GPUs; each runs one process.
        examples: how many there are to learn from; None: as many as are found here.

    Raises:
        InputError: the recipe trains a head, nothing here says what its model is, or its objective
            cannot be counted.
    """
    if recipe.head is not None:
        raise InputError(
            "a dry run is of a model's training, and this recipe trains a head",
            hint="a head takes what decoding takes, and little more",
        )
    check_number("examples", examples, low=1, high=MOST_EXAMPLES, whole=True, optional=True)
    args = make_arguments(recipe.file, recipe.training, recipe.output_dir, recipe.fsdp)
    plan = Plan.of(recipe, args, cluster.num_gpus)
    shape = read_shape(recipe, on_gpu=plan.on_gpu)
    weights = list(shape.model.parameters())
    held = held_weights(shape.model, plan.num_shards, plan.master)
    state = state_bytes(held, shape.model.buffers(), args)
    learnt = read_examples(recipe.data, args, shape)
    clean = largest_batch(learnt, recipe.data, args, shape)
    counted = _count(shape, clean, args, plan)
    found = Estimate(
        cluster=cluster,
        parameters=sum(weight.numel() for weight in weights),
        learning=sum(weight.numel() for weight in weights if weight.requires_grad),
        batch={
            "sequences": clean["clean_ids"].shape[0],
            "positions": clean["clean_ids"].shape[1],
            "labelled": int((clean["labels"] != IGNORE).sum()),
        },
        batch_is_from=_origin(learnt),
        settings=plan.in_words(args, shape.model, recipe.model.attn_implementation),
        memory=[
            *_state(state, args, plan),
            *_beside(recipe, args, state, plan, shape.model, counted.backward_calls),
            *_of_step(counted),
        ],
        run=_run(
            cluster,
            plan,
            args,
            flops=counted.flops * args.gradient_accumulation_steps,
            traffic=_traffic(plan, args, shape.model, state, counted),
            tokens=clean["clean_ids"].numel() * args.gradient_accumulation_steps,
            examples=examples or (recipe.data.problems if learnt is None else len(learnt)),
        ),
    )
    return found if found.fits else replace(found, advice=advise(found, plan, args))


def _origin(learnt: Sequence[Any] | None) -> str:
    if learnt is None:
        return "the longest that the recipe allows"
    return f"the longest of the {len(learnt):,} examples"


def _count(shape: ModelShape, clean: dict[str, Tensor], args: DMaxConfig, plan: Plan) -> StepCount:
    """A step of a micro-batch, in the dtypes of training."""
    if args.gradient_checkpointing:
        checkpoint_layers(shape.model, args)
    if plan.is_sharded:
        gather_in(shape.model, plan.compute)
    objective = args.objective_class.from_settings(vars(args) | asdict(shape.special_ids))
    return count_step(shape.model, objective, clean, autocast=plan.compute)


def _run(
    cluster: Cluster,
    plan: Plan,
    args: DMaxConfig,
    *,
    flops: int,
    traffic: Traffic,
    tokens: int,
    examples: int | None,
) -> Run:
    """Time of a step, in which a GPU takes so many operations and tokens, and of all steps."""
    return Run(
        flops=flops,
        traffic=traffic,
        step=step_time(cluster, flops, traffic, in_bfloat16=plan.compute is not None),
        steps=num_steps(args, examples, cluster.num_gpus),
        tokens=tokens * cluster.num_gpus,
    )


def _state(state: StateBytes, args: DMaxConfig, plan: Plan) -> list[Part]:
    """What stays in a GPU from step to step."""
    share = f", a share of {plan.num_shards}" if plan.is_sharded else ""
    dtypes = " and ".join(state.weights)
    name = OptimizerNames(args.optim).value
    known = state.optimizer is not None
    return [
        Part("weights", sum(state.weights.values()), "exact", dtypes + share, plan.is_on_host),
        Part("gradients", state.gradients, "exact", "of what learns" + share, plan.is_on_host),
        Part(
            "optimiser",
            state.optimizer,
            "exact" if known else "unknown",
            name + share if known else f"{name} has its own way of packing states",
            plan.is_on_host,
        ),
    ]


def _beside(
    recipe: Recipe, args: DMaxConfig, state: StateBytes, plan: Plan, model: Any, calls: int
) -> list[Part]:
    """What is held beside: for other GPUs, for a second micro-batch, for the end of the run."""
    parts = []
    if recipe.model.keep_start and not plan.is_sharded:
        copied = sum(value.nbytes for value in model.state_dict().values())
        parts.append(Part("start", copied, "exact", "a copy of the weights, for `keep_start`"))
    if plan.shares is not None:
        layers, others = units(model, plan.shares, plan.compute)
        frees = plan.frees_layers
        which = "two layers at a time" if frees else "all layers"
        gathered = gathered_bytes(layers, others, frees_layers=frees)
        waiting = unreduced_bytes(layers, others, calls)
        whose = (
            f"all layers, until each has run backward {calls} times" if calls > 1 else "one layer"
        )
        parts += [
            Part("gathered", gathered, "estimate", f"weights of {which}, and of no layer"),
            Part("unreduced", waiting, "estimate", f"whole gradients of {whose}"),
        ]
        return parts
    if plan.num_gpus > 1:
        parts.append(Part("buckets", state.gradients, "exact", "in which gradients are averaged"))
    if calls > 1 and args.gradient_accumulation_steps > 1:
        parts.append(
            Part(
                "unadded",
                state.gradients,
                "exact",
                f"gradients of a micro-batch, until layers have run backward {calls} times",
            )
        )
    return parts


def _of_step(counted: StepCount) -> list[Part]:
    recomputed = "computed anew in chunks" if not counted.logits else "kept for backward"
    objective = Part("objective", counted.kept, "exact", "its copy of the model's first layers")
    return [
        *([objective] if counted.kept else []),
        Part("activations", counted.activations, "counted", "kept for backward"),
        Part("logits", counted.logits, "counted", recomputed),
        Part("working", counted.working, "counted", "what comes on top at the peak of a step"),
    ]


def _traffic(
    plan: Plan, args: DMaxConfig, model: Any, state: StateBytes, counted: StepCount
) -> Traffic:
    if plan.shares is None:  # once a step, whatever the number of micro-batches
        return replicated_traffic(plan.num_gpus, state.gradients)
    layers, others = units(model, plan.shares, plan.compute)
    calls = counted.layer_calls + counted.backward_calls
    once = sharded_traffic(plan.num_gpus, layers, others, calls, frees_layers=plan.frees_layers)
    micro_batches = args.gradient_accumulation_steps
    return Traffic(once.gathered * micro_batches, once.reduced * micro_batches)
