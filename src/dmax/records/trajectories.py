"""How a response was decoded, step by step: what `dmax distill --trajectories` writes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, TypedDict

from dmax.params import MOST

REMASKED = -1
"""In place of a token: the position was masked again."""


class Trajectory(TypedDict):
    """How a response was decoded, in hard tokens.

    Attributes:
        prompt_tokens: ids of the prompt before it.
        block_length: positions of a block; blocks begin at multiples of it, the prompt counted.
        writes: for each generated position up to the end of the last block: step, token, step,
            token, …, whenever something else came to stand there. Steps are forwards of its block,
            counted from 1. Before the first one the position is masked.
    """

    prompt_tokens: int
    block_length: int
    writes: list[list[int]]


def read_trajectory(text: object) -> Trajectory | None:
    """The trajectory in JSON that anyone may have written; None if it is something else."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.keys() != Trajectory.__annotations__.keys():
        return None
    counts = value["prompt_tokens"], value["block_length"]
    if not all(type(count) is int for count in counts) or counts[0] < 0 or counts[1] < 1:
        return None
    writes = value["writes"]
    is_ours = isinstance(writes, list) and bool(writes) and all(map(_are_writes, writes))
    if not is_ours:
        return None
    return Trajectory(prompt_tokens=counts[0], block_length=counts[1], writes=writes)


def _are_writes(writes: Any) -> bool:
    """Whether these are rising steps from 1 on and tokens, a real one first and last."""
    if not isinstance(writes, list) or not writes or len(writes) % 2:
        return False
    if not all(type(number) is int and REMASKED <= number < MOST for number in writes):
        return False
    steps, tokens = writes[::2], writes[1::2]
    rises = steps[0] >= 1 and all(before < after for before, after in pairwise(steps))
    return rises and tokens[0] >= 0 and tokens[-1] >= 0
