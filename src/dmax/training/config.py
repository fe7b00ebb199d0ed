"""`DMaxConfig`: the training arguments, their defaults and their bounds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from dmax import extras
from dmax.checkpoint_files import reading
from dmax.environment import has_bfloat16, select_device
from dmax.errors import InputError, did_you_mean
from dmax.params import check_number
from dmax.records.encoding import check_too_long
from dmax.special_ids import SpecialIds
from dmax.training import get_objective
from dmax.training.block_warmup import check_stages
from dmax.training.objectives import AVERAGES, SEQUENCES
from dmax.training.ranks import num_ranks
from dmax.training.sharding import Sharding

# Bounds of training arguments, transformers' own included; other numbers are at least 0.
_AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("save_total_limit", "pad_to", "max_length", "dataset_num_proc"),
    *("mmd_groups", "mmd_samples", "stage_width_first", "stage_width_last"),
)
_LOWEST = {
    "max_steps": -1,  # as many as the epochs have
    "local_rank": -1,  # of no process group
    **dict.fromkeys(_AT_LEAST_ONE, 1),
}
_ABOVE_ZERO = (
    *("num_train_epochs", "logging_steps", "save_steps", "eval_steps"),
    *("rollout_temperature", "certainty_temperature", "cad_temperature", "mmd_bandwidth"),
)
_HIGHEST = {
    **dict.fromkeys(("mask_ratio_low", "mask_ratio_high", "cad_floor"), 1),
    **dict.fromkeys(("mmd_groups", "mmd_samples"), 64),  # each sample is a forward
    "pad_to": 2**20,
    "dataloader_num_workers": 64,  # processes, each a copy of this one
}
_LARGEST = 2**32 - 1  # seeds of numpy end here
_ANY_IDS = SpecialIds(0, (1,), 1, 32)  # in place of a model's, which is not loaded yet
NEW_NAMES = {  # in transformers 5.24, which warns of the others
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@dataclass
class DMaxConfig(TrainingArguments):
    """Training arguments of transformers, plus what block diffusion needs.

    The defaults are the paper's; docs/paper_index.md has its sentence beside each. A step takes 8
    sequences in one process. On N GPUs, set `gradient_accumulation_steps` to 8 / N.

    Attributes:
        objective: mdlm, uniform, oput, dparallel, d2f, mbd_oput, mmd, cforce, or that of a plugin.
        rollout: of oput: argmax, sample, soft or spd.
        rollout_temperature: of the sampling rollout.
        mask_ratio_low: lowest share of response tokens that are masked.
        mask_ratio_high: highest share; if it equals the lowest, the share is fixed.
        block_warmup: block lengths to begin with, and how many steps each lasts, as
            [[1, 200], [4, 200]]; the model's own follows.
        loss_average: "sequences" is the mean over each sequence's labels, then over sequences,
            micro-batches and processes, as in the published code; "labels" is the mean over all
            labels of a micro-batch.
        certainty_weight: of dparallel's entropy of right predictions.
        certainty_temperature: of the softmax in that entropy.
        mmd_groups: of mmd's samples.
        mmd_samples: of a group.
        mmd_bandwidth: sigma of mmd's kernel; the log has `median_bandwidth` to choose it by.
        mmd_layer: the last layer of mmd's features, counted from 0; None: half-way up.
        cad_weight: of cforce's divergence: confidence, doubt, forward, half or jsd.
        cad_temperature: of the confidence in it.
        cad_floor: lowest probability of its target where it is reverse; 0: none.
        reveal_weight: of cforce's newly shown tokens.
        edited_loss: what edited tokens teach in cforce: cad, ce or both.
        stage_width_first: newly shown tokens from one stage of cforce to the next when training
            begins; None: an eighth of a block.
        stage_width_last: the same when it ends; None: half a block.
        stage_draw: what cforce's stages are drawn from: states or cuts.
        eos_labels: how many trailing EOS are labelled; None: one block of them.
        train_eos_embedding: whether the row of EOS in the input table learns. In the published
            class it gets no gradient, because EOS is also its `padding_idx`.
        pad_to: pad every batch to this length, for static shapes.
        max_length: most tokens of an example with its EOS labels; None: the model's context.
        too_long: what is done about a longer one: error, truncate or skip.
        dataset_num_proc: processes that tokenize; None: as many as pay.
        router_bias_speed: step of loss-free expert balancing; 0: off.
        compile_objective: compile the loss with torch.compile, which wants a C++ compiler.
        warmup_steps: below 1, a share of all steps.
        bf16: compute in bfloat16 over float32 weights; "auto": wherever the hardware has it; None:
            on a GPU that has it, never on a CPU.
        gradient_checkpointing: recompute activations in backward; None: yes.
        model_init_kwargs: arguments of `load_checkpoint` for a model that is given by its name.
        fsdp: shard the model over the processes; in one process it changes checkpoints only.
        fsdp_config: the fields of a `Sharding`.
        objective_class: what `objective` and `rollout` name; not an argument.
        sharding: what `fsdp_config` says, or None without `fsdp`; not an argument.
        is_sharded: whether each process holds a part of the model; not an argument.
        compute_dtype: of a sharded model; None is that of its weights; not an argument.
    """

    objective: str = "oput"
    rollout: str = "argmax"
    rollout_temperature: float = 1.0
    mask_ratio_low: float = 0.75
    mask_ratio_high: float = 0.75
    block_warmup: list[list[int]] | None = None
    loss_average: str = SEQUENCES
    certainty_weight: float = 2.0
    certainty_temperature: float = 0.5
    mmd_groups: int = 8
    mmd_samples: int = 2
    mmd_bandwidth: float = 10.0
    mmd_layer: int | None = None
    cad_weight: str = "confidence"
    cad_temperature: float = 1.0
    cad_floor: float = 1e-6
    reveal_weight: float = 1.0
    edited_loss: str = "cad"
    stage_width_first: int | None = None
    stage_width_last: int | None = None
    stage_draw: str = "states"
    eos_labels: int | None = None
    train_eos_embedding: bool = False
    pad_to: int | None = None
    max_length: int | None = 2048
    too_long: str = "error"
    dataset_num_proc: int | None = None
    router_bias_speed: float = 0.0
    compile_objective: bool = False
    model_init_kwargs: dict[str, Any] | None = None

    num_train_epochs: float = 2
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    learning_rate: float = 2e-6
    lr_scheduler_type: Any = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.01
    bf16: bool | str | None = None
    gradient_checkpointing: bool | None = None
    ddp_find_unused_parameters: bool | None = False  # every loss needs all of them
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` naming the field that is wrong."""
        extras.require("accelerate", "train", "training a model")
        self._check_numbers()
        self.bf16 = self._in_bfloat16(self.bf16)
        self.gradient_checkpointing = self.gradient_checkpointing is not False
        for name, new_name in NEW_NAMES.items():
            if hasattr(self, new_name) and getattr(self, new_name) is None:
                setattr(self, new_name, getattr(self, name))
        theirs: Any = self  # whose fields have no types of their own
        self.sharding = Sharding.from_config(theirs.fsdp_config) if theirs.fsdp else None
        theirs.fsdp_config = self.sharding and asdict(self.sharding)  # transformers writes into it
        if self.sharding is not None and self.sharding.cpu_offload and num_ranks() > 1:
            # What `accelerate launch` sets: gradients on CPUs are added up through gloo then.
            os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true")
        with reading("these training arguments are not usable"), _without_advice():
            super().__post_init__()
        self.compute_dtype = torch.bfloat16 if self.bf16 else None
        # Each process takes its own batches of a stream: those that one would hand out are padded
        # to one length.
        self.accelerator_config.dispatch_batches = False
        self.is_sharded = False
        if self.sharding is not None:
            self._shard(self.sharding)
        self.objective_class = get_objective(self.objective, self.rollout)
        self.objective_class.from_settings(vars(self) | asdict(_ANY_IDS))  # checks its own settings
        check_too_long(self.too_long)
        check_stages(self.block_warmup or [])
        if self.block_warmup and self.compile_objective:  # a length that changes is compiled wrong
            raise InputError("`compile_objective` does not go with `block_warmup`")
        if self.loss_average not in AVERAGES:
            raise InputError(
                f"`loss_average` must be one of {', '.join(AVERAGES)}, got {self.loss_average!r}",
                hint=did_you_mean(str(self.loss_average), AVERAGES),
            )
        if self.mask_ratio_low > self.mask_ratio_high:
            raise InputError(
                "mask ratios must satisfy 0 <= low <= high <= 1, "
                f"got {self.mask_ratio_low} and {self.mask_ratio_high}"
            )

    def _in_bfloat16(self, asked: bool | str | None) -> bool:
        """Whether to compute in bfloat16; sets `use_cpu` where a CPU does."""
        if isinstance(asked, bool):
            return asked
        if asked not in (None, "auto"):
            raise InputError(f"`bf16` must be true, false or auto, got {asked!r}")
        device = select_device("cpu" if self.use_cpu else "auto")
        on_cpu = device.type == "cpu"
        in_bfloat16 = not self.fp16 and (asked == "auto" or not on_cpu) and has_bfloat16(device)
        # transformers refuses it on a CPU that was not asked for.
        self.use_cpu |= in_bfloat16 and on_cpu
        return in_bfloat16

    def _shard(self, sharding: Sharding) -> None:
        """What transformers and accelerate have no argument for."""
        if self.fp16:
            raise InputError("`fp16` does not go with `fsdp`", hint="use `bf16`")
        if self.save_only_model:  # of a sharded model, both are in the same files
            raise InputError("`save_only_model` does not go with `fsdp`", hint="leave it out")
        # Otherwise every GPU would hold the gradients of the whole model between micro-batches.
        self.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
        self.is_sharded = self.parallel_mode == ParallelMode.DISTRIBUTED
        theirs: Any = self
        if self.is_sharded:
            theirs.fsdp_plugin_args |= {
                "mixed_precision_policy": sharding.precision(self.compute_dtype),
                "state_dict_type": "SHARDED_STATE_DICT",
            }
        else:  # Trainer refuses it in one process
            theirs.fsdp = theirs.fsdp_plugin_args = None

    def _check_numbers(self) -> None:
        """All fields that are numbers, before transformers compares or converts them."""
        hints = get_type_hints(type(self))
        for entry in fields(self):
            kinds = set(get_args(hints[entry.name])) or {hints[entry.name]}
            if not kinds <= {int, float, type(None)}:
                continue
            check_number(
                entry.name,
                getattr(self, entry.name),
                low=_LOWEST.get(entry.name, 0),
                high=_HIGHEST.get(entry.name, _LARGEST),
                above_low=entry.name in _ABOVE_ZERO,
                whole=float not in kinds,
                optional=type(None) in kinds,
            )
        if self.max_steps == 0:
            raise InputError("`max_steps` must be at least 1, or -1 to train by epochs, got 0")

    @property
    def precision(self) -> str:
        """The dtype of products over float32 weights."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def n_gpu(self) -> int:
        """How many GPUs training uses: one, or none.

        Trainer would take all GPUs it sees and wrap the model in `DataParallel`, which hides the
        methods that the objectives call.
        """
        return min(1, super().n_gpu)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Leave out what transformers says of recomputing under FSDP; it is not so with version 2.

    There the layers are gathered once for their backward, which includes computing them anew.
    """
    log = logging.getLogger("transformers.training_args")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
