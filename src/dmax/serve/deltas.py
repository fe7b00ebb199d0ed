"""The text of a completion while it grows: what is certain of it, piece by piece.

Two things can still change what has been decoded. The bytes of a character may be split over
tokens, and so over blocks; tokenizers that fall back to bytes write a mark for each of them. And
what looks like ordinary text may turn out to be the beginning of a stop text. Both are held back
until it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile

from dmax.outputs import StreamEvent, before_stop

UNFINISHED = "\ufffd"
"""What decoding writes for bytes that are no character, or not one yet."""
CONTEXT = 4
"""Tokens at least that are decoded again before new ones. A tokenizer may write a token differently
at the beginning of a text."""
TRIES = 4
"""Places where these tokens may begin; a character has at most so many bytes."""


class Deltas:
    """The text of a completion in pieces that, put together, are its text.

    Args:
        decode: from token ids to their text.
        stops: texts before which the completion ends.

    Attributes:
        text: all that has been given.
        is_over: whether a stop text has been seen. Nothing more comes until the end.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_over = False
        self._decode = decode
        self._stops = stops
        self._ids: list[int] = []  # the last ones
        self._num_known = 0  # characters of their text that are in `text` or in `_held`
        self._held = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """What further tokens make certain."""
        if self.is_over or not token_ids:
            return ""
        self._held += self._decoded(token_ids)
        keep = certain(self._held, self._stops)
        self.is_over = any(stop in self._held for stop in self._stops)
        return self._give(self._held[:keep])

    def end(self, text: str) -> str:
        """What is left of the whole text, which is known now."""
        rest = text[len(self.text) :]
        self.text += rest
        return rest

    def _give(self, piece: str) -> str:
        self._held = self._held[len(piece) :]
        self.text += piece
        return piece

    def _decoded(self, token_ids: Sequence[int]) -> str:
        """The text of further tokens, but for a character that they leave unfinished."""
        self._ids += token_ids
        text = self._decode(self._ids)
        end = len(text.rstrip(UNFINISHED))
        new = text[self._num_known : end]
        self._num_known = max(end, self._num_known)
        if end == len(text):
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Drop tokens that nothing to come can depend on; all the others have this text."""
        for num_kept in range(CONTEXT, min(CONTEXT + TRIES, len(self._ids))):
            kept = self._ids[-num_kept:]
            # Bytes that begin inside a character would be none, with all that come after them.
            if self._decode(kept[:1]).startswith(UNFINISHED):
                continue
            ending = self._decode(kept)
            if text.endswith(ending):
                self._ids = kept
                self._num_known = len(ending)
                return


def settled_ids(event: StreamEvent, limit: int, ends: Collection[int]) -> tuple[int, ...]:
    """The tokens of a settled block that belong to the completion.

    Args:
        event: of the block.
        limit: tokens that the completion may have; its last block goes on behind them.
        ends: ids that end a completion.
    """
    ids = event.token_ids[: max(limit - event.position, 0)]
    return tuple(takewhile(lambda token: token not in ends, ids))


def certain(text: str, stops: Sequence[str]) -> int:
    """How many characters of a text no stop text can take away, however it goes on.

    That is up to the first stop text, else up to an end that is the beginning of one.
    """
    end = len(before_stop(text, stops))
    if end < len(text):
        return end
    longest = max(map(len, stops), default=0)
    for start in range(max(len(text) - longest + 1, 0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)
