"""Answers as OpenAI's interface has them, whole and in pieces, from what the engine reports.

A choice is one answer to one prompt. `Choice` follows its events, and `Answer` puts choices into
the objects of the interface. What those have no place for stands in objects named `dmax`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from dmax.engine.request import Request
from dmax.outputs import Cost, FinishReason, GenerationOutput, StreamEvent, ratio
from dmax.serve.deltas import Deltas, settled_ids
from dmax.serve.errors import SLOW_READER, ApiError, cause_of
from dmax.serve.log import Record
from dmax.serve.logprobs import Probabilities, chat_form, completion_form
from dmax.serve.params import Asked
from dmax.serve.served import ServedModel
from dmax.trace.frames import Frames

FINISH_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "deadline": "length",
    "cancelled": "length",
}
"""As clients of OpenAI's interface know them. `dmax.finish_reason` has our own."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of a choice, all of it certain.

    Attributes:
        text: that follows what was given before.
        logprobs: of its tokens, in the form of the request; None: they are not asked for.
    """

    text: str
    logprobs: dict[str, Any] | None


class Choice:
    """An answer while it is decoded.

    Args:
        asked: the request.
        index: its number among the choices.
        model: that decodes it.

    Attributes:
        frames: makes frames and records of its events.
        output: the result, once it has finished.
    """

    def __init__(self, asked: Asked, index: int, model: ServedModel) -> None:
        self.request: Request = asked.requests[index]
        self.index = index
        self.frames = Frames(model.llm, self.request)
        self.output: GenerationOutput | None = None
        self._asked = asked
        self._model = model
        params = self.request.params
        self._deltas = Deltas(model.llm.decode, params.stop)
        self._probabilities = Probabilities()
        eos = model.llm.checkpoint.special_ids.eos_token_ids
        self._ends = () if params.ignore_eos else eos
        self._num_given = 0  # tokens whose probabilities were given
        self._num_characters = 0  # of those tokens, one by one

    def follow(self, event: StreamEvent) -> None:
        """Take note of a block after a forward, where probabilities are asked for."""
        if self._asked.num_top is not None and event.kind != "finished":
            self._probabilities.follow(event)

    def settle(self, event: StreamEvent) -> Piece:
        """What a "committed" event makes certain; `follow` has seen it."""
        ids = settled_ids(event, self.request.params.max_new_tokens, self._ends)
        text = self._deltas.add(ids)
        # After a stop text, which of the tokens count is known at the end.
        end = self._num_given if self._deltas.is_over else event.position + len(ids)
        return Piece(text, self._logprobs(end))

    def finish(self, event: StreamEvent) -> Piece:
        """What the "finished" event adds to the rest."""
        output = self._model.llm.output(self.request, event)
        self.output = output
        return Piece(self._deltas.end(output.text), self._logprobs(len(output.token_ids)))

    @property
    def finish_reason(self) -> str:
        """As OpenAI's interface has it."""
        assert self.output is not None, "only finished choices have a reason"
        return FINISH_REASONS[self.output.finish_reason]

    def record(self) -> dict[str, Any]:
        """The finished choice as traces have it."""
        assert self.output is not None, "only finished choices have an output"
        return self.frames.output(self.output)

    def logprobs(self) -> dict[str, Any] | None:
        """Those of the whole finished choice."""
        assert self.output is not None, "only finished choices have all of them"
        self._num_given = self._num_characters = 0
        return self._logprobs(len(self.output.token_ids))

    def _logprobs(self, end: int) -> dict[str, Any] | None:
        """Those of the tokens before `end` that were not given yet."""
        num_top = self._asked.num_top
        if num_top is None:
            return None
        settled = self._probabilities.between(self._num_given, end)
        self._num_given = max(end, self._num_given)
        text = self._model.token_text
        if self._asked.is_chat:
            return chat_form(settled, num_top, text)
        offset = self._num_characters
        self._num_characters += sum(len(text(each.token)) for each in settled)
        return completion_form(settled, num_top, text, offset)


class Answer:
    """The answer to a request while it is decoded: its choices, and what they have in common.

    Args:
        asked: the request.
        model: that decodes it.
        record: of the request, which is filled in.
    """

    def __init__(self, asked: Asked, model: ServedModel, record: Record) -> None:
        self.asked = asked
        self.model = model
        self.choices = [Choice(asked, index, model) for index in range(len(asked.requests))]
        self._record = record
        self._began = time.monotonic()
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        self.head = {
            "id": f"{kind}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }
        record.model = model.name
        record.strategy = asked.requests[0].params.strategy
        record.is_stream = asked.is_stream
        record.prompt_tokens = asked.num_prompt_tokens

    def take(self, event: StreamEvent) -> None:
        """Take note of an event of an answer that is sent whole."""
        self.note(event)
        choice = self.choices[event.index]
        choice.follow(event)
        if event.kind == "finished":
            choice.finish(event)

    def note(self, event: StreamEvent) -> None:
        """Have the record know of an event."""
        if event.kind == "committed":
            self._record.block(event.index)
        if event.output is not None:
            record, output = self._record, event.output
            record.completion_tokens = (record.completion_tokens or 0) + len(output.token_ids)
            record.num_forwards = (record.num_forwards or 0) + output.num_forwards
            num_prefill = record.num_prefill_forwards or 0
            record.num_prefill_forwards = num_prefill + output.num_prefill_forwards
            if event.index == 0:
                record.finish_reason = output.finish_reason

    def leave(self) -> None:
        """Have the record know that the client is gone."""
        self._record.outcome = "cancelled"

    def fail(self, error: ApiError) -> None:
        """Have the record know of an error within a stream."""
        self._record.outcome = "slow_reader" if error.code == SLOW_READER else "failed"
        self._record.fail(error.code, cause_of(error))

    def whole(self) -> dict[str, Any]:
        """The body of a response that is sent at once, when all choices have finished."""
        asked = self.asked
        kind = "chat.completion" if asked.is_chat else "text_completion"
        return {
            **self.head,
            "object": kind,
            "choices": [self._choice(each) for each in self.choices],
            "usage": self.usage(),
            "dmax": self.settings() | self._totals(),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        record = choice.record()
        text = record.pop("text")
        content: dict[str, Any] = {"text": text}
        if self.asked.is_chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {
            "index": choice.index,
            **content,
            "logprobs": choice.logprobs(),
            "finish_reason": choice.finish_reason,
            "dmax": record,
        }

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of all choices."""
        num_new = sum(len(each.token_ids) for each in self._outputs())
        num_prompt = self.asked.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        }

    def settings(self) -> dict[str, Any]:
        """How the choices were decoded: what was asked for, and what held where nothing was."""
        request = self.asked.requests[0]
        params, strategy = request.params, request.strategy
        return {
            "strategy": params.strategy,
            "threshold": getattr(strategy, "threshold", None),
            "stop_confidence": getattr(strategy, "stop_confidence", None),
            "top_k": getattr(strategy, "top_k", None),
            "max_steps_per_block": params.max_steps_per_block,
            "block_length": self.model.block_length,
            "options": dict(params.options),
            "ignore_eos": params.ignore_eos,
            "deadline": params.deadline,
            "max_new_tokens": max(each.params.max_new_tokens for each in self.asked.requests),
            "temperature": params.temperature,
            "seed": params.seed,
        }

    def _totals(self) -> dict[str, Any]:
        outputs = self._outputs()
        cost = sum((each.cost for each in outputs), Cost())
        num_new = sum(len(each.token_ids) for each in outputs)
        return {
            **asdict(cost),
            "tokens_per_forward": ratio(num_new, cost.num_forwards),
            "seconds": round(time.monotonic() - self._began, 6),
        }

    def _outputs(self) -> Sequence[GenerationOutput]:
        return [each.output for each in self.choices if each.output is not None]
