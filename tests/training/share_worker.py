"""A process of FSDP2 that takes a step and says how many bytes it holds then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Odd(nn.Module):
    """First dimensions that two and three processes cannot share evenly; its layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 4, bias=False))
        self.scale = nn.Parameter(torch.ones(5))
        self.one = nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """A scalar to which every weight contributes."""
        return self.layer(self.layer(x)).sum() * self.scale.sum() * self.one.sum()


def work(rank: int, world_size: int, folder: str) -> None:
    """Shard, take a step, and write what this process holds to `<folder>/<rank>.json`."""
    store = f"file://{folder}/store-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    model: Any = Odd()
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model.layer, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    passes: list[bool] = []  # whether the last weights have their gradient after each backward
    model.layer[0].register_full_backward_hook(
        lambda *_: passes.append(model.layer[1].weight.grad is not None)
    )
    model(torch.ones(3, 4)).backward()
    optimizer.step()
    weights = [weight.to_local() for weight in model.parameters()]
    states = [value for state in optimizer.state.values() for value in state.values()]
    record = {
        "reduced_early": passes[0],
        "weights": sum(weight.nbytes for weight in weights),
        "held": sum(weight.untyped_storage().nbytes() for weight in weights),
        "gradients": sum(weight.grad.to_local().nbytes for weight in model.parameters()),
        "optimiser": sum(getattr(value, "_local_tensor", value).nbytes for value in states),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()
