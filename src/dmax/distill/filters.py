"""Which responses are worth learning from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dmax.distill.responses import Response
from dmax.errors import InputError
from dmax.params import MOST, check_number

WINDOW = 16  # characters of what counts as repeated


@dataclass(frozen=True, slots=True)
class Filters:
    """What a response must be, besides finished and not empty.

    Attributes:
        min_length: fewest tokens.
        max_length: most tokens; None: no limit.
        max_repetition: largest `repetition`, in [0, 1]; None: any. At 0.5, of 8,064 solutions
            of GSM8K, HumanEval and MBPP written by people one is dropped.
        score: whether the response to a prompt of that number is right; None: nobody looks, as in
            the paper.
        scorer: the name of the task that scores.

    Raises:
        InputError: a bound out of range.
    """

    min_length: int = 0
    max_length: int | None = None
    max_repetition: float | None = None
    score: Callable[[int, str], bool] | None = None
    scorer: str | None = None

    def __post_init__(self) -> None:
        check_number("min_length", self.min_length, low=0, high=MOST, whole=True)
        lowest = max(1, self.min_length)
        check_number(
            "max_length", self.max_length, low=lowest, high=MOST, whole=True, optional=True
        )
        check_number("max_repetition", self.max_repetition, low=0, high=1, optional=True)

    def settings(self) -> dict[str, Any]:
        """What these filters are known by, as JSON has it."""
        return {
            "min_length": self.min_length,
            "max_length": self.max_length,
            "max_repetition": self.max_repetition,
            "scorer": self.scorer,
        }

    def reason(self, index: int, response: Response) -> str | None:
        """Why the response to prompt `index` is dropped, in a word; None if it is kept.

        Raises:
            InputError: it is to have a number of tokens, and nobody says how many it has.
        """
        if not response.is_finished:
            return "unfinished"
        if not response.text.strip():
            return "empty"
        if self.min_length and self._length(response) < self.min_length:
            return "short"
        if self.max_length is not None and self._length(response) > self.max_length:
            return "long"
        if self.max_repetition is not None and repetition(response.text) > self.max_repetition:
            return "repetitive"
        if self.score is not None and not self.score(index, response.text):
            return "wrong"
        return None

    def _length(self, response: Response) -> int:
        if response.tokens is None:
            raise InputError(
                "the endpoint does not say how many tokens a response has (`usage`)",
                hint="leave out --min-length and --max-length",
            )
        return response.tokens


def repetition(text: str) -> float:
    """The share of a text that it has said before: 1 - distinct / all windows of 16 characters.

    This is seq-rep-n of arXiv 1908.04319, over characters in place of tokens, so that it is the
    same for every tokenizer, for code, and for languages without spaces. A loop comes near 1.
    """
    num_windows = len(text) - WINDOW + 1
    if num_windows < 1:
        return 0.0
    distinct = {text[start : start + WINDOW] for start in range(num_windows)}
    return (num_windows - len(distinct)) / num_windows
