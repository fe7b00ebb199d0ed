"""What a request gives: the events of its blocks, its completion, and what that cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "deadline", "cancelled"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What decoding cost. Nothing is hidden: prefill and commit forwards have counts of their own.

    Attributes:
        num_forwards: denoising forwards, one for every step of a block.
        num_prefill_forwards: forwards that encoded the prompt; one if the prompt was encoded
            together with the first denoising forward.
        num_commit_forwards: forwards that only wrote the keys and values of finished blocks. Our
            engine needs none; engines that commit separately do.
        num_positions: positions computed in denoising and commit forwards, with all open blocks,
            all branches, and finished blocks on their way into the cache.
        num_forced: steps in which the strategy promoted nothing and the engine decoded a token.
        num_capped: blocks that were closed by the cap on steps.
    """

    num_forwards: int = 0
    num_prefill_forwards: int = 0
    num_commit_forwards: int = 0
    num_positions: int = 0
    num_forced: int = 0
    num_capped: int = 0

    @property
    def num_forwards_paper(self) -> int:
        """Forwards as the published evaluation counts: a prefill in several parts is one more."""
        return self.num_forwards + min(self.num_prefill_forwards, 1)

    def __add__(self, other: Cost) -> Cost:
        names = Cost.__slots__
        return Cost(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is.

    Attributes:
        num_running: requests that have a slot.
        num_waiting: requests that wait for one.
    """

    num_running: int = 0
    num_waiting: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.num_running + other.num_running, self.num_waiting + other.num_waiting)


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A completion and what it cost.

    Attributes:
        text: decoded completion, cut at the first EOS and before a stop text; empty when the
            checkpoint has no tokenizer.
        token_ids: generated ids, cut at the first EOS (unless it is ignored), after a stop text,
            and at `max_new_tokens`.
        prompt_token_ids: the prompt as the model saw it.
        finish_reason: "stop" (EOS or a stop text), "length", "deadline" or "cancelled"; the last
            two hold the blocks that were finished by then.
        cost: forwards and positions.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cost: Cost

    @property
    def num_forwards(self) -> int:
        """Denoising forwards."""
        return self.cost.num_forwards

    @property
    def num_prefill_forwards(self) -> int:
        """Forwards that encoded the prompt."""
        return self.cost.num_prefill_forwards

    @property
    def num_commit_forwards(self) -> int:
        """Forwards that only wrote the keys and values of finished blocks."""
        return self.cost.num_commit_forwards

    @property
    def num_positions(self) -> int:
        """Positions computed in denoising and commit forwards."""
        return self.cost.num_positions

    @property
    def tokens_per_forward(self) -> float:
        """TPF: generated tokens, EOS not counted, per denoising forward."""
        return ratio(len(self.token_ids), self.num_forwards)

    @property
    def tokens_per_position(self) -> float:
        """Generated tokens per computed position: what parallel decoding costs besides forwards."""
        return ratio(len(self.token_ids), self.num_positions)

    @property
    def tokens_per_forward_paper(self) -> float:
        """TPF as the published evaluation counts: the prefill is one more forward."""
        return ratio(len(self.token_ids), self.cost.num_forwards_paper)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What happened to a request in one step.

    Attributes:
        kind: "provisional" (an open block, still subject to revision), "committed" (a block that
            has converged) or "finished" (the whole request).
        text: text of the block's decoded tokens up to the first EOS; for "finished" the whole
            completion. Only `LLM` fills it in.
        token_ids: generated positions of the block; for "finished" the whole completion.
        masked: which of them are not decoded yet.
        confidence: probability that this step gave to the token proposed for each of them.
        position: index of the first of them within the completion.
        step: forwards that the block has taken.
        output: the result, for "finished" only.
        index: the number of the request.
        error: why a request ended without a result; then `kind` is "finished" and `output` None.
        num_forwards: forwards that the request has taken.
        written: which of them took a token in this step, be it the one they had.
        candidates: the ids that the next input of each blends, with their probabilities; empty
            unless the strategy blends several.
        forced: the strategy promoted nothing, so the leftmost mask was decoded.
        capped: the cap on steps closed the block before it had converged.
    """

    kind: Literal["provisional", "committed", "finished"]
    text: str
    token_ids: tuple[int, ...]
    masked: tuple[bool, ...] = ()
    confidence: tuple[float, ...] = ()
    position: int = 0
    step: int = 0
    output: GenerationOutput | None = None
    index: int = 0
    error: Exception | None = field(default=None, compare=False)
    num_forwards: int = 0
    written: tuple[bool, ...] = ()
    candidates: tuple[tuple[tuple[int, float], ...], ...] = ()
    forced: bool = False
    capped: bool = False


def as_record(result: Any) -> dict[str, Any]:
    """A dataclass with a `cost` as JSON has it: what it cost stands beside its other fields."""
    record = asdict(result)
    return record | record.pop("cost")


def before_stop(text: str, stops: Iterable[str]) -> str:
    """The part of a text before the first of the stop texts; all of it without one."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


def ratio(gain: float, cost: float) -> float:
    """Gain over cost; 0 where nothing was spent, as for a request that ended at once."""
    return gain / cost if cost else 0.0
