"""An answer as it was decoded: what stood there after every forward, and when."""

from __future__ import annotations

from dataclasses import dataclass

from dmax.demo.settings import Setting
from dmax.outputs import GenerationOutput
from dmax.tasks import Example


@dataclass(frozen=True, slots=True)
class Piece:
    """A position of an answer after a forward.

    Attributes:
        text: its token, with the space before it; empty while the position is masked.
        is_final: whether its block has converged.
        is_revised: whether it has replaced another token.
        is_new: whether it has done so in this forward.
        is_wrong: whether it is final and a mistake (`mistakes`).
    """

    text: str = ""
    is_final: bool = False
    is_revised: bool = False
    is_new: bool = False
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """An answer after a forward.

    Attributes:
        seconds: since the question was asked.
        pieces: the answer so far, up to the end of the text.
    """

    seconds: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """One answer, forward by forward.

    Attributes:
        setting: how it was decoded.
        frames: one for each forward.
        output: the finished answer.
        extracted: the number it closes with; None if there is none.
        is_correct: whether that is the right one.
        revisions: decoded tokens that were replaced, before and after.
    """

    setting: Setting
    frames: tuple[Frame, ...]
    output: GenerationOutput
    extracted: str | None
    is_correct: bool
    revisions: tuple[tuple[str, str], ...]

    @property
    def seconds(self) -> float:
        """Until the last forward was done."""
        return self.frames[-1].seconds

    def num_forwards(self, seconds: float) -> int:
        """How many forwards were done by then."""
        return sum(frame.seconds <= seconds for frame in self.frames)


@dataclass(frozen=True, slots=True)
class Story:
    """One problem and its answers.

    Attributes:
        example: the problem.
        recordings: an answer for each setting.
        choice: why this problem.
    """

    example: Example
    recordings: tuple[Recording, ...]
    choice: str

    @property
    def seconds(self) -> float:
        """Until the last answer was finished."""
        return max(recording.seconds for recording in self.recordings)
