"""What responses hold, for the OpenAPI page. Answers are not checked against it on their way out.

`tests/serve` checks that they are what this says.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dmax.outputs import FinishReason

DONE = "[DONE]"
SCHEMAS = "#/components/schemas/"


class Reply(BaseModel):
    """An object of a response, with no other fields."""

    model_config = ConfigDict(extra="forbid")


class Usage(Reply):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Cost(Reply):
    """What decoding cost."""

    num_forwards: int = Field(description="Denoising forwards, one for every step of a block.")
    num_prefill_forwards: int = Field(description="Forwards that encoded the prompt.")
    num_commit_forwards: int = Field(description="Forwards that only stored finished blocks.")
    num_positions: int = Field(description="Positions that the forwards computed.")
    num_forced: int = Field(description="Steps in which the strategy promoted nothing.")
    num_capped: int = Field(description="Blocks that were closed by the cap on steps.")
    tokens_per_forward: float = Field(description="TPF: new tokens per denoising forward.")
    seconds: float = Field(description="From the start of the request to its end.")


class ChoiceDetails(Cost):
    """What one choice cost, and how it ended."""

    token_ids: list[int] = Field(description="Of the choice, without the token that ended it.")
    finish_reason: FinishReason = Field(
        description='Like that of the choice, which is "length" for a "deadline".'
    )


class AnswerDetails(Cost):
    """How the choices were decoded, and what all of them cost."""

    strategy: str
    threshold: float | None = Field(description="The one in effect; null: there is none.")
    stop_confidence: float | None = Field(description="The one in effect; null: there is none.")
    top_k: int | None
    max_steps_per_block: int | None
    block_length: int
    options: dict[str, bool | int | float | str | None]
    ignore_eos: bool
    deadline: float | None = Field(description="Seconds; the server's own if none was asked for.")
    max_new_tokens: int = Field(description="`max_tokens`, or less where the context ends.")
    temperature: float
    seed: int | None


class Candidate(Reply):
    """A token and how sure the model was of it."""

    token: str
    logprob: float = Field(description="Natural logarithm; -9999 stands for probability 0.")
    bytes: list[int] | None = Field(description="UTF-8; null for a part of a character.")


class TokenLogprob(Candidate):
    """A token of the answer, at the forward that settled it."""

    top_logprobs: list[Candidate]


class ChatLogprobs(Reply):
    """Of each token of a choice."""

    content: list[TokenLogprob]
    refusal: None


class ChatMessage(Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Reply):
    """One answer."""

    index: int
    finish_reason: Literal["stop", "length"]
    dmax: ChoiceDetails


class ChatChoice(Choice):
    """One answer to a chat."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(Reply):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dmax: AnswerDetails


class CompletionLogprobs(Reply):
    """Of each token of a choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Choice):
    """One way in which a text goes on."""

    text: str
    logprobs: CompletionLogprobs | None


class Completion(Reply):
    """How texts go on."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    dmax: AnswerDetails


class Chunk(Reply):
    """A piece of an answer. One without choices is for those who asked for it."""

    id: str
    created: int
    model: str
    usage: Usage | None = Field(default=None, description="In the last chunk, if asked for.")
    dmax: dict[str, Any] | None = Field(
        default=None,
        description='By `kind`: "begin", "provisional" or "committed" if every forward is asked '
        'for, "finished" at the end of each choice.',
    )


class ChatDelta(Reply):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    """What is new of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(Chunk):
    """A piece of the answer to a chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionChunkChoice(Reply):
    """What is new of a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Chunk):
    """A piece of how texts go on."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class StrategyCard(Reply):
    """A decoding strategy that requests may name."""

    threshold: float | None = Field(description="Its own; null: it has none.")


class ModelDetails(Reply):
    """How a model decodes, and its limits."""

    strategy: str = Field(description="What it was trained for.")
    threshold: float | None
    strategies: dict[str, StrategyCard]
    block_length: int
    mask_token_id: int
    max_length: int = Field(description="Tokens of a prompt and its answer.")
    max_new_tokens: int = Field(description="The largest `max_tokens`.")


class ModelCard(Reply):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["dmax"]
    dmax: ModelDetails


class ModelList(Reply):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(Reply):
    """Whether all models are loaded and warm."""

    status: Literal["ok", "loading"]
    loading: list[str] = Field(description="Models that are not ready.")


class ErrorDetails(Reply):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field that was wrong; null: no single one.")
    code: str | None = Field(description="For programs; null: the status says it all.")


class ErrorBody(Reply):
    """The body of every error."""

    error: ErrorDetails


def _error(description: str, **more: Any) -> dict[str, Any]:
    return {"model": ErrorBody, "description": description, **more}


_RETRY_AFTER = {
    "headers": {
        "Retry-After": {
            "description": "Seconds after which another try may succeed.",
            "schema": {"type": "integer"},
        }
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    401: _error("The key is missing or wrong."),
    403: _error("The host or the web page is not allowed."),
    503: _error("A model is still being loaded, or the server is shutting down.", **_RETRY_AFTER),
    "default": _error("Any other error."),
}
"""Those of every route."""
ANSWER_ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("A field is unknown, wrong, or asks for what cannot be done; it is named."),
    404: _error("No model of this name is served."),
    408: _error("The body did not come in time."),
    413: _error("The body is too large."),
    429: _error("Too many requests or tokens are in progress.", **_RETRY_AFTER),
    500: _error("The model or the strategy could not decode the request."),
    **ERRORS,
}
"""Those of the routes that decode."""


def answers(whole: type[Reply], chunk: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that decodes.

    Args:
        whole: the answer at once.
        chunk: a piece of it in a stream.
    """
    written = [{"$ref": f"{SCHEMAS}{each.__name__}"} for each in (chunk, ErrorBody)]
    content = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": written},
    }
    data = {
        "description": "A chunk, or an error that ends the stream; [DONE] in the last event.",
        "anyOf": [{"const": DONE}, content],
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    response = {
        "model": whole,
        "content": {"text/event-stream": {"itemSchema": event}},
        "description": "The answer, whole or as a stream.",
    }
    return {200: response, **ANSWER_ERRORS}
