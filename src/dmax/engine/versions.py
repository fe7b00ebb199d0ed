"""Several versions of one block at once (LoPA): choose the best of a forward, and put the next ones beside it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dmax.decoding.block import Advance, Branching, Decision, Output, State, View

if TYPE_CHECKING:
    from dmax.engine.lane import Lane


def choose(
    lane: Lane, versions: int, view: View, output: Output, state: State
) -> tuple[View, Output, State]:
    """Of the `versions` of each block the best one, as the only row."""
    best = cast(Branching, lane.strategy).choose(view, output)
    index = torch.arange(len(best), device=best.device) * versions + best
    return (
        _pick(view, index),
        output.rows(index),
        {name: value[index] for name, value in state.items()},
    )


def branch(lane: Lane, rows: Tensor, decision: Decision, result: Advance, output: Output) -> None:
    """Put the further versions of the blocks in `rows` [B] into the rows behind them."""
    further = cast(Branching, lane.strategy).branch(result.masked, output)  # [B, R - 1, L]
    for version in range(1, lane.num_branches):
        write = further[:, version - 1] & result.masked
        place = rows + version
        lane.tokens[place] = torch.where(write, decision.tokens, result.tokens)
        lane.masked[place] = result.masked & ~write
        lane.active[place] = lane.active[rows]
        lane.step[place] = lane.step[rows]
        lane.confidence[place] = lane.confidence[rows]
        for value in lane.state.values():
            value[place] = value[rows]


def _pick(view: View, index: Tensor) -> View:
    """The rows `index` of all tensors of a view."""
    values = ((field.name, getattr(view, field.name)) for field in fields(view))
    rows: dict[str, Any] = {
        name: value[index] for name, value in values if isinstance(value, Tensor)
    }
    return replace(view, **rows)
