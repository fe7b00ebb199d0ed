"""What to change about a recipe that does not fit into its GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmax.recipe.estimate.plan import Plan
    from dmax.recipe.estimate.result import Estimate
    from dmax.training.config import DMaxConfig

WHOLE = ("gathered", "unreduced")
STEP = ("activations", "logits", "working")


def advise(found: Estimate, plan: Plan, args: DMaxConfig) -> str:
    """The change that takes away most of what is too much, as the end of a sentence."""
    sizes = {part.name: part.bytes or 0 for part in found.memory if not part.on_host}
    whole = sum(sizes.get(name, 0) for name in WHOLE)
    of_step = sum(sizes[name] for name in STEP)
    of_state = found.peak - whole - of_step
    most = max(whole, of_step, of_state)
    if most == of_step:
        return _smaller_step(found, args)
    if most == whole:
        return (
            "take GPUs with more memory, or train adapters (a section `lora`): layers and their "
            "gradients are whole for a while, however many GPUs share them"
        )
    return _smaller_state(found, plan)


def _smaller_step(found: Estimate, args: DMaxConfig) -> str:
    if not args.gradient_checkpointing:
        return "set `gradient_checkpointing: true`"
    if found.batch["sequences"] > 1:
        return (
            f"lower `per_device_train_batch_size` from {found.batch['sequences']}, and raise "
            "`gradient_accumulation_steps` to the same effect"
        )
    return f"lower `max_length` of `data`: {found.batch['positions']:,} positions are too many"


def _smaller_state(found: Estimate, plan: Plan) -> str:
    if plan.is_sharded:
        return f"take more than {plan.num_gpus} GPUs, or set `cpu_offload: true` in `fsdp`"
    if plan.num_gpus > 1 and found.learning == found.parameters:
        return f"add a section `fsdp` to the recipe, so that {plan.num_gpus} GPUs share the model"
    if found.learning == found.parameters:
        return (
            "train adapters (a section `lora`, and `dtype: bfloat16` in `model`), or share the "
            "model among several GPUs (a section `fsdp`, and --gpus)"
        )
    return "set `dtype: bfloat16` in `model`, or take a GPU with more memory"
