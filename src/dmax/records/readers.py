"""Readers: which columns of a record hold the prompt and the response.

A record is a mapping, such as a line of JSON or a row of a table. Its columns tell which reader
takes it; where several would, the caller names one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from dmax.errors import InputError, did_you_mean, show
from dmax.messages import read_messages

Chat = list[dict[str, str]]
"""Messages, each with `role` and `content`."""


class Conversation(NamedTuple):
    """What a record teaches.

    Attributes:
        messages: of the prompt.
        response: what is to be learnt.
        where: file and line, or where else it comes from, for errors.
        trajectory: how the response was decoded, JSON that only some objectives read; None where
            the record does not say.
    """

    messages: Chat
    response: str
    where: str
    trajectory: str | None = None


class Prompt(NamedTuple):
    """What a record asks.

    Attributes:
        prompt: a text, which is one message of the user's, or else a chat up to the answer.
        reference: the answer that the record has; None if it has none.
        where: file and line, or where else it comes from, for errors.
    """

    prompt: str | Chat
    reference: str | None
    where: str


@dataclass(frozen=True, slots=True)
class Reader:
    """Which columns hold what.

    Attributes:
        name: what recipes call it.
        prompt: the column of the prompt, a text or a chat.
        response: the column of the response, a text or a chat of one message; None: the response is
            the last message of the chat in `prompt`.
        system: the column of a system prompt, which may be missing.
    """

    name: str
    prompt: str
    response: str | None = None
    system: str | None = None


PUBLISHED = (  # columns of data sets on the hub: Numina-Math, OpenThoughts, OpenCodeInstruct
    Reader("numina", "problem", "solution"),
    Reader("openthoughts", "conversations", system="system"),
    Reader("opencode", "input", "output"),
)
GENERAL = (
    Reader("messages", "messages"),
    Reader("prompt_response", "prompt", "response"),
    Reader("prompt_completion", "prompt", "completion"),
    Reader("question_answer", "question", "answer"),
)
READERS = {reader.name: reader for reader in (*PUBLISHED, *GENERAL)}
BESIDE = ("system", "tools")
"""What some data sets have beside the chat, for the template to place."""
ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of chats whose messages have `from` and `value`."""


def get_reader(name: str | None, columns: Mapping[str, str] | None = None) -> Reader | None:
    """The reader that a user names, or of the columns that they name; None if they name neither.

    Args:
        name: one of `READERS`.
        columns: the column of the `prompt`, and that of the `response` unless the chat in `prompt`
            ends with it.

    Raises:
        InputError: there is no such reader, or no such part of a record.
    """
    if columns:
        if name is not None:
            raise InputError("`reader` and `columns` exclude each other", hint="leave one out")
        unknown = [key for key in columns if key not in ("prompt", "response", "system")]
        if unknown or "prompt" not in columns:
            raise InputError(
                "`columns` names the column of `prompt`, and those of `response` and `system` if "
                f"there are any, got {show(dict(columns))}"
            )
        return Reader("columns", **columns)
    if name is not None and name not in READERS:
        choices = ", ".join(READERS)
        raise InputError(
            f"`reader` must be one of {choices}, got {name!r}", did_you_mean(name, READERS)
        )
    return None if name is None else READERS[name]


def read_conversation(record: Any, where: str, reader: Reader | None = None) -> Conversation:
    """What a record teaches.

    Args:
        record: a mapping; a column whose value is None counts as missing.
        where: its place, with which errors begin.
        reader: of its columns; None recognises it by them.

    Raises:
        InputError: it is not such a record.
    """
    with _at(where):
        columns = _columns(record)
        chosen = reader or _recognise(columns)
        messages = read_messages(_chat(columns, chosen))
        if chosen.response is not None:
            messages += read_messages([_answer(columns, chosen.response)])
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError(
                f"the last of `{chosen.response or chosen.prompt}` must be the assistant's, "
                "the response to learn, and others before it"
            )
        *prompt, answer = messages
        if not answer["content"].strip():
            raise InputError("a record without a response")
    followed = columns.get("trajectory")
    trajectory = None if followed is None else json.dumps(followed, default=str)
    return Conversation(prompt, answer["content"], where, trajectory)


def read_prompt(record: Any, where: str, reader: Reader | None = None) -> Prompt:
    """What a record asks. A chat that ends with an answer is asked up to its first answer.

    The arguments are those of `read_conversation`.

    Raises:
        InputError: the record has no prompt.
    """
    with _at(where):
        columns = _columns(record)
        chosen = reader or _recognise_prompt(columns)
        messages = read_messages(_chat(columns, chosen))
        answer = columns.get(chosen.response or "")
        if chosen.response is None and messages[-1]["role"] == "assistant":
            answer = messages[-1]["content"]
            messages = [*takewhile(lambda each: each["role"] != "assistant", messages)]
        if not messages or not messages[-1]["content"].strip():
            raise InputError(f"no prompt: `{chosen.prompt}` is blank")
    is_text = [message["role"] for message in messages] == ["user"]
    prompt = messages[0]["content"] if is_text else messages
    return Prompt(prompt, answer if isinstance(answer, str) else None, where)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors from within are of a record at this place."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from None


def _columns(record: Any) -> dict[str, Any]:
    """What a record holds, without columns that hold nothing."""
    if not isinstance(record, Mapping):
        raise InputError(f"expected a JSON object, got {show(record)}")
    return {name: value for name, value in record.items() if value is not None}


def _recognise(columns: Mapping[str, Any]) -> Reader:
    """The reader of a record with prompt and response."""
    complete = _complete(columns)
    if not complete:
        asking = _recognise_prompt(columns)
        raise InputError(f"a record without a response to `{asking.prompt}`")
    return _only(complete)


def _recognise_prompt(columns: Mapping[str, Any]) -> Reader:
    """The reader of a record with a prompt, if need be without a response."""
    asking: dict[str, Reader] = {}
    for reader in READERS.values():
        if reader.prompt in columns:
            asking.setdefault(reader.prompt, reader)
    if not asking:
        raise InputError(
            "no prompt",
            hint="a record has `prompt` and `response`, or `messages`; "
            "`reader` and `columns` name other columns",
        )
    return _only(_complete(columns) or list(asking.values()))


def _complete(columns: Mapping[str, Any]) -> list[Reader]:
    return [
        reader
        for reader in READERS.values()
        if reader.prompt in columns and (reader.response or reader.prompt) in columns
    ]


def _only(readers: list[Reader]) -> Reader:
    """The one reader that fits. A published data set may repeat its columns as `messages`."""
    if readers[0] in PUBLISHED:
        readers = [reader for reader in readers if reader.name != "messages"]
    if len(readers) == 1:
        return readers[0]
    names = " and ".join(reader.name for reader in readers)
    raise InputError(
        f"the columns fit the readers {names}", hint="name one as `reader`, or name the `columns`"
    )


def _chat(columns: Mapping[str, Any], reader: Reader) -> Any:
    """The messages of the prompt column, a system prompt before them."""
    for name in BESIDE:
        if name in columns and name != reader.system:
            raise InputError(
                f"`{name}` beside the chat would not be learnt",
                hint="leave it out, or make it one of `messages`",
            )
    if reader.prompt not in columns:
        raise InputError(f"no prompt: `{reader.prompt}` is missing")
    value = columns[reader.prompt]
    chat = [_message(each) for each in value] if _is_list(value) else value
    is_chat = reader.response is None and reader in READERS.values()  # columns of chats by name
    if isinstance(value, str) and not is_chat:
        chat = [{"role": "user", "content": value}]
    system = columns.get(reader.system or "")
    return [{"role": "system", "content": system}, *chat] if system and _is_list(chat) else chat


def _message(message: Any) -> Any:
    """A message with `from` and `value` as one with `role` and `content`."""
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    role = message["from"]
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role} | {
        "content" if key == "value" else key: value
        for key, value in message.items()
        if key != "from"
    }


def _answer(columns: Mapping[str, Any], name: str) -> Any:
    """The assistant's message in a response column: a text, or a chat of one message."""
    value = columns.get(name)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _message(value[0])
    if not isinstance(value, str):
        raise InputError(f"a record without a response: `{name}` is {show(value)}")
    return {"role": "assistant", "content": value}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
