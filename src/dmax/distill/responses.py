"""What is asked and what comes back, whoever answers: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dmax.errors import InputError
from dmax.outputs import GenerationOutput
from dmax.records.readers import Chat
from dmax.records.trajectories import Trajectory

Prompt = str | Chat
"""A text, which is one user message, or a chat whose last message is to be answered."""
Prompts = Sequence[Prompt] | Mapping[int, Prompt]
"""Prompts by their numbers."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer to a prompt.

    Attributes:
        text: without special tokens.
        tokens: how many were generated, EOS not counted; None if the server does not say.
        is_finished: whether the model ended it by itself.
        forwards: denoising forwards that it took; None if the server does not say.
        trajectory: how it was decoded; None if nobody asked.
    """

    text: str
    tokens: int | None
    is_finished: bool
    forwards: int | None = None
    trajectory: Trajectory | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a prompt was not answered, such as one that is longer than the context."""

    error: InputError


Answer = Response | Refusal
Answers = Generator[list[tuple[int, Answer]], None, None]
"""Groups of answers that are finished together, each with the number of its prompt.

Closing it ends what is still being answered.
"""


class Answerer(Protocol):
    """Who answers."""

    def settings(self) -> dict[str, Any]:
        """All that a response depends on, as JSON has it."""

    def answers(self, prompts: Prompts, indices: Sequence[int]) -> Answers:
        """Answer the prompts of these numbers, each once; a group is given once it is finished.

        Raises:
            InputError: nothing can be answered any more.
        """


def response(output: GenerationOutput) -> Response:
    """The response in a completion."""
    return Response(
        text=output.text,
        tokens=len(output.token_ids),
        is_finished=output.finish_reason == "stop",
        forwards=output.num_forwards,
    )


def as_chat(prompt: Prompt) -> Chat:
    """A prompt as the messages that a chat template or a server takes."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def num_characters(prompt: Prompt) -> int:
    """The length of a prompt, without the chat template."""
    return sum(len(message["content"]) for message in as_chat(prompt))
