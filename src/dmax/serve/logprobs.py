"""How sure the model was of each token at the forward that settled it, in OpenAI's two forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dmax.outputs import StreamEvent
from dmax.serve.deltas import UNFINISHED

LEAST = -9999.0
"""What OpenAI writes for the logarithm of nothing, which JSON has no number for."""

TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Settled:
    """A token of a completion.

    Attributes:
        token: its id.
        probability: at the last forward that wrote it.
        candidates: ids and probabilities of what that forward had to choose from, the most probable
            first; the token alone if the strategy looks at no others.
    """

    token: int
    probability: float
    candidates: Sequence[tuple[int, float]]


class Probabilities:
    """Follows the forwards of a request that reports them all: the last one that wrote counts."""

    def __init__(self) -> None:
        self._settled: dict[int, Settled] = {}  # by position

    def follow(self, event: StreamEvent) -> None:
        """Take note of a block after a forward."""
        for offset, is_written in enumerate(event.written):
            if is_written:
                token, probability = event.token_ids[offset], event.confidence[offset]
                candidates = event.candidates[offset] if event.candidates else ()
                settled = Settled(token, probability, candidates or ((token, probability),))
                self._settled[event.position + offset] = settled

    def between(self, start: int, end: int) -> list[Settled]:
        """Those of the positions from `start` up to `end`, which are settled."""
        return [self._settled[position] for position in range(start, end)]


def chat_form(settled: Sequence[Settled], num_top: int, text: TokenText) -> dict[str, Any]:
    """`logprobs` of a choice of a chat, or of a piece of it.

    Args:
        settled: the tokens.
        num_top: candidates of each, at most.
        text: of a token.
    """
    return {
        "content": [
            {
                **_entry(each.token, each.probability, text),
                "top_logprobs": [_entry(*top, text) for top in each.candidates[:num_top]],
            }
            for each in settled
        ],
        "refusal": None,
    }


def completion_form(
    settled: Sequence[Settled], num_top: int, text: TokenText, offset: int
) -> dict[str, Any]:
    """`logprobs` of a choice of a completion, or of a piece of it.

    Args:
        settled: the tokens.
        num_top: candidates of each, at most.
        text: of a token.
        offset: characters of the tokens before.
    """
    tokens = [text(each.token) for each in settled]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top = [
        {text(token): _log(probability) for token, probability in each.candidates[:num_top]}
        for each in settled
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_log(each.probability) for each in settled],
        "top_logprobs": top if num_top else None,
        "text_offset": offsets,
    }


def _entry(token: int, probability: float, text: TokenText) -> dict[str, Any]:
    written = text(token)
    # Of a token that is a part of a character nobody can tell the bytes from its text.
    code = None if UNFINISHED in written else list(written.encode())
    return {"token": written, "logprob": _log(probability), "bytes": code}


def _log(probability: float) -> float:
    return max(math.log(probability), LEAST) if probability > 0 else LEAST
