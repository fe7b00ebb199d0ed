"""What requests may hold: FastAPI checks them by it and draws the OpenAPI page from it.

What a field of OpenAI's interface asks and a block-diffusion model cannot do is refused by name.
The values of such a field that ask for nothing pass, since clients send them unasked.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from dmax.integrations.options import MOST_CANDIDATES
from dmax.params import MOST

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_TEMPERATURE = 1000
MAX_TOP_LOGPROBS = 20
MAX_OPTION = 1_000_000  # of a number that a strategy takes


def _as_int(value: Any) -> Any:
    """A number as JSON knows it: 2.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bounded(value: Any) -> Any:
    """An option of a strategy; a huge number would overflow in the middle of a forward."""
    if isinstance(value, int | float) and not abs(value) <= MAX_OPTION:
        raise PydanticCustomError(
            "option", "Input should be at most {most} in size", {"most": MAX_OPTION}
        )
    return value


WHOLE = BeforeValidator(_as_int)
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, le=MOST), WHOLE]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=MOST), WHOLE]
Seed = Annotated[int, WHOLE]
TopK = Annotated[int, Field(ge=1, le=MOST_CANDIDATES), WHOLE]
NumTop = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE]
Option = Annotated[bool | int | float | str | None, WHOLE, AfterValidator(_bounded)]


NO_TOOLS = "tools are not called here"
NO_SAMPLING = "tokens are drawn from the whole distribution"
NO_STORE = "nothing is stored"
TEXT_ONLY = "only text is read and written"


def optional(description: str, **bounds: Any) -> Any:
    """A field that may be null or missing."""
    return Field(default=None, description=description, **bounds)


def harmless(*values: Any, because: str) -> Any:
    """A field that takes nothing but null and `values`, for they ask for nothing.

    Args:
        values: as JSON has them.
        because: why everything else is refused.
    """
    *others, last = [json.dumps(value) for value in (None, *values)]
    choices = f"{', '.join(others)} or {last}" if others else last
    description = f"Takes {choices} only: {because}."
    return Field(default=None, description=description, json_schema_extra={"enum": [None, *values]})


class Body(BaseModel):
    """An object of a request. No field is passed over in silence, and no type is guessed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_asks_for_something(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        field = cls.model_fields[name]
        if isinstance(field.json_schema_extra, dict):
            choices: Any = field.json_schema_extra["enum"]
            if not any(_is_same(value, choice) for choice in choices):
                raise PydanticCustomError("unsupported", "{why}", {"why": field.description})
        return value


def _is_same(value: Any, choice: Any) -> bool:
    """Whether two values are the same JSON: true is not 1, and 1.0 is."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    # What clients add to messages, some of it to an answer that they send back.
    type: Any = harmless("text", "message", because=TEXT_ONLY)
    name: Any = harmless(because="chat templates know roles only")
    refusal: Any = harmless(because="answers are texts")
    annotations: Any = harmless([], because="answers are texts")
    audio: Any = harmless(because=TEXT_ONLY)
    function_call: Any = harmless(because=NO_TOOLS)
    tool_calls: Any = harmless([], because=NO_TOOLS)
    tool_call_id: Any = harmless(because=NO_TOOLS)


class StreamOptions(Body):
    """What a stream holds besides the answer."""

    include_usage: bool | None = optional("End with a chunk that has the usage.")
    include_obfuscation: Any = harmless(False, because="chunks are not padded")


class DmaxOptions(Body):
    """Beyond OpenAI's interface: how the answer is decoded, and what a stream shows of it."""

    strategy: str | None = optional("Name of the decoding; null: the model's own.")
    threshold: float | None = optional("Confidence from which a position is decoded.", ge=0, le=1)
    stop_confidence: float | None = optional(
        "A block that is this sure everywhere is finished.", gt=0, le=1
    )
    top_k: TopK | None = optional("Candidates that are blended into an input.")
    max_steps_per_block: Count | None = optional("Forwards that a block may take.")
    block_length: Count | None = optional("The checkpoint's own.")
    options: dict[str, Option] | None = optional("What the strategy alone knows.")
    ignore_eos: bool | None = optional("Go on after the end, up to `max_tokens`.")
    deadline: float | None = optional(
        "Seconds after which the answer ends with what there is.", ge=0, le=MOST
    )
    stream: Literal["settled", "provisional"] | None = optional(
        '"provisional" also streams every block after every forward.'
    )


class Request(Body):
    """What requests for chats and for completions have in common."""

    model: str = Field(description="One of those that /v1/models lists.")
    max_tokens: Count | None = optional("New tokens, at most.")
    temperature: float | None = optional("0 or null decodes greedily.", ge=0, le=MAX_TEMPERATURE)
    seed: Seed | None = optional("Of the sampling.")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = optional(
        "The answer ends before the first of these texts."
    )
    n: Count | None = optional("Answers to the same prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    dmax: DmaxOptions | None = None
    user: str | None = optional("Not looked at.")
    frequency_penalty: Any = harmless(0, because=NO_SAMPLING)
    presence_penalty: Any = harmless(0, because=NO_SAMPLING)
    logit_bias: Any = harmless({}, because=NO_SAMPLING)
    top_p: Any = harmless(1, because=NO_SAMPLING)


class ChatRequest(Request):
    """A chat that is to be answered."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = optional("The same as `max_tokens`.")
    logprobs: bool | None = optional(
        "Give the probability of each token at the forward that settled it."
    )
    top_logprobs: NumTop | None = optional("Candidates beside each token, at most.")
    safety_identifier: str | None = optional("Not looked at.")
    prompt_cache_key: str | None = optional("Not looked at.")
    parallel_tool_calls: bool | None = optional("Not looked at, without tools.")
    audio: Any = harmless(because=TEXT_ONLY)
    function_call: Any = harmless("none", "auto", because=NO_TOOLS)
    functions: Any = harmless([], because=NO_TOOLS)
    metadata: Any = harmless({}, because=NO_STORE)
    modalities: Any = harmless(["text"], because=TEXT_ONLY)
    moderation: Any = harmless(because="nothing is moderated")
    prediction: Any = harmless(because="drafts are the model's own")
    prompt_cache_options: Any = harmless(because=NO_STORE)
    prompt_cache_retention: Any = harmless(because=NO_STORE)
    reasoning_effort: Any = harmless("none", because="the model answers without reasoning first")
    response_format: Any = harmless({"type": "text"}, because="no form of the answer is enforced")
    service_tier: Any = harmless("auto", "default", because="all requests are served alike")
    store: Any = harmless(False, because=NO_STORE)
    tool_choice: Any = harmless("none", "auto", because=NO_TOOLS)
    tools: Any = harmless([], because=NO_TOOLS)
    verbosity: Any = harmless("medium", because="the model knows one length of answers")
    web_search_options: Any = harmless(because=NO_TOOLS)


class CompletionRequest(Request):
    """Texts or token ids that are to be continued as they are, without a chat template."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: NumTop | None = optional(
        "Candidates beside the probability of each token; null: neither."
    )
    best_of: Any = harmless(1, because="ask for `n`")
    echo: Any = harmless(False, because="the prompt is not decoded")
    suffix: Any = harmless("", because="texts are continued, not filled in")


def field_names(path: str) -> tuple[str, ...]:
    """Names of all fields that a request to an address may have, for hints."""
    asked = (ChatRequest, Message) if path.endswith("/chat/completions") else (CompletionRequest,)
    known = (*asked, DmaxOptions, StreamOptions)
    return tuple({name for each in known for name in each.model_fields})
