"""What goes into the engine and what comes out: requests, events and finished generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dmax.params import DecodingParams

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
FindStop = Callable[[Sequence[int]], int | None]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete.

    Attributes:
        index: the caller's number for it, no two in flight alike; events carry it.
        prompt_ids: token ids of the prompt.
        params: how to decode.
        find_stop: given the tokens generated so far, how many of them to keep if they hold a stop
            string, else None.
    """

    index: int
    prompt_ids: tuple[int, ...]
    params: DecodingParams
    find_stop: FindStop | None = field(default=None, compare=False)


@dataclass(slots=True)
class Counters:
    """What a request cost. Nothing is hidden: prefill and separate commit forwards stand beside the denoising ones.

    Attributes:
        num_forwards: denoising forwards, one per step of a block.
        num_prefill_forwards: forwards that encoded the prompt; one if it went along with the first
            denoising forward.
        num_commit_forwards: forwards that only wrote a finished block's keys and values (0 with
            cross-block commits).
        num_positions: positions that went through the model in denoising and commit forwards: those
            of every open block and of every version of it, and of finished blocks on their way into
            the cache.
        num_forced: steps where the strategy committed nothing and the engine decoded a token to
            make progress.
        num_capped: blocks closed by the step cap.
    """

    num_forwards: int = 0
    num_prefill_forwards: int = 0
    num_commit_forwards: int = 0
    num_positions: int = 0
    num_forced: int = 0
    num_capped: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request.

    Attributes:
        token_ids: generated, cut at the first EOS (unless it is ignored), behind a stop string, and
            at the limit.
        finish_reason: "stop" (EOS or a stop string), "length", "deadline" or "cancelled"; the last
            two hold the blocks that were finished by then.
        counters: what it cost.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    counters: Counters


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """The open block of a request after a step.

    Attributes:
        index: the request's number.
        kind: "provisional" while the block may change, "committed" once it is final.
        position: index of the block's first generated position within the completion.
        token_ids: generated positions of the block, the prompt's tail left out.
        masked: which of them are still undecided.
        confidence: probability of each position's present token, where the strategy tells it.
        step: forwards this block has taken so far.
    """

    index: int
    kind: Literal["provisional", "committed"]
    position: int
    token_ids: tuple[int, ...]
    masked: tuple[bool, ...]
    confidence: tuple[float, ...]
    step: int


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """A request is done."""

    index: int
    completion: Completion
    kind: Literal["finished"] = field(default="finished", init=False)


Event = BlockEvent | FinishedEvent
