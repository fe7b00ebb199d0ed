"""Answers of a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from dmax.chat.responder import Outcome, Part, described
from dmax.chat.session import DoesNotFit, Messages
from dmax.chat_template import REMEDY, has_template
from dmax.decoding import get_strategy
from dmax.errors import InputError, first_line, shorten
from dmax.hub import find_folder
from dmax.llm import LLM
from dmax.outputs import GenerationOutput, StreamEvent
from dmax.params import DecodingParams
from dmax.serve.deltas import Deltas, settled_ids
from dmax.trace.frames import Frame, Frames
from dmax.trace.recording import run_record


class LocalResponder:
    """A model in this process.

    Args:
        name: bundled name, folder or hub id.
        load: loads a model of such a name.

    Raises:
        InputError: there is no such model, or it knows no conversations.
    """

    def __init__(self, name: str, load: Callable[[str], LLM]) -> None:
        self._load = load
        self._llm = self._loaded(name)
        self.name = name

    def describe(self, params: DecodingParams) -> str:
        """As `Responder.describe`."""
        resolved = self._llm.resolve(params)
        threshold = getattr(get_strategy(resolved), "threshold", None)
        return described(self.name, resolved.strategy, threshold)

    def check(self, params: DecodingParams) -> None:
        """As `Responder.check`."""
        get_strategy(self._llm.resolve(params))

    def use(self, name: str) -> None:
        """As `Responder.use`; the model before is kept until the new one is there."""
        find_folder(name)
        before = self._llm
        self._llm = self._loaded(name)
        self.name = name
        before.close()

    def answer(self, messages: Messages, params: DecodingParams) -> LocalAnswer:
        """As `Responder.answer`."""
        self.check(params)
        return LocalAnswer(self._llm, self.name, messages, params)

    def _loaded(self, name: str) -> LLM:
        llm = self._load(name)
        if llm.tokenizer is None or not has_template(llm.tokenizer):
            raise InputError(
                f"{name} has no chat template, so it knows no conversations",
                hint=f"complete a text with `dmax generate`, or {REMEDY}",
            )
        return llm


class LocalAnswer:
    """As `dmax.chat.responder.Answer`; its first event is waited for here.

    Raises:
        DoesNotFit: fewer messages may fit.
    """

    def __init__(self, llm: LLM, name: str, messages: Messages, params: DecodingParams) -> None:
        self.eos_token_ids: Collection[int] = llm.checkpoint.special_ids.eos_token_ids
        self.outcome: Outcome | None = None
        self._llm = llm
        self._name = name
        self._messages = messages
        self._seen: list[Frame] = []
        self._output: dict[str, Any] = {}
        try:
            request = llm.request(0, messages, params)
            self._frames = Frames(llm, replace(request, provisional=True))
            self._call = llm.submit([self._frames.request])
            with _this_answer_alone():
                self._first = next(self._call)
        except InputError as error:  # whatever is wrong with many messages, fewer may do
            message = error.message.replace("prompt 0", "the question")
            raise DoesNotFit(message, error.hint) from error

    def __iter__(self) -> Iterator[Part]:
        """Its parts; a block settles with its last frame."""
        deltas = Deltas(self._llm.decode)
        limit = self._frames.request.params.max_new_tokens
        for event in self._events():
            if event.kind == "finished":
                output = self._llm.output(self._frames.request, event)
                self._finish(output)
                yield Part(deltas.end(output.text))
                return
            frame = self._frames.frame(event)
            self._seen.append(frame)
            settled = ""
            if event.kind == "committed":
                settled = deltas.add(settled_ids(event, limit, self.eos_token_ids))
            yield Part(settled, frame)

    def trace(self) -> dict[str, Any]:
        """As `Answer.trace`."""
        header = self._frames.header(self._name, self._messages)
        return run_record(header, self._seen, self._output)

    def close(self) -> None:
        """As `Answer.close`."""
        self._call.close()

    def _events(self) -> Iterator[StreamEvent]:
        """The events of the request; raises the error of one that failed."""
        with _this_answer_alone():
            for event in chain([self._first], self._call):
                if event.error is not None:
                    raise event.error
                yield event

    def _finish(self, output: GenerationOutput) -> None:
        self._output = self._frames.output(output)
        self.outcome = Outcome(
            seconds=self._output["seconds"],
            finish_reason=output.finish_reason,
            num_tokens=len(output.token_ids),
            num_forwards=output.num_forwards,
            tokens_per_forward=output.tokens_per_forward,
        )


@contextmanager
def _this_answer_alone() -> Iterator[None]:
    """Whatever a strategy or a device raises ends an answer, and not the chat."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"decoding failed: {type(error).__name__}: {shorten(first_line(error))}"
        ) from error
