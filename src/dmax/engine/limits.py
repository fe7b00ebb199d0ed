"""What a request takes of the cache, and whether it can ever be had."""

from __future__ import annotations

from dataclasses import dataclass

from dmax.decoding import get_strategy
from dmax.engine.request import Request
from dmax.errors import InputError


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine has for a request.

    Attributes:
        block_length: L.
        vocab_size: V.
        context: positions the model was made for; None: any number.
        planned: positions that a slot is planned for; None: as many as are asked for.
    """

    block_length: int
    vocab_size: int
    context: int | None
    planned: int | None

    def blocks(self, length: int) -> int:
        """`length` rounded up to whole blocks: they are aligned to absolute multiples of the block length."""
        return -(-length // self.block_length) * self.block_length

    def end(self, request: Request) -> int:
        """First position past the last block."""
        return self.blocks(len(request.prompt_ids) + request.params.max_new_tokens)

    def needs(self, request: Request) -> int:
        """Positions a request takes in the cache, those of further versions of its open block included."""
        versions = getattr(get_strategy(request.params), "num_branches", 1)
        return self.end(request) + (versions - 1) * self.block_length

    def check(self, request: Request) -> None:
        """Raises `InputError` for a request that can never fit."""
        if not request.prompt_ids:
            raise InputError(f"prompt {request.index} is empty", hint="give at least one token")
        if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
            raise InputError(
                f"prompt {request.index} holds a token id outside the vocabulary of {self.vocab_size}"
            )
        self._check_room(request, self.end(request), "the model has", self.context)
        if self.planned is not None:
            self._check_room(
                request,
                self.needs(request),
                "the engine was planned for",
                self.blocks(self.planned),
            )

    def _check_room(self, request: Request, needed: int, who: str, room: int | None) -> None:
        if room is not None and needed > room:
            raise InputError(
                f"prompt {request.index} has {len(request.prompt_ids)} tokens; with `max_new_tokens` "
                f"{request.params.max_new_tokens} it needs {needed} positions, {who} {room}",
                hint="shorten the prompt or lower `max_new_tokens` (on the command line --max-new-tokens)",
            )
