"""From the body of a request to requests for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

from dmax.decoding import get_strategy, strategy_class
from dmax.decoding.strategy import Strategy
from dmax.engine.request import Request as EngineRequest
from dmax.errors import InputError, TooLong, show
from dmax.integrations.options import check_client, fresh_block
from dmax.params import AUTO, DecodingParams
from dmax.serve.bodies import (
    ChatRequest,
    CompletionRequest,
    DmaxOptions,
    Message,
    Request,
)
from dmax.serve.errors import ApiError, bad_request
from dmax.serve.served import ServedModel

NUM_SEEDS = 2**63
NUM_NEW = DecodingParams().max_new_tokens
"""New tokens of those who do not say how many."""
CONTEXT_ERROR = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, checked.

    Attributes:
        is_chat: whether it is a chat; otherwise texts or token ids are continued.
        prompts: as the client gave them, one for each choice; None for token ids.
        requests: for the engine, one for each choice.
        num_prompt_tokens: of all prompts.
        num_top: candidates beside the probability of each token; None: no probabilities.
        is_stream: whether the answer is sent as it is settled.
        is_provisional: whether blocks are sent after every forward.
        include_usage: whether the stream ends with the usage.
    """

    is_chat: bool
    prompts: Sequence[Any]
    requests: Sequence[EngineRequest]
    num_prompt_tokens: int
    num_top: int | None
    is_stream: bool
    is_provisional: bool
    include_usage: bool


def read(body: ChatRequest | CompletionRequest, model: ServedModel) -> Asked:
    """What a request asks of a model; encodes its prompts.

    Raises:
        ApiError: 400, naming the field that cannot be served.
    """
    options = body.dmax or DmaxOptions()
    if isinstance(body, ChatRequest):
        prompts = [[{"role": each.role, "content": _content(each)} for each in body.messages]]
        num_top = _num_top(body)
        name = "messages"
    else:
        prompts = _prompts(body.prompt)
        num_top = body.logprobs
        name = "prompt"
    is_provisional = options.stream == "provisional"
    if is_provisional and not body.stream:
        raise _wrong("dmax.stream", "`dmax.stream` is provisional and `stream` is not true")
    num_choices = body.n or 1
    _check_choices(num_choices, prompts, model)
    params = _params(body, options, model)
    strategy = _strategy(params, options, model)
    encoded = [_encode(prompt, name, model) for prompt in prompts]
    requests: list[EngineRequest] = []
    for prompt_ids in encoded:
        num_new = _num_new(body, len(prompt_ids), strategy, name, model)
        for choice in range(num_choices):
            own = replace(params, max_new_tokens=num_new, seed=derived_seed(body.seed, choice))
            requests.append(_request(len(requests), prompt_ids, own, model))
    if is_provisional or num_top is not None:
        requests = [replace(each, provisional=True) for each in requests]
    return Asked(
        is_chat=isinstance(body, ChatRequest),
        prompts=[_shown(prompt) for prompt in prompts for _ in range(num_choices)],
        requests=requests,
        num_prompt_tokens=sum(map(len, encoded)),
        num_top=num_top,
        is_stream=bool(body.stream),
        is_provisional=is_provisional,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _request(
    index: int, prompt_ids: tuple[int, ...], params: DecodingParams, model: ServedModel
) -> EngineRequest:
    try:
        return model.llm.request(index, prompt_ids, params)
    except InputError as error:
        raise bad_request(error) from error


def derived_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice: the first has the request's own, so that it is what `n` 1 gives.

    Those of the others are 63 bits of a hash, so that neighbouring seeds share no choices. So is
    that of the first where the sampler has no such seed, as for a negative one.
    """
    if seed is None or (choice == 0 and 0 <= seed < NUM_SEEDS):
        return seed
    digest = blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % NUM_SEEDS


# --- the prompts ----------------------------------------------------------------------------------


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def _prompts(prompt: Any) -> list[Any]:
    """One prompt or several, as texts or lists of token ids."""
    is_several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if is_several else [prompt]


def _shown(prompt: Any) -> Any:
    """A text or messages as they are; the token ids of a prompt are shown anyway."""
    return None if isinstance(prompt[0], int) else prompt


def _encode(prompt: Any, name: str, model: ServedModel) -> tuple[int, ...]:
    try:
        prompt_ids = model.llm.encode(prompt, raw=True)
    except InputError as error:
        code = CONTEXT_ERROR if isinstance(error, TooLong) else None
        raise bad_request(error, name, code) from error
    most = model.options.max_prompt_tokens
    if most is not None and len(prompt_ids) > most:
        message = f"the prompt has {len(prompt_ids)} tokens, and this server takes {most}"
        raise ApiError(400, message, param=name, code=CONTEXT_ERROR)
    vocab_size = model.llm.model.config.vocab_size
    if max(prompt_ids, default=0) >= vocab_size:
        message = f"`{name}` holds a token id outside the vocabulary of {vocab_size}"
        raise ApiError(400, message, param=name)
    if not prompt_ids:
        raise ApiError(400, f"`{name}` has no tokens", param=name)
    return prompt_ids


# --- how they are decoded -------------------------------------------------------------------------


def _params(body: Request, options: DmaxOptions, model: ServedModel) -> DecodingParams:
    """The settings, but for the number of new tokens."""
    length = model.block_length
    if options.block_length not in (None, length):
        message = f"`dmax.block_length` must be that of the checkpoint, {length}"
        raise _wrong("dmax.block_length", message)
    is_named = options.strategy not in (None, AUTO)
    given: dict[str, Any] = {
        "strategy": options.strategy if is_named else model.strategy,
        "threshold": options.threshold,
        "stop_confidence": options.stop_confidence,
        "top_k": options.top_k,
        "max_steps_per_block": options.max_steps_per_block,
        "options": options.options,
        "ignore_eos": options.ignore_eos,
        "temperature": body.temperature,
        "stop": body.stop,
    }
    most = model.options.max_seconds
    deadline = most if options.deadline is None else min(options.deadline, most)
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return DecodingParams(**given, deadline=deadline)
    except InputError as error:
        raise bad_request(error) from error


def _strategy(params: DecodingParams, options: DmaxOptions, model: ServedModel) -> Strategy:
    """The strategy of the settings, which goes with the model and knows all that is given."""
    try:
        # Subclasses are dataclasses, which mypy cannot know.
        found = fields(strategy_class(params.strategy))  # type: ignore[arg-type]
    except InputError as error:
        raise bad_request(error, "dmax.strategy") from error
    known = {entry.name for entry in found}
    for name in ("threshold", "stop_confidence", "top_k"):
        if getattr(options, name) is not None and name not in known:
            raise _wrong(f"dmax.{name}", f"strategy `{params.strategy}` has no `{name}`")
    try:
        check_client(options.options or {}, params, "dmax.options.head")
        strategy = get_strategy(params)
        strategy.open(fresh_block(model.block_length))  # a head may be made for shorter ones
        strategy.check_weights(model.llm.model.named_parameters())
    except InputError as error:
        raise bad_request(error, "dmax.options") from error
    return strategy


def _num_new(
    body: Request, num_prompt: int, strategy: Strategy, name: str, model: ServedModel
) -> int:
    """New tokens of an answer: as many as are asked for, and as the context has room for."""
    wanted = {"max_tokens": body.max_tokens}
    if isinstance(body, ChatRequest):
        wanted["max_completion_tokens"] = body.max_completion_tokens
    for field, number in wanted.items():
        if number is not None and number > model.max_new_tokens:
            message = f"`{field}` must be at most {model.max_new_tokens}, got {show(number)}"
            raise _wrong(field, message)
    room = model.room(num_prompt, strategy.num_branches)
    if room < 1:
        message = (
            f"the prompt has {num_prompt} tokens, which leaves no room for an answer in the "
            f"context of {model.context}; shorten it"
        )
        raise ApiError(400, message, param=name, code=CONTEXT_ERROR)
    given = [number for number in wanted.values() if number is not None]
    return min(*(given or (NUM_NEW, model.max_new_tokens)), room)


def _num_top(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise _wrong("top_logprobs", "`top_logprobs` is given, and `logprobs` is not true")
    return (body.top_logprobs or 0) if body.logprobs else None


def _check_choices(num_choices: int, prompts: Sequence[Any], model: ServedModel) -> None:
    most = model.options.max_choices
    if num_choices > most:
        raise _wrong("n", f"`n` must be at most {most}, got {show(num_choices)}")
    if len(prompts) > most:
        raise _wrong("prompt", f"`prompt` holds {len(prompts)} prompts, at most {most} are taken")


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
