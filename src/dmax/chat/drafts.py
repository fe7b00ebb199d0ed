"""The open blocks of an answer as they stand, and which of their tokens have replaced others."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count

from dmax.cli.marks import visible
from dmax.trace.frames import Frame


@dataclass(frozen=True, slots=True)
class Piece:
    """A position of an open block.

    Attributes:
        text: its token, with the space before it; empty while the position is masked.
        confidence: probability of the token.
        is_revised: whether it has replaced another token.
        is_new: whether it has done so in the last forward.
    """

    text: str = ""
    confidence: float = 0.0
    is_revised: bool = False
    is_new: bool = False


class Drafts:
    """What the frames of one answer have left open.

    Args:
        limit: tokens that the answer may have; a block goes on behind it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: dict[int, tuple[Piece, ...]] = {}  # by their first position
        self._tokens: dict[int, int] = {}  # by position
        self._revised: set[int] = set()

    def take(self, frame: Frame, eos_token_ids: Collection[int]) -> None:
        """Replace a block by what it has become; one that has settled is open no more.

        Args:
            frame: the block after a forward.
            eos_token_ids: what ends the answer; a block goes on behind it, too.
        """
        if frame.kind == "committed":
            self._blocks.pop(frame.position, None)
        else:
            self._blocks[frame.position] = tuple(self._pieces(frame, eos_token_ids))

    def pieces(self) -> list[Piece]:
        """The positions of all open blocks, in order."""
        return [piece for start in sorted(self._blocks) for piece in self._blocks[start]]

    def _pieces(self, frame: Frame, eos_token_ids: Collection[int]) -> Iterator[Piece]:
        """The positions of a block up to the end of the answer."""
        columns = (frame.token_ids, frame.texts, frame.masked, frame.confidence)
        for position, token, text, is_masked, sure in zip(
            count(frame.position), *columns, strict=False
        ):
            if position >= self._limit or (token in eos_token_ids and not is_masked):
                return
            if is_masked:
                yield Piece()
                continue
            is_new = self._tokens.get(position, token) != token
            self._tokens[position] = token
            if is_new:
                self._revised.add(position)
            if text:  # special tokens have none
                yield Piece(visible(text), sure, position in self._revised, is_new)
