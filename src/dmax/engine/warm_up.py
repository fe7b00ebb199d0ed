"""Getting ready: what happens once happens before the first request comes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dmax.decoding import get_strategy
from dmax.engine.request import Request
from dmax.params import DecodingParams

if TYPE_CHECKING:
    from dmax.engine.engine import Engine

LENGTH = 4096
"""Positions of a sequence that memory is planned for, if nobody says how many there will be."""


def warm_up(engine: Engine, params: DecodingParams) -> None:
    """Have an idle engine capture, compile and reserve what requests like these will need.

    Its steps are captured for all numbers of rows. Then it encodes a prompt and decodes two blocks.
    Without the option `max_length`, memory is planned for `LENGTH` positions of each sequence, or
    the model's context. A longer request has it planned anew, and steps captured again as they
    come.

    Raises:
        InputError: there is no room for a request of two blocks.
    """
    length = engine.block_length
    context = getattr(engine.model.config, "max_position_embeddings", None) or LENGTH
    capacity = -(-(engine.options.max_length or min(LENGTH, context)) // length) * length
    num_new = max(min(2 * length, capacity - 1), 1)
    params = replace(params, max_new_tokens=num_new, ignore_eos=True)
    strategy = get_strategy(params)
    room = capacity - (2 + strategy.num_branches) * length
    num_prompt = max(min(engine.options.prefill_tokens, room), 1)
    request = Request(0, (0,) * num_prompt, params)
    engine.check([request])
    engine.capture(strategy, capacity)
    for event in engine.run([request]):
        if event.error is not None:
            raise event.error
