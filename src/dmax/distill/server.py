"""Responses of a server with OpenAI's interface, such as vLLM's or SGLang's.

The package `openai` tries again after 408, 409, 429, 5xx, timeouts and lost connections. It waits
longer each time, or as long as the server asks (`Retry-After`).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from dmax import __version__, extras
from dmax.distill.responses import Answer, Answers, Prompt, Prompts, Refusal, Response, as_chat
from dmax.errors import InputError, first_line, shorten, show
from dmax.params import MOST, check_number

MOST_CONNECTIONS = 1000  # of the package's client
KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # a server of one's own asks for none, and the client sends one
ABOUT_THE_PROMPT = (400, 413, 422)  # such as one that is longer than the context
LOST = "finished responses are kept, and the same command goes on once it answers"
HINTS = {
    401: f"the key stands in the environment variable {KEY}",
    403: f"the key stands in the environment variable {KEY}",
    404: "the address ends in /v1 with most servers; is the model served there?",
    429: f"ask for less at a time with --concurrency; {LOST}",
}


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where a server is and how it is asked.

    Attributes:
        url: of its interface, such as http://localhost:8000/v1; without a path, /v1 is meant.
        model: as the server calls it; None: the only one that it serves.
        concurrency: requests in flight.
        retries: how often a request is tried again.
        timeout: seconds that the server may be silent.
        max_new_tokens: longest completion.
        fields: further fields of a request, which may replace ours.

    Raises:
        InputError: a value out of range.
    """

    url: str
    model: str | None = None
    concurrency: int = 64
    retries: int = 8
    timeout: float = 600.0
    max_new_tokens: int = 256
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("concurrency", self.concurrency, low=1, high=MOST_CONNECTIONS, whole=True)
        check_number("retries", self.retries, low=0, high=1000, whole=True)
        check_number("timeout", self.timeout, low=0, high=86_400, above_low=True)
        check_number("max_new_tokens", self.max_new_tokens, low=1, high=MOST, whole=True)
        for name, value in self.fields.items():
            _check_json(name, value)


class ServerAnswerer:
    """A server that answers many prompts at a time.

    Its key stands in the environment variable OPENAI_API_KEY, if it asks for one.

    Args:
        options: where it is and how it is asked.

    Raises:
        InputError: the package `openai` is missing, the address is none, no request can carry the
            key, or the server does not say which model it serves.
    """

    def __init__(self, options: ServerOptions) -> None:
        extras.require("openai", "endpoint", "asking a server")
        self._options = options
        self._url = with_path(options.url, "--endpoint")
        self._key = key_in(KEY)
        self._model = options.model or self._only_model()

    def settings(self) -> dict[str, Any]:
        """All that a response depends on and that can be known from here.

        The address is not among them: the server may move while a run is interrupted.
        """
        return {"dmax": __version__, "endpoint": {"model": self._model, **self._fields()}}

    def answers(self, prompts: Prompts, indices: Sequence[int]) -> Answers:
        """Answer the prompts of these numbers, each as soon as it is finished.

        The first goes alone, so that a wrong key is refused once and not by every request.

        Raises:
            InputError: the server refuses all requests, or did not answer one after all retries.
        """
        from openai import AsyncOpenAI

        waiting = iter(indices)
        running: set[asyncio.Task[tuple[int, Answer]]] = set()
        num_slots = 1
        with asyncio.Runner() as runner:
            with through_proxies():
                client = AsyncOpenAI(**self._connection())
            loop = runner.get_loop()
            try:
                while True:
                    while len(running) < num_slots and (index := next(waiting, None)) is not None:
                        running.add(loop.create_task(self._answer(client, index, prompts[index])))
                    if not running:
                        break
                    for task in runner.run(_finished(running)):
                        running.remove(task)
                        yield [task.result()]  # alone: the next one may raise
                    num_slots = self._options.concurrency
            finally:
                runner.run(_end(running, client))

    async def _answer(self, client: Any, index: int, prompt: Prompt) -> tuple[int, Answer]:
        """Number and answer of a prompt.

        Raises:
            InputError: the server does not answer, or with something else.
        """
        from openai import APIStatusError, OpenAIError

        for _ in range(self._options.retries + 1):
            try:
                completion = await client.chat.completions.create(
                    model=self._model, messages=as_chat(prompt), extra_body=self._fields()
                )
                return index, _read(completion)
            except APIStatusError as error:
                if error.status_code not in ABOUT_THE_PROMPT:
                    raise self._translated(error) from None
                message = f"prompt {index}: the endpoint refuses it: {reason(error)}"
                return index, Refusal(InputError(message))
            except OpenAIError as error:
                raise self._translated(error) from None
            except (ValueError, TypeError, LookupError, AttributeError):
                continue  # not a completion; the next one may be
        raise InputError(
            f"{shorten(self._url)} answers with something that is no chat completion",
            hint=f"is it an OpenAI-compatible server? {LOST}",
        )

    def _fields(self) -> dict[str, Any]:
        """The fields of a request besides the model and the messages."""
        return {
            "max_tokens": self._options.max_new_tokens,
            "temperature": 0,
            **self._options.fields,
        }

    def _connection(self) -> dict[str, Any]:
        """What a client of the package is made with."""
        return {
            "base_url": self._url,
            "api_key": self._key or NO_KEY,
            "max_retries": self._options.retries,
            "timeout": self._options.timeout,
        }

    def _only_model(self) -> str:
        """The model that the server serves.

        Raises:
            InputError: it serves none or several, or does not say.
        """
        from openai import OpenAI, OpenAIError

        with through_proxies():
            client = OpenAI(**self._connection())
        try:
            with client:
                names = [model.id for model in client.models.list()]
        except OpenAIError as error:
            raise self._translated(error) from None
        except (ValueError, TypeError, AttributeError):
            names = []
        if len(names) != 1 or not isinstance(names[0], str):
            served = ", ".join(map(str, names)) or "no list of models"
            raise InputError(
                f"{shorten(self._url)} serves {shorten(served)}",
                hint="choose with --endpoint-model",
            )
        return names[0]

    def _translated(self, error: Exception) -> InputError:
        """What an error of the package says, in one sentence."""
        from openai import APIStatusError, APITimeoutError

        shown = shorten(self._url)
        tries = f"in {self._options.retries + 1} tries"
        if isinstance(error, APIStatusError):
            return InputError(
                f"{shown} answers {error.status_code}: {reason(error)}",
                hint=HINTS.get(error.status_code, LOST),
            )
        if isinstance(error, APITimeoutError):
            return InputError(
                f"{shown} gave no answer within {self._options.timeout:g} seconds, {tries}",
                hint=f"raise --timeout or lower --concurrency; {LOST}",
            )
        cause = first_line(error.__cause__ or error)
        return InputError(f"cannot reach {shown}: {shorten(cause)}, {tries}", hint=LOST)


async def _finished(tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Those of the tasks that are finished; there is at least one."""
    finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return finished


async def _end(tasks: set[asyncio.Task[Any]], client: Any) -> None:
    """Give up what is still running."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


def _read(completion: Any) -> Response:
    """The response in a chat completion; another exception than `InputError` if it is none."""
    [choice] = completion.choices
    text = choice.message.content
    if not isinstance(text, str | None):
        raise TypeError
    (text or "").encode()  # JSON can write what no text holds
    num_tokens = getattr(completion.usage, "completion_tokens", None)
    return Response(
        text=text or "",
        tokens=num_tokens if type(num_tokens) is int else None,
        is_finished=choice.finish_reason == "stop",
    )


def reason(error: Any) -> str:
    """What a server says about a request that it refuses."""
    body = error.body if isinstance(error.body, Mapping) else {}
    return shorten(str(body.get("message") or first_line(error)))


def key_in(variable: str) -> str:
    """The key in an environment variable; empty if there is none.

    Raises:
        InputError: no request can carry it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the key in {shorten(variable)} holds characters that no key has",
            hint="copy the key again, without quotation marks and line breaks",
        )
    return key


@contextmanager
def through_proxies() -> Iterator[None]:
    """Make a client of the package, which reads the proxies in the environment.

    Raises:
        InputError: one of them cannot be used.
    """
    try:
        yield
    except OSError:  # of files, such as the one that SSL_CERT_FILE names
        raise
    # Of the HTTP library below the client, which changes its name.
    except Exception as error:
        if not getproxies():
            raise
        # A client is made for every proxy, also for one that its server is not asked through.
        raise InputError(
            f"a proxy in the environment cannot be used: {shorten(first_line(error))}",
            hint="name an HTTP proxy, or set NO_PROXY='*' to use none",
        ) from error


def _check_json(name: str, value: object) -> None:
    """Raise `InputError` for a field with a number that no request can carry."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise InputError(
            f"`{shorten(name)}` must have finite numbers only, got {show(value)}",
            hint="JSON knows neither NaN nor infinity",
        ) from None


def with_path(url: str, flag: str) -> str:
    """The address of an interface, with /v1 if it names a server only.

    Args:
        url: what was given.
        flag: of the command, by which the error calls it.

    Raises:
        InputError: it is no address.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        parts.port  # noqa: B018  # raises if it is no number
    except ValueError:
        is_address = False
    if not is_address:
        raise InputError(
            f"`{flag}` must be an address, got {show(url)}",
            hint="for example http://localhost:8000/v1",
        )
    return url if parts.path.strip("/") else parts._replace(path="/v1").geturl()
