"""A conversation: what was said, and which part of it is sent along with the next question."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmax.errors import InputError

Messages = list[dict[str, str]]


class DoesNotFit(InputError):
    """The messages are too long for the context; fewer of them may fit."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answer."""

    question: str
    answer: str


@dataclass(slots=True)
class Session:
    """What was said so far.

    Attributes:
        system: said before everything else; None: nothing.
        turns: those that have an answer, oldest first.
        num_left_out: how many of the oldest turns are not sent any more.
        asked: the last question, whether it has an answer or not; None: there was none.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    num_left_out: int = 0
    asked: str | None = None

    def messages(self) -> Messages:
        """What is sent: the system message, the turns that fit, and the last question."""
        messages = [] if self.system is None else [_message("system", self.system)]
        for turn in self.turns[self.num_left_out :]:
            messages.append(_message("user", turn.question))
            messages.append(_message("assistant", turn.answer))
        if self.asked is not None:
            messages.append(_message("user", self.asked))
        return messages

    def leave_out(self) -> bool:
        """Leave out one more of the oldest turns; False if only the question is left."""
        has_more = self.num_left_out < len(self.turns)
        self.num_left_out += has_more
        return has_more

    def include_all(self) -> None:
        """Try all turns again, with another model or another system message."""
        self.num_left_out = 0

    def answer(self, text: str) -> None:
        """Keep an answer to the last question."""
        assert self.asked is not None, "an answer follows a question"
        self.turns.append(Turn(self.asked, text))

    def take_back(self) -> None:
        """Forget the answer to the last question, so that it can be asked again.

        Raises:
            InputError: nothing was asked.
        """
        if self.asked is None:
            raise InputError("nothing was asked yet", hint="type a question first")
        if self.turns and self.turns[-1].question == self.asked:
            self.turns.pop()
            self.num_left_out = min(self.num_left_out, len(self.turns))

    def clear(self) -> None:
        """Forget all that was said; the system message stays."""
        self.turns.clear()
        self.num_left_out = 0
        self.asked = None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
