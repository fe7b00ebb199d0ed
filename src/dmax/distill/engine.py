"""Responses of whatever completes prompts: another engine, or replicas of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from dmax import __version__
from dmax.completers import Completer
from dmax.distill.responses import Answer, Answers, Prompts, Refusal, as_chat, response
from dmax.errors import InputError
from dmax.params import DecodingParams

VOLATILE = ("batch_size", "environment")
"""Settings of a completer that may change within a run: they move the last bits of a number."""


class CompleterAnswerer:
    """A completer that answers.

    Args:
        completer: what completes the prompts.
        params: how to decode.
        check: raises `InputError` for a chat that cannot be answered, such as one that is longer
            than the context; of all others none fails alone.
    """

    def __init__(
        self,
        completer: Completer,
        params: DecodingParams,
        check: Callable[[Any], object] = lambda chat: None,
    ) -> None:
        self._completer = completer
        self._params = completer.resolve(params)
        self._check = check

    def settings(self) -> dict[str, Any]:
        """As `Answerer.settings`."""
        given = self._completer.settings(self._params)
        kept = {name: value for name, value in given.items() if name not in VOLATILE}
        settings = {
            "dmax": __version__,
            "engine": given["environment"].get("engine"),  # None where our own decodes
            "params": asdict(self._params),
            **kept,
        }
        return dict(json.loads(json.dumps(settings)))

    def answers(self, prompts: Prompts, indices: Sequence[int]) -> Answers:
        """As `Answerer.answers`; prompts that cannot be answered are refused first."""
        chats = []
        asked = []
        refused: list[tuple[int, Answer]] = []
        for index in indices:
            chat = as_chat(prompts[index])
            try:
                self._check(chat)
            except InputError as error:
                refused.append((index, Refusal(error)))
            else:
                chats.append(chat)
                asked.append(index)
        if refused:
            yield refused
        groups = self._completer.completions(chats, self._params, lambda done, total: None)
        with closing(groups):
            for group in groups:
                yield [(asked[number], response(output)) for number, output in group]
