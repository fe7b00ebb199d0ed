"""Who answers: a model in this process or a server. The chat asks no further."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dmax.chat.session import Messages
from dmax.params import DecodingParams
from dmax.trace.frames import Frame


@dataclass(frozen=True, slots=True)
class Part:
    """What comes of an answer at a time.

    Attributes:
        settled: text that follows what has settled before, and stays.
        frame: a block after a forward; None: there is none to see.
    """

    settled: str = ""
    frame: Frame | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an answer ended, and what it cost; None stands for what a server does not tell.

    Attributes:
        seconds: since it was asked for.
        finish_reason: "stop", "length", or another one of a server.
        num_tokens: of the answer.
        num_forwards: denoising forwards.
        tokens_per_forward: TPF.
    """

    seconds: float
    finish_reason: str | None = None
    num_tokens: int | None = None
    num_forwards: int | None = None
    tokens_per_forward: float | None = None


class Answer(Protocol):
    """An answer on its way. Closing it ends it.

    Attributes:
        eos_token_ids: what ends it, known when its first part is there.
        outcome: None until the last part was read.
    """

    eos_token_ids: Collection[int]
    outcome: Outcome | None

    def __iter__(self) -> Iterator[Part]:
        """Its parts, as they come.

        Raises:
            InputError: it cannot go on.
        """

    def trace(self) -> dict[str, Any]:
        """The whole run, in the form of docs/trace.md.

        Raises:
            InputError: it was not seen to its end, or shows no forwards.
        """

    def close(self) -> None:
        """End it, if it has not ended."""


class Responder(Protocol):
    """Who answers.

    Attributes:
        name: of the model.
    """

    name: str

    def describe(self, params: DecodingParams) -> str:
        """Model and settings in a few words."""

    def check(self, params: DecodingParams) -> None:
        """Raise `InputError` for settings that no answer can have."""

    def use(self, name: str) -> None:
        """Let another model answer from now on.

        Raises:
            InputError: there is none of that name; the one before goes on.
        """

    def answer(self, messages: Messages, params: DecodingParams) -> Answer:
        """Begin an answer.

        Raises:
            DoesNotFit: fewer messages may fit.
            InputError: there will be no answer.
        """


def described(name: str, strategy: str | None, threshold: object) -> str:
    """A model and its settings on one line; None stands for what there is not."""
    parts = [name]
    if strategy is not None:
        parts.append(f"strategy {strategy}")
    if threshold is not None:
        parts.append(f"threshold {threshold}")
    return ", ".join(parts)
