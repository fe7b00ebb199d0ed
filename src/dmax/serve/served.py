"""A model that is served: what it takes on at a time, and the requests that it has in progress."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from dmax.decoding import strategies
from dmax.engine.request import Request
from dmax.errors import InputError, show
from dmax.outputs import StreamEvent
from dmax.params import DecodingParams
from dmax.serve.errors import ApiError, ClientGone, bad_request, failure
from dmax.serve.mailbox import Bell, Mailbox
from dmax.serve.settings import ServerOptions

if TYPE_CHECKING:
    from dmax.llm import LLM

LONGEST_RETRY = 60  # seconds
WARM_UP_BLOCKS = 2
MAX_TOKEN_TEXTS = 2**16


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a model is.

    Attributes:
        num_running: requests that have a slot.
        num_waiting: requests that wait for one.
        num_slots: requests that are decoded at once, at most.
    """

    num_running: int
    num_waiting: int
    num_slots: int


class ServedModel:
    """A model under the name by which clients ask for it.

    All of it but `load` and `close` belongs to the event loop.

    Args:
        name: as clients know it.
        open_llm: loads the model.
        options: how much it takes on.

    Attributes:
        created: when it was named, in seconds since 1970.
    """

    def __init__(self, name: str, open_llm: Callable[[], LLM], options: ServerOptions) -> None:
        self.name = name
        self.options = options
        self.created = int(time.time())
        self._open_llm = open_llm
        self._llm: LLM | None = None
        self._bells: dict[asyncio.AbstractEventLoop, Bell] = {}
        self._ongoing: WeakSet[Ongoing] = WeakSet()  # what is dropped counts no more
        self._seconds = 1.0  # that a request takes, lately
        self.token_text = lru_cache(MAX_TOKEN_TEXTS)(self._token_text)

    # --- getting ready ---

    def load(self) -> None:
        """Load the model and decode something, so that no client waits for what happens once.

        Raises:
            InputError: as `LLM`.
        """
        llm = self._open_llm()
        num_new = WARM_UP_BLOCKS * llm.checkpoint.special_ids.block_length
        llm.generate([[0]], DecodingParams(max_new_tokens=num_new, ignore_eos=True))
        self._llm = llm

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded and warm."""
        return self._llm is not None

    @property
    def llm(self) -> LLM:
        """The model.

        Raises:
            ApiError: it is not ready yet.
        """
        if self._llm is None:
            message = f"the model {show(self.name)} is being loaded; try again later"
            raise ApiError(503, message, code="model_loading", retry_after=1)
        return self._llm

    def close(self) -> None:
        """End the model; requests in progress fail. Any thread may call it."""
        if self._llm is not None:
            self._llm.close()

    # --- what it is ---

    @property
    def block_length(self) -> int:
        """L of the checkpoint."""
        return self.llm.checkpoint.special_ids.block_length

    @property
    def context(self) -> int:
        """Positions that a prompt and its answer may take together."""
        config = self.llm.model.config
        limits = (getattr(config, "max_position_embeddings", None), self.llm.options.max_length)
        return min((limit for limit in limits if limit), default=2**20)

    def room(self, num_prompt: int, num_branches: int) -> int:
        """New tokens that there is room for after a prompt; blocks are decoded whole."""
        length = self.block_length
        num_blocks = self.context // length - (num_branches - 1)
        return num_blocks * length - num_prompt

    @property
    def max_new_tokens(self) -> int:
        """The largest `max_tokens` of a request."""
        return min(self.options.max_new_tokens or self.context, self.context)

    @cached_property
    def strategy(self) -> str:
        """The decoding strategy of requests that name none."""
        return self.llm.resolve(DecodingParams()).strategy

    @cached_property
    def strategies(self) -> dict[str, dict[str, Any]]:
        """The decoding strategies that a request may name, each with its own threshold."""
        found = {}
        for name in strategies():
            try:
                request = self.llm.request(0, (0,), DecodingParams(strategy=name))
            except InputError:  # it takes a head, or another model
                continue
            found[name] = {"threshold": getattr(request.strategy, "threshold", None)}
        return found

    def describe(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dmax",
            "dmax": {
                "strategy": self.strategy,
                "threshold": self.strategies.get(self.strategy, {}).get("threshold"),
                "strategies": self.strategies,
                "block_length": self.block_length,
                "mask_token_id": self.llm.checkpoint.special_ids.mask_token_id,
                "max_length": self.context,
                "max_new_tokens": self.max_new_tokens,
            },
        }

    def _token_text(self, token_id: int) -> str:
        """The text of one token, special or not; its number without a tokenizer."""
        tokenizer = self.llm.tokenizer
        return str(tokenizer.decode([token_id])) if tokenizer else str(token_id)

    # --- what it has in progress ---

    def busy(self) -> Load | None:
        """How busy it is; None while it is being loaded."""
        if self._llm is None:
            return None
        load = self._llm.load()
        return Load(load.num_running, load.num_waiting, self._llm.options.max_batch_size)

    @property
    def num_requests(self) -> int:
        """Requests in progress, waiting ones included; each choice is one."""
        return sum(len(each.requests) for each in self._ongoing)

    def start(self, requests: Sequence[Request], *, is_read_slowly: bool) -> Ongoing:
        """Queue the choices of a request.

        Args:
            requests: numbered from 0.
            is_read_slowly: whether events may have to wait for a client; otherwise they are taken
                at once.

        Raises:
            ApiError: there is too much to do already.
        """
        num_tokens = sum(len(each.prompt_ids) + each.params.max_new_tokens for each in requests)
        self._check_room(len(requests), num_tokens)
        loop = asyncio.get_running_loop()
        bell = self._bells.setdefault(loop, Bell(loop))
        limit = self.options.max_buffered_bytes if is_read_slowly else math.inf
        ongoing = Ongoing(self, requests, num_tokens, Mailbox(bell, limit))
        self._ongoing.add(ongoing)
        return ongoing

    def end_all(self, error: ApiError) -> None:
        """End every request in progress with an error for its client."""
        for each in list(self._ongoing):
            each.end(error)

    def _check_room(self, num_requests: int, num_tokens: int) -> None:
        """Raises `ApiError` 429 unless this much more may be taken on."""
        limit = self.options.max_batch_size + self.options.max_queue
        most_tokens = self.options.max_total_tokens
        if num_requests > limit:
            message = f"the request needs {num_requests} answers, and this server gives {limit}"
            raise ApiError(400, message, code="too_many_choices")
        if self.num_requests + num_requests > limit:
            message = f"{self.num_requests} requests are in progress or wait; try again later"
            raise ApiError(429, message, code="queue_full", retry_after=self._retry_after())
        if most_tokens is None:
            return
        if num_tokens > most_tokens:
            message = f"the request needs {num_tokens} tokens, and this server has {most_tokens}"
            raise ApiError(400, message, code="too_many_tokens")
        taken = sum(each.num_tokens for each in self._ongoing)
        if taken + num_tokens > most_tokens:
            message = (
                f"requests in progress take {taken} tokens of {most_tokens}, and this one needs "
                f"{num_tokens}; try again later"
            )
            raise ApiError(429, message, code="too_many_tokens", retry_after=self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until a slot is likely to be free."""
        rounds = self.num_requests / self.options.max_batch_size
        return max(1, min(math.ceil(self._seconds * rounds), LONGEST_RETRY))

    def _end(self, ongoing: Ongoing, seconds: float) -> None:
        self._ongoing.discard(ongoing)
        self._seconds += (seconds - self._seconds) / 8


class Ongoing:
    """The choices of a request in progress, and what comes of them.

    A context: leaving it cancels what has not finished. Made by `ServedModel.start`.

    Attributes:
        requests: the choices.
        num_tokens: that they take at most, prompts included.
        began: when it was queued, in seconds of `time.monotonic`.
    """

    def __init__(
        self, model: ServedModel, requests: Sequence[Request], num_tokens: int, mailbox: Mailbox
    ) -> None:
        self.requests = requests
        self.num_tokens = num_tokens
        self.began = time.monotonic()
        self._model = model
        self._mailbox = mailbox
        self._num_unfinished = len(requests)
        self._call = model.llm.submit(requests, mailbox)
        mailbox.cancel = self._call.cancel

    def __enter__(self) -> Ongoing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_unfinished:
            self._call.cancel()
        self._model._end(self, time.monotonic() - self.began)

    def end(self, error: BaseException) -> None:
        """Cancel it, and have its reader get an error."""
        self._mailbox.put(error)
        self._call.cancel()

    async def steps(self) -> AsyncIterator[list[StreamEvent]]:
        """Events of one or several steps at a time, until all choices have finished.

        Raises:
            ApiError: a choice could not be decoded, or the request was ended.
            ClientGone: the client has left.
        """
        while self._num_unfinished:
            try:
                events = await self._mailbox.take()
            except (ApiError, ClientGone, asyncio.CancelledError):
                raise
            except InputError as error:  # it can never fit
                raise bad_request(error) from error
            except BaseException as error:  # whatever an engine raised: the server goes on
                raise failure(error) from error
            for event in events:
                if event.kind == "finished":
                    self._num_unfinished -= 1
                if event.error is not None:
                    raise failure(event.error) from event.error
            yield events
