"""What `test_ranks.py` starts in two processes, through torchrun."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_trainer import CONFIG
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, TrainerCallback

from dmax.checkpoint import new_checkpoint
from dmax.cli import boundary
from dmax.models import LLaDA2MoeConfig
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.config import DMaxConfig
from dmax.training.parallel import ParallelTrainer
from dmax.training.trainer import DMaxTrainer

IDS = {"vocab_size": 64, "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62}
LLAMA = {
    "block_length": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llada2_moe": LLaDA2MoeConfig(**(CONFIG | IDS)),
    "llama": LlamaConfig(**(LLAMA | IDS)),
}
STEPS = 3
MICRO_BATCHES = 4  # of a step, over all ranks
EXAMPLES = 24  # eight of them are a step
# Accelerate shards on the accelerator that torch was built for, and here it has to be none.
THROUGH_ACCELERATE = torch.version.cuda is None and torch.version.hip is None
LAST = "accelerate bfloat16" if THROUGH_ACCELERATE else "fsdp bfloat16"


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, whole, and the share of the weights on this rank."""

    def __init__(self, trainer: DMaxTrainer) -> None:
        self.trainer = trainer
        self.gradients: dict[str, Tensor] = {}
        self.share = 0.0
        self.num_sharded = 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Look at the model of the trainer."""
        if self.gradients:
            return
        named = dict(self.trainer.model.named_parameters())
        self.gradients = {name: whole(parameter.grad) for name, parameter in named.items()}
        self.num_sharded = sum(isinstance(each, DTensor) for each in named.values())
        held = sum(local(each).nbytes for each in named.values())
        self.share = held / sum(each.nbytes for each in named.values())


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def look(model: nn.Module) -> dict[str, float]:
    """What an evaluation is handed: bytes of weights, and buffers that are not float32."""
    return {
        "bytes": float(sum(weight.nbytes for weight in model.parameters())),
        "rounded": float(sum(each.dtype != torch.float32 for each in model.buffers())),
    }


def examples() -> list[dict[str, Any]]:
    """Prompts and responses of several lengths, the same everywhere."""
    generator = torch.Generator().manual_seed(5)

    def draw(length: int) -> list[int]:
        return torch.randint(0, 60, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": draw(3 + k % 7), "response_ids": draw(4 + k % 11), "where": f"example {k}"}
        for k in range(EXAMPLES)
    ]


def train(folder: Path, family: str, *, checkpointing: bool, **settings: Any) -> dict[str, Any]:
    """Losses, gradients of the first step and final weights, and how they were held."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    AcceleratorState._reset_state()  # which holds one precision for all accelerators of a process
    args = DMaxConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES // world,
        gradient_checkpointing=checkpointing,
        learning_rate=0.01,
        warmup_steps=0,
        block_warmup=[[2, 1]],
        max_grad_norm=0.5,
        router_bias_speed=0.01,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    # Other ranks begin with other weights, which must not matter where they are sharded.
    torch.manual_seed(dist.get_rank() if dist.is_initialized() and args.is_sharded else 0)
    checkpoint = new_checkpoint(copy.deepcopy(FAMILIES[family]))
    trainer = DMaxTrainer(
        checkpoint.model,
        args,
        examples(),
        examples()[:8],
        special_ids=checkpoint.special_ids,
        eval_hook=look,
    )
    experts: list[torch.dtype] = []
    for module in trainer.model.modules():
        if "Experts" in type(module).__name__:
            module.register_forward_pre_hook(
                lambda module, _: experts.extend(each.dtype for each in module.parameters())
            )
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    trained = trainer.whole_model()
    if args.is_sharded:
        trainer.save_model(str(folder / "saved"))
    return {
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "held_out": [line for line in trainer.state.log_history if "eval_loss" in line],
        "gradients": watch.gradients,
        "weights": {} if trained is None else trained.state_dict(),
        "share": watch.share,
        "num_sharded": watch.num_sharded,
        "module": type(trainer.model_wrapped).__name__,
        "experts": set(experts),
    }


def through_accelerate(self: ParallelTrainer) -> None:
    """Have accelerate believe that these processes are on GPUs, where it applies FSDP itself."""
    plain_accelerator(self)
    if not self.args.is_sharded:
        return
    state: Any = self.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
    self.is_fsdp_enabled = True


plain_accelerator = ParallelTrainer.create_accelerator_and_postprocess


def compare(folder: Path) -> None:
    """All ways to train in two processes; then whole runs of the recipes in the folder."""
    results = {}
    for family in FAMILIES:
        for checkpointing in (False, True):
            ways: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {"fsdp": True}}
            for way, settings in ways.items():
                name = f"{family} {way} {'recomputed' if checkpointing else 'kept'}"
                results[name] = train(folder, family, checkpointing=checkpointing, **settings)
    in_bfloat16 = {"fsdp": True, "fsdp_config": {"reduce_dtype": "bfloat16"}, "bf16": True}
    results["fsdp bfloat16"] = train(folder, "llada2_moe", checkpointing=True, **in_bfloat16)
    reads = AutoModelForCausalLM.from_pretrained
    if dist.get_rank() != 0:
        AutoModelForCausalLM.from_pretrained = None  # only rank 0 reads weights
    for recipe in sorted(folder.glob("*/recipe.yaml")):
        run_recipe(load_recipe(recipe))
    AutoModelForCausalLM.from_pretrained = reads
    if THROUGH_ACCELERATE:  # last, since it changes the state that all accelerators share
        ParallelTrainer.create_accelerator_and_postprocess = through_accelerate  # type: ignore
        for family in FAMILIES:
            results[f"{family} accelerate"] = train(folder, family, checkpointing=True, fsdp=True)
        results[LAST] = train(folder, "llada2_moe", checkpointing=True, **in_bfloat16)
    torch.save(results, folder / f"rank_{dist.get_rank()}.pt")
    dist.destroy_process_group()


def run_command(folder: Path, misfortune: Callable[[DMaxTrainer], Any]) -> None:
    """`dmax train` on the recipe of a folder, with something that happens in a step of rank 1.

    Each rank takes a second to see why it fails, which is longer than torchrun waits.
    """
    from dmax_command import main

    speaks = boundary._speaks
    boundary._speaks = lambda: time.sleep(1) or speaks()  # type: ignore[func-returns-value]
    loss = DMaxTrainer.compute_loss

    def unlucky(self: DMaxTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        value = loss(self, model, *args, **kwargs)
        if self.args.process_index == 1:
            return value * misfortune(self)
        return value

    DMaxTrainer.compute_loss = unlucky  # type: ignore[method-assign]
    sys.argv = ["dmax", "train", str(folder / "recipe.yaml")]
    main()


def dies(trainer: DMaxTrainer) -> float:
    """kill -9 of this process, in its third step."""
    if trainer.state.global_step == 2:
        (Path(trainer.args.output_dir).parent / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def diverges(trainer: DMaxTrainer) -> float:
    """A loss that is NaN on this rank only, in its third step."""
    return float("nan") if trainer.state.global_step == 2 else 1.0


if __name__ == "__main__":
    kind, place = sys.argv[1], Path(sys.argv[2])
    match kind:
        case "compare":
            compare(place)
        case "dies":
            run_command(place, dies)
        case "diverges":
            run_command(place, diverges)
        case _:
            raise ValueError(json.dumps(sys.argv))
