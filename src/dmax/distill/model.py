"""Responses of a model in this process, through the engine's continuous batch."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dmax import __version__
from dmax.chat_template import tokenizer_digest
from dmax.decoding import get_strategy
from dmax.distill.responses import (
    Answer,
    Answers,
    Prompt,
    Prompts,
    Refusal,
    as_chat,
    num_characters,
    response,
)
from dmax.distill.trajectories import Recorder
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.environment import weights_digest
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.outputs import StreamEvent
from dmax.params import DecodingParams


class ModelAnswerer:
    """A model that answers `max_batch_size` prompts at a time.

    Args:
        llm: the model.
        params: how to decode.
        records: whether a response comes with its trajectory, at the price of a copy of every open
            block after every step. No token depends on it.

    Raises:
        InputError: trajectories of responses that a stop text ends, or that go on after an EOS,
            which would teach what comes after the end.
    """

    def __init__(self, llm: LLM, params: DecodingParams, *, records: bool = False) -> None:
        if records and (params.stop or params.ignore_eos):
            raise InputError(
                "a trajectory ends at EOS, so `stop` and `ignore_eos` do not go with recording one",
                hint="leave them out",
            )
        self._llm = llm
        self._params = params
        self._records = records

    def settings(self) -> dict[str, Any]:
        """All that a response depends on, as JSON has it, but for the last bits of a number.

        These may depend on the device and on how many prompts are decoded together, which may
        change.
        """
        llm = self._llm
        resolved = llm.resolve(self._params)
        settings = {
            "dmax": __version__,
            "weights": weights_digest(llm.model),
            "dtype": str(llm.model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(llm.tokenizer),
            "special_ids": asdict(llm.checkpoint.special_ids),
            "params": asdict(resolved),
            "decoding": repr(get_strategy(resolved)),  # with the digest of a head
            **({"trajectories": True} if self._records else {}),
        }
        return dict(json.loads(json.dumps(settings)))

    def answers(self, prompts: Prompts, indices: Sequence[int]) -> Answers:
        """Answer the prompts of these numbers, each as soon as it is finished.

        The next prompt takes the place of one that is finished, so the batch stays full. The
        longest text goes first: the engine plans its memory for it, and others fit.
        """
        if not indices:
            return
        batch_size = min(self._llm.options.max_batch_size, len(indices))
        engine = self._llm.engine(self._params.block_length, max_batch_size=batch_size)
        waiting = _longest_first(prompts, indices)
        running: dict[int, tuple[Request, Recorder | None]] = {}
        while waiting or running:
            while waiting and len(running) < batch_size:
                index = waiting.popleft()
                try:
                    running[index] = self._submit(engine, index, prompts[index])
                except InputError as error:
                    yield [(index, Refusal(error))]
            finished: list[tuple[int, Answer]] = []
            for event in engine.step() if running else ():
                request, recorder = running[event.index]
                if event.kind == "finished":
                    finished.append((event.index, self._answer(request, event, recorder)))
                    del running[event.index]
                elif recorder is not None:
                    recorder.see(event)
            if finished:
                yield finished

    def _submit(
        self, engine: Engine, index: int, prompt: Prompt
    ) -> tuple[Request, Recorder | None]:
        request = self._llm.request(index, as_chat(prompt), self._params)
        recorder = None
        if self._records:
            block_length = (
                self._params.block_length or self._llm.checkpoint.special_ids.block_length
            )
            recorder = Recorder(len(request.prompt_ids), block_length)
            request = replace(request, provisional=True)
        engine.add(request)
        return request, recorder

    def _answer(self, request: Request, event: StreamEvent, recorder: Recorder | None) -> Answer:
        try:
            answer = response(self._llm.output(request, event))
        except InputError as error:  # such as logits that are NaN
            return Refusal(error)
        return answer if recorder is None else replace(answer, trajectory=recorder.trajectory())


def _longest_first(prompts: Prompts, indices: Sequence[int]) -> deque[int]:
    longest = max(indices, key=lambda index: num_characters(prompts[index]))
    return deque([longest, *(index for index in indices if index != longest)])
