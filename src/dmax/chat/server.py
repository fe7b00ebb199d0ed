"""Answers of a server with OpenAI's interface; `dmax serve` shows its drafts, others do not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dmax import extras
from dmax.chat.responder import described
from dmax.chat.session import DoesNotFit, Messages
from dmax.chat.streamed import ServerAnswer
from dmax.distill.server import KEY, NO_KEY, key_in, reason, through_proxies, with_path
from dmax.errors import InputError, did_you_mean, first_line, shorten, show
from dmax.params import AUTO, DecodingParams

HTTP_LIBRARY = "httpx"  # or httpx2, with openai from 3 on
TIMEOUT = 600.0  # seconds that a server may be silent
TOO_LONG = ("context_length_exceeded", "context length", "context window", "there is room for")
"""What servers say when messages do not fit, in a code or in a sentence."""


@dataclass(frozen=True, slots=True)
class Served:
    """How `dmax serve` decodes with a model.

    Attributes:
        strategy: unless another one is asked for.
        thresholds: of the strategies that need no option, unless another is asked for; None where
            a strategy has none.
    """

    strategy: str
    thresholds: Mapping[str, float | None]


class ServerResponder:
    """A server with OpenAI's interface.

    Args:
        url: of the interface, such as http://127.0.0.1:8000/v1; without a path, /v1 is meant.
        name: of the model there; None: the first that the server lists.
        key_variable: environment variable that holds the key; None: OPENAI_API_KEY, if it is set.

    Raises:
        InputError: the package `openai` is missing, there is no key, or the server cannot be asked.
    """

    def __init__(self, url: str, name: str | None, key_variable: str | None) -> None:
        extras.require("openai", "endpoint", "asking a server")
        from openai import OpenAI

        url = with_path(url, "--url")
        self._shown = shorten(_without_password(url))
        self._key_variable = key_variable or KEY
        self._key = key_in(self._key_variable)
        if key_variable and not self._key:
            raise InputError(f"there is no key in the environment variable {shorten(key_variable)}")
        with through_proxies():
            self._client = OpenAI(
                base_url=url, api_key=self._key or NO_KEY, max_retries=0, timeout=TIMEOUT
            )
        self._models = self._listed()
        self.name = self._chosen(name)

    def describe(self, params: DecodingParams) -> str:
        """As `Responder.describe`."""
        place = f"{self.name} at {self._shown}"
        ours = self._ours
        if ours is None:
            return described(place, None, None)
        strategy = ours.strategy if params.strategy == AUTO else params.strategy
        threshold = params.threshold
        if threshold is None:
            threshold = ours.thresholds.get(strategy)
        return described(place, strategy, threshold)

    def check(self, params: DecodingParams) -> None:
        """As `Responder.check`; whether a server takes an option is known when it is asked."""
        ours = self._ours
        if ours is None and _decoding(params):
            raise InputError(
                f"{self._shown} takes neither strategy nor threshold: it is no `dmax serve`"
            )
        if ours is None or params.options or params.strategy in (AUTO, *ours.thresholds):
            return
        known = ", ".join(ours.thresholds)
        raise InputError(
            f"unknown strategy {show(params.strategy)}; the server has {known}",
            hint=did_you_mean(params.strategy, ours.thresholds),
        )

    def use(self, name: str) -> None:
        """As `Responder.use`."""
        self.name = self._chosen(name)

    def answer(self, messages: Messages, params: DecodingParams) -> ServerAnswer:
        """As `Responder.answer`."""
        fields: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "stream_options": {"include_usage": True},
        }
        if params.seed is not None:
            fields["seed"] = params.seed
        if self._ours is not None:
            fields["extra_body"] = {"dmax": {**_decoding(params), "stream": "provisional"}}
        began = time.perf_counter()
        with self._asking():
            stream = self._client.chat.completions.create(stream=True, **fields)
            answer = ServerAnswer(stream, began, self._asking)
            answer.begin()
        is_question_alone = sum(message["role"] == "user" for message in messages) == 1
        if answer.num_new < params.max_new_tokens and not is_question_alone:
            answer.close()
            raise DoesNotFit("the conversation leaves too little room for an answer")
        return answer

    @property
    def _ours(self) -> Served | None:
        """What `dmax serve` says of the model; None: the server is another."""
        return self._models.get(self.name)

    def _listed(self) -> dict[str, Served | None]:
        """The models of the server, with what it says of them if it is `dmax serve`."""
        with self._asking():
            models = list(self._client.models.list())
            return {str(model.id): _said_of(model) for model in models}

    def _chosen(self, name: str | None) -> str:
        """A model of the server; one that lists none may have any.

        Raises:
            InputError: there is none of that name.
        """
        names = list(self._models)
        if name is None and not names:
            raise InputError(
                f"{self._shown} does not say which models it has", hint="choose with --model"
            )
        if names and name not in (None, *names):
            raise InputError(
                f"there is no model {show(name)} at {self._shown}; it has "
                f"{shorten(', '.join(names))}",
                hint=did_you_mean(name, names),
            )
        return names[0] if name is None else name

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Say in one sentence what goes wrong with a server, and never show the key."""
        try:
            yield
        except InputError:
            raise
        # A stranger may send anything, and the HTTP library below the client changes its name.
        except Exception as error:
            found = self._translated(error)
            if self._key:
                found = type(found)(found.message.replace(self._key, "…"), found.hint)
            raise found from None

    def _translated(self, error: Exception) -> InputError:
        from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

        shown = self._shown
        again = "/retry asks again"
        if isinstance(error, EOFError):
            return InputError(f"{shown} ended before the answer did", hint=again)
        if isinstance(error, APIStatusError):
            return self._refused(error)
        if isinstance(error, APITimeoutError):
            return InputError(f"{shown} was silent for {TIMEOUT:g} seconds", hint=again)
        is_of_http = type(error).__module__.startswith(HTTP_LIBRARY)
        if isinstance(error, APIConnectionError) or is_of_http:
            cause = first_line(error.__cause__ or error)
            return InputError(f"cannot reach {shown}: {shorten(cause)}", hint=again)
        if isinstance(error, APIError):
            return InputError(f"{shown} ends the answer: {reason(error)}", hint=again)
        return InputError(
            f"{shown} answers with something that is no chat completion",
            hint="is it an OpenAI-compatible server?",
        )

    def _refused(self, error: Any) -> InputError:
        """What a status other than success says."""
        said = reason(error)
        hints = {
            401: f"the key stands in the environment variable {self._key_variable}",
            403: f"the key stands in the environment variable {self._key_variable}",
            404: "the address ends in /v1 with most servers",
            429: _when(error.response.headers.get("retry-after")),
        }
        code = str(error.code or "")
        is_too_long = error.status_code == 400 and any(
            sign in f"{code} {said.lower()}" for sign in TOO_LONG
        )
        kind = DoesNotFit if is_too_long else InputError
        message = f"{self._shown} answers {error.status_code}: {said}"
        return kind(message, hint=hints.get(error.status_code))


def _without_password(url: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _decoding(params: DecodingParams) -> dict[str, Any]:
    """The settings that `dmax serve` alone knows, but for those that were not chosen."""
    chosen: dict[str, Any] = {}
    if params.strategy != AUTO:
        chosen["strategy"] = params.strategy
    if params.threshold is not None:
        chosen["threshold"] = params.threshold
    if params.options:
        chosen["options"] = dict(params.options)
    return chosen


def _said_of(model: Any) -> Served | None:
    """What `dmax serve` says of an entry in its list of models; None: it is another's."""
    said = getattr(model, "dmax", None)
    if not isinstance(said, Mapping):
        return None
    strategies = said["strategies"].items()
    return Served(said["strategy"], {name: each["threshold"] for name, each in strategies})


def _when(seconds: str | None) -> str:
    if seconds is None or not seconds.isdecimal():
        return "wait a moment, then /retry"
    return f"wait {shorten(seconds)} s, then /retry"
