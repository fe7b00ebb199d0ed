"""A model sharded over ranks (FSDP2): weights, gradients and optimiser states in equal parts.

On GPUs accelerate shards, as transformers' Trainer asks it to. It passes over processes that run on
a CPU, so `shard` does there what it would do. Filling, saving and gathering are the same for both.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dmax.errors import InputError, did_you_mean, show
from dmax.training.ranks import rank

SHARDS = "shards"
"""The folder of a checkpoint that holds weights and optimiser states as torch writes them."""
NOT_AN_INDEX: tuple[type[Exception], ...] = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError, TypeError, ValueError),
    *(MemoryError, OSError, pickle.UnpicklingError),
)
"""What reading a damaged index raises."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Sharding:
    """What the section `fsdp` of a recipe says, and `fsdp_config` in Python.

    Attributes:
        reduce_dtype: in which gradients travel and are added up, float32 or bfloat16.
        reshard_after_forward: free the weights of a layer after its forward and gather them once
            more for its backward; without it every GPU holds the whole model during a step.
        cpu_offload: keep weights, gradients and optimiser states in the memory of the CPU.
    """

    reduce_dtype: str = "float32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.reduce_dtype not in DTYPES:
            raise InputError(
                f"`reduce_dtype` must be one of {', '.join(DTYPES)}, got {show(self.reduce_dtype)}"
            )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read what transformers calls `fsdp_config`.

        Raises:
            InputError: a key that is none of ours, or a value that does not fit.
        """
        if not isinstance(config, Mapping | None):
            raise InputError(f"`fsdp_config` must be a mapping, got {show(config)}")
        settings = dict(config or {})
        if settings.pop("version", 2) != 2:
            raise InputError("`fsdp_config` may only ask for version 2", hint="leave it out")
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise InputError(
                    f"unknown key `{key}` of `fsdp_config`",
                    did_you_mean(key, known) or f"it may have {', '.join(known)}",
                )
        return cls(**settings)

    def precision(self, compute: torch.dtype | None) -> MixedPrecisionPolicy:
        """Weights stay as they are, and are computed with in `compute` if that is not None."""
        return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=DTYPES[self.reduce_dtype])


def start_device(of_rank: int) -> torch.device:
    """Where a rank has the model before it is sharded: rank 0 hands out the weights of all."""
    return torch.device("cpu" if of_rank == 0 else "meta")


def layer_classes(network: PreTrainedModel) -> list[str]:
    """Names of the classes whose modules are gathered as a whole, one at a time."""
    present = {type(module).__name__ for module in network.modules()}
    return [name for name in network._no_split_modules or () if name in present]


def shard(
    module: nn.Module, layers: list[str], sharding: Sharding, compute: torch.dtype | None
) -> None:
    """Shard a module over all ranks, on the CPU; its parameters become DTensors.

    Args:
        module: its forward has to be the whole computation.
        layers: names of classes whose modules are gathered as a whole, one at a time.
        sharding: how.
        compute: dtype to compute in; None computes in that of the weights.
    """
    settings: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": sharding.precision(compute),
    }
    for layer in module.modules():
        if type(layer).__name__ in layers:
            fully_shard(layer, reshard_after_forward=sharding.reshard_after_forward, **settings)
    fully_shard(module, **settings)  # all that is in no layer: embedding, last norm, head


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module lie on several ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which is all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(network: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Give a sharded network the weights of rank 0.

    Args:
        network: its parameters are DTensors.
        whole: on rank 0, all parameters by name, on any device; other ranks hand in nothing.
    """
    for name, parameter in network.named_parameters():  # tied ones come once
        assert isinstance(parameter, DTensor)
        mesh = parameter.device_mesh
        if rank() == 0:
            value = whole[name].to(mesh.device_type, parameter.dtype)
        else:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device_type)
        scattered = distribute_tensor(value, mesh, parameter.placements)
        parameter.to_local().copy_(scattered.to_local())


@torch.no_grad()
def fill_buffers(network: nn.Module) -> None:
    """Give the buffers of all ranks, which are never sharded, the values of rank 0."""
    for buffer in network.buffers():
        dist.broadcast(buffer, src=0)


def whole_copy(network: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of a sharded network that is whole, in the memory of rank 0; None on other ranks.

    All ranks have to call it: each hands in its share.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(network, options=options)
    if rank() != 0:
        return None
    with torch.device("meta"):
        copy = type(network)(network.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    for name, buffer in network.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(copy.get_submodule(owner), last, buffer.detach().cpu().clone())
    return copy.eval()


def save_sharded(folder: Path, network: nn.Module, optimizer: Optimizer) -> None:
    """Write weights and optimiser states; every rank writes what it holds, into one folder.

    `load_sharded` reads them with any number of ranks. The index of the folder is written last.
    """
    model, states = get_state_dict(network, optimizer)
    state = {"model": model, "optimizer": states}
    try:
        with _quietly_alone():
            save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # every rank hears of it, and it is no `Exception`
        reason, _trace = next(iter(error.failures.values()))
        raise reason from None


def load_sharded(folder: Path, network: nn.Module, optimizer: Optimizer) -> None:
    """Read what `save_sharded` has written, into a network that is sharded or not."""
    model, states = get_state_dict(network, optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": states}
    with _quietly_alone():
        load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(
        network, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def are_whole(folder: Path) -> bool:
    """Whether the files of `save_sharded` are there in full; they are not read for it."""
    try:
        index = FileSystemReader(folder).read_metadata()
        ends = [
            (each.relative_path, each.offset + each.length) for each in index.storage_data.values()
        ]
        return all((folder / name).stat().st_size >= end for name, end in ends)
    except NOT_AN_INDEX:
        return False


def load_weights(folder: Path, network: nn.Module) -> None:
    """Read the weights of `save_sharded` into a network that is whole, in this process alone."""
    with _quietly_alone():
        load({"model": network.state_dict()}, checkpoint_id=folder, no_dist=True)


@contextmanager
def _quietly_alone() -> Iterator[None]:
    """Without torch's warning that there is one process only, and that files are written anew."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "Detected an existing checkpoint", UserWarning)
        yield
