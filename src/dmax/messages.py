"""Chat messages: what a prompt or a training record may hold, and the one form they take here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmax.errors import InputError, did_you_mean, show

ROLES = ("system", "user", "assistant")
"""Those that every chat template of the field knows. Tools are not supported."""


def read_messages(value: Any) -> list[dict[str, str]]:
    """The messages of a chat, each with a `role` and a `content` that are texts.

    A content may be a list of text parts, `[{"type": "text", "text": …}]`, as OpenAI's interface
    has it; they are put together with nothing between them. No other key is taken: a template would
    pass over it in silence. One whose value is None says nothing and is left out.

    Args:
        value: what should be a list of mappings, such as JSON gives.

    Raises:
        InputError: it is something else; names the message by its place, from 1.
    """
    if not _is_list(value):
        raise InputError(f"chat messages must be a list, got {show(value)}")
    if not value:
        raise InputError("a chat needs at least one message, got an empty list")
    return [_message(each, number) for number, each in enumerate(value, 1)]


def _message(value: Any, number: int) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"message {number} must be a mapping with `role` and `content`, got {show(value)}"
        )
    _check_keys(value, {"role", "content"}, f"message {number}")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(
            f"the role of message {number} must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, "
            f"got {show(role)}",
            did_you_mean(str(role), ROLES) if isinstance(role, str) else None,
        )
    content = _content(value.get("content"), number)
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can write what no text holds
        raise InputError(f"message {number} holds half of a surrogate pair") from None
    return {"role": role, "content": content}


def _content(value: Any, number: int) -> str:
    if isinstance(value, str):
        return value
    if not _is_list(value) or not value:
        raise InputError(
            f"the content of message {number} must be a text or a list of text parts, "
            f"got {show(value)}"
        )
    return "".join(_part(part, number) for part in value)


def _part(value: Any, number: int) -> str:
    if isinstance(value, Mapping) and value.get("type") == "text":
        _check_keys(value, {"type", "text"}, f"a part of message {number}")
        text = value.get("text")
        if isinstance(text, str):
            return text
    raise InputError(
        f"message {number} has a part that is not text, {show(value)}",
        hint='a part is {"type": "text", "text": …}; images, sound and files are not read',
    )


def _check_keys(value: Mapping[Any, Any], known: set[str], what: str) -> None:
    others = [key for key, content in value.items() if key not in known and content is not None]
    if others:
        names = " and ".join(f"`{name}`" for name in sorted(known))
        raise InputError(f"{what} takes {names} only, got {show(others[0])}")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
