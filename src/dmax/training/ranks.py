"""Processes that train one model together: what each of them has to know of the others.

Torchrun starts them, and transformers makes the process group. Without one there is one rank.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Found = TypeVar("Found")
PATIENCE = timedelta(seconds=5)


def num_ranks() -> int:
    """How many processes torchrun has started, whether or not they have found each other yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process; rank 0 writes the files and speaks for all."""
    return int(os.environ.get("RANK", 0))


def speaks_first() -> bool:
    """Whether no other rank has said yet why the training ends; the first one speaks for all.

    A rank that ends takes the others with it, and their errors say nothing of the reason.
    """
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = dist.TCPStore(*address, timeout=PATIENCE)  # type: ignore[attr-defined]
        return int(store.add(f"dmax/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1)) == 1
    except (dist.DistError, KeyError, ValueError):  # there is no store, or not any more
        return rank() == 0


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def from_rank_zero(value: Any) -> Any:
    """What rank 0 has, on every rank; others may hand in anything."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_found(found: Found | None, device: torch.device) -> Found | None:
    """What the lowest rank has found that found something, on every rank; None if no rank did.

    Ranks that look at data or weights of their own decide with it together whether to go on.
    """
    if not dist.is_initialized():
        return found
    any_found = torch.tensor(found is not None, dtype=torch.int32, device=device)
    dist.all_reduce(any_found, dist.ReduceOp.MAX)
    if not any_found:
        return None
    every: list[Found | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return next(each for each in every if each is not None)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor of any shape over all ranks, in its place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
