"""What `LLM` gives back: completions with what they cost, and the events of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dmax.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A completion and what it cost.

    Attributes:
        text: decoded completion, cut at the first EOS; empty when the checkpoint has no tokenizer.
        token_ids: its token ids.
        prompt_token_ids: the prompt as the model saw it.
        finish_reason: "stop" (EOS or a stop text), "length", "deadline" or "cancelled".
        num_forwards: denoising forwards.
        num_prefill_forwards: forwards that encoded the prompt; one if it went along with the first
            denoising forward.
        num_commit_forwards: forwards that only wrote keys and values of finished blocks.
        num_positions: positions computed in denoising and commit forwards, all open blocks and
            versions included.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_forwards: int
    num_prefill_forwards: int
    num_commit_forwards: int
    num_positions: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """TPF: generated tokens, EOS not counted, per denoising forward."""
        return len(self.token_ids) / self.num_forwards

    @property
    def tokens_per_position(self) -> float:
        """Generated tokens per computed position: what parallel decoding costs where TPF does not show it."""
        return len(self.token_ids) / self.num_positions if self.num_positions else 0.0

    @property
    def tokens_per_forward_paper(self) -> float:
        """TPF as the published evaluation counts: the prefill is one more forward."""
        return len(self.token_ids) / (self.num_forwards + self.num_prefill_forwards)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What happened in one step of a streamed generation.

    Attributes:
        kind: "provisional" (the open block, still subject to revision), "committed" (a final block)
            or "finished".
        text: text of the block's decoded tokens up to the first EOS; for "finished" the whole
            completion.
        token_ids: the block's generated positions; for "finished" the whole completion.
        masked: which of them are undecided.
        confidence: probability of each.
        position: index of the first of them within the completion.
        step: forwards the block has taken.
        output: the result, for "finished" only.
    """

    kind: Literal["provisional", "committed", "finished"]
    text: str
    token_ids: tuple[int, ...]
    masked: tuple[bool, ...] = ()
    confidence: tuple[float, ...] = ()
    position: int = 0
    step: int = 0
    output: GenerationOutput | None = None
