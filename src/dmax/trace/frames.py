"""Frames: what a block looked like after each forward, in the words that traces and streams share.

docs/trace.md has the form as JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from dmax.decoding import get_strategy
from dmax.engine.request import Request
from dmax.environment import environment
from dmax.outputs import GenerationOutput, StreamEvent
from dmax.trace.file import FORMAT, VERSION

if TYPE_CHECKING:
    from dmax.llm import LLM

DIGITS = 4  # of probabilities; more are noise to whoever looks at them


@dataclass(frozen=True, slots=True)
class Frame:
    """A block after a forward. All lists have an entry for each of its generated positions.

    Attributes:
        kind: "provisional", or "committed" for the forward that settled the block.
        position: index of its first position within the completion.
        step: forwards that the block has taken.
        num_forwards: forwards that the request has taken.
        seconds: since the request was submitted.
        token_ids: the mask id where nothing is decoded.
        texts: of the tokens; empty where nothing is decoded, and for special tokens.
        masked: not decoded yet.
        confidence: probability that this forward gave to the token proposed for the position.
        written: took a token in this forward, be it the one it had.
        candidates: [id, probability, text] of the tokens that the next input blends; empty unless
            the strategy blends several.
        forced: the strategy promoted nothing, so the leftmost mask was decoded.
        capped: the cap on steps closed the block.
    """

    kind: Literal["provisional", "committed"]
    position: int
    step: int
    num_forwards: int
    seconds: float
    token_ids: Sequence[int]
    texts: Sequence[str]
    masked: Sequence[bool]
    confidence: Sequence[float]
    written: Sequence[bool]
    candidates: Sequence[Sequence[tuple[int, float, str]]]
    forced: bool
    capped: bool

    def as_record(self) -> dict[str, Any]:
        """The frame as JSON has it."""
        record = {each.name: getattr(self, each.name) for each in fields(self)}
        if not self.candidates:
            del record["candidates"]
        return record


class Frames:
    """Turns the events of a request into frames; its clock starts when it is made.

    Args:
        llm: the model that decodes the request.
        request: with `provisional`, if every forward is to be seen.
        clock: seconds.
    """

    def __init__(
        self, llm: LLM, request: Request, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.request = request
        self._llm = llm
        self._clock = clock
        self._began = clock()
        self._texts: dict[int, str] = {}

    def header(self, name: str, prompt: Any = None) -> dict[str, Any]:
        """What is known of a run before its first forward.

        Args:
            name: of the model, as the user knows it.
            prompt: as the user gave it, if JSON can hold it.
        """
        checkpoint = self._llm.checkpoint
        special_ids = checkpoint.special_ids
        params = self.request.params
        strategy = get_strategy(params)
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": name,
            "prompt": prompt,
            "prompt_token_ids": list(self.request.prompt_ids),
            "params": asdict(params) | {"stop": list(params.stop), "options": dict(params.options)},
            "threshold": getattr(strategy, "threshold", None),
            "stop_confidence": getattr(strategy, "stop_confidence", None),
            "block_length": params.block_length or special_ids.block_length,
            "mask_token_id": special_ids.mask_token_id,
            "eos_token_ids": list(special_ids.eos_token_ids),
            "environment": _environment(str(self._llm.model.device)),
        }

    def frame(self, event: StreamEvent) -> Frame:
        """The frame of a "provisional" or "committed" event."""
        assert event.kind != "finished", "the last event has an output instead"
        return Frame(
            kind=event.kind,
            position=event.position,
            step=event.step,
            num_forwards=event.num_forwards,
            seconds=self._seconds(),
            token_ids=event.token_ids,
            texts=[
                "" if masked else self._text(token)
                for token, masked in zip(event.token_ids, event.masked, strict=True)
            ],
            masked=event.masked,
            confidence=[round(each, DIGITS) for each in event.confidence],
            written=event.written,
            candidates=[
                [(token, round(prob, DIGITS), self._text(token)) for token, prob in position]
                for position in event.candidates
            ],
            forced=event.forced,
            capped=event.capped,
        )

    def output(self, output: GenerationOutput) -> dict[str, Any]:
        """The result of the request as JSON has it, from `LLM.output`."""
        return {
            "text": output.text,
            "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason,
            **asdict(output.cost),
            "tokens_per_forward": output.tokens_per_forward,
            "seconds": self._seconds(),
        }

    def _seconds(self) -> float:
        return round(self._clock() - self._began, 6)

    def _text(self, token: int) -> str:
        """The text of a token within a text, so with the space before its word."""
        if self._llm.tokenizer is None:
            return f"{token} "
        if token not in self._texts:
            # Some tokenizers drop the first space of a text: the token follows another.
            before = self.request.prompt_ids[-1]
            both = self._llm.decode([before, token])
            self._texts[token] = both.removeprefix(self._llm.decode([before]))
        return self._texts[token]


@cache
def _environment(device: str) -> dict[str, Any]:
    """That of a process; a server asks for every request."""
    return environment(device)
