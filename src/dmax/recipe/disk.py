"""Whether the disk has room for a run, asked before its first step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from dmax.adapters import has_adapters
from dmax.errors import InputError
from dmax.training.config import DMaxConfig

# Values that an optimiser keeps of each weight, in the precision of the weight: AdamW's two are the
# most that any of them needs.
OPTIMISER_STATES = {"sgd": 0, "adafactor": 1, "adagrad": 1, "rmsprop": 1, "lion_32bit": 1}
MOST_STATES = 2
UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Room:
    """What a run writes.

    Attributes:
        checkpoint: bytes of one checkpoint to go on from.
        num_checkpoints: how many of them exist at the same time.
        result: bytes of the trained model.
    """

    checkpoint: int
    num_checkpoints: int
    result: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.checkpoint * self.num_checkpoints + self.result


def room(model: nn.Module, args: DMaxConfig, steps: int, *, merges: bool = False) -> Room:
    """What a run of so many steps writes; a sharded model is counted whole.

    Args:
        model: what is trained. Of a model with adapters, only they are written.
        args: how often checkpoints are written, and how many are kept.
        steps: of the whole run.
        merges: whether adapters are merged into the result, which is a whole model then.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    whole = size([*model.parameters(), *model.buffers()])
    weights = size(trained) if has_adapters(model) else whole
    states = OPTIMISER_STATES.get(OptimizerNames(args.optim).value, MOST_STATES)
    optimiser = 0 if args.save_only_model else states * size(trained)
    written = num_checkpoints(args, steps)
    kept = written if args.save_total_limit is None else args.save_total_limit
    # A new checkpoint is whole before an old one goes.
    return Room(weights + optimiser, min(written, kept + 1), whole if merges else weights)


def num_steps(args: DMaxConfig, num_examples: int | None, num_processes: int) -> int | None:
    """Steps of a whole run, as Trainer counts them; None if nobody knows the amount of data."""
    if args.max_steps > 0:
        return args.max_steps
    if num_examples is None:
        return None
    together = args.per_device_train_batch_size * num_processes
    whole = num_examples // together
    batches = whole if args.dataloader_drop_last else math.ceil(num_examples / together)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def num_checkpoints(args: DMaxConfig, steps: int) -> int:
    """How many checkpoints a run writes in all, at most."""
    match SaveStrategy(args.save_strategy):
        case SaveStrategy.NO:
            return 0
        case SaveStrategy.EPOCH:
            return math.ceil(args.num_train_epochs)
        case SaveStrategy.STEPS:
            every = args.save_steps
        case _:  # whenever an evaluation was the best so far
            every = args.eval_steps or args.logging_steps
    share = steps * every if every < 1 else every  # below 1 it is a share of all steps
    return math.ceil(steps / max(share, 1))


def check_room(needed: Room, output_dir: Path, checkpoints: Iterable[Path]) -> None:
    """Make sure that a run fits on its disk.

    Args:
        needed: what the run writes.
        output_dir: where its result goes; the folder of the run stands beside it.
        checkpoints: folders that the run has written already, which count for it.

    Raises:
        InputError: there is less room; says both numbers.
    """
    held = sum(
        file.stat().st_size
        for folder in checkpoints
        for file in folder.rglob("*")
        if file.is_file()
    )
    place = next(folder for folder in output_dir.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    missing = needed.total - held
    if missing <= free:
        return
    parts = f"a result of {in_words(needed.result)}"
    if needed.num_checkpoints:
        parts = f"{needed.num_checkpoints} checkpoints of {in_words(needed.checkpoint)} and {parts}"
    raise InputError(
        f"the run needs {in_words(missing)} of disk ({parts}), and {place} has "
        f"{in_words(free)} free",
        hint="lower `save_total_limit`, choose an `output_dir` on another disk, or set "
        "`save_only_model`, with which an interrupted run cannot go on",
    )


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those of all their shards."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_words(num_bytes: float) -> str:
    """A number of bytes with three digits and a unit."""
    unit = 0  # of UNITS
    while num_bytes >= 999.5 and unit < len(UNITS) - 1:
        num_bytes /= 1000
        unit += 1
    return f"{num_bytes:.3g} {UNITS[unit]}"
