"""A chat as one text by the template of a tokenizer, and texts as token ids.

Without a template, one message of a user is the text to continue, and no other chat is known.

A template is a program that came with a checkpoint. transformers keeps it from the machine, but not
from computing for ever or writing 10^10 characters. So it runs in a process of its own, with limits
of time and memory, unless it plainly is a loop over the messages.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from dmax.errors import InputError, TooLong, shorten
from dmax.worker import Worker

MAX_TEMPLATE = 100_000  # characters; published ones have up to 20,000
MAX_PLAIN = 1000
LONG = 100_000  # characters of a chat of two short messages, with whatever is written around them
MAX_TOKEN = 64
"""Characters of a text for each position of the context. No text of words comes near it; what has
more is refused before it is rendered and tokenized."""
REMEDY = "put a chat_template.jinja into the folder of the checkpoint"
REPLY_SECONDS = 60  # of a busy machine; the process limits its own computing time
# Constants and parts of messages, put side by side and chosen by conditions.
PLAIN = (
    nodes.Output,
    nodes.TemplateData,
    nodes.Const,
    nodes.Name,
    nodes.If,
    nodes.Assign,
    nodes.Dict,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template, which then writes all special tokens itself."""
    return bool(tokenizer.chat_template)


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], room: int) -> list[int]:
    """The token ids of a chat, up to where the assistant answers.

    Args:
        tokenizer: of transformers.
        messages: as `dmax.messages.read_messages` gives them.
        room: token ids that there may be.

    Raises:
        InputError: as `render_chat` and `encode_text`.
    """
    size = sum(len(message["content"]) for message in messages)
    check_fits(size, "characters", room * MAX_TOKEN)
    text = render_chat(tokenizer, messages, limit=2 * room * MAX_TOKEN)
    return encode_text(tokenizer, text, room, is_whole=has_template(tokenizer))


def encode_texts(tokenizer: Any, texts: Sequence[str], *, is_whole: bool = True) -> list[list[int]]:
    """The token ids of texts, tokenized together: the tokenizers package does it on every core.

    Args:
        tokenizer: of transformers.
        texts: any.
        is_whole: whether they have all the special tokens that they should have.

    Raises:
        InputError: the tokenizer fails.
    """
    if not texts:
        return []
    try:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=not is_whole,
            return_attention_mask=False,
            verbose=False,
        )
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise _cannot_encode(error) from error
    return encoded["input_ids"]


def encode_text(tokenizer: Any, text: str, room: int, *, is_whole: bool = False) -> list[int]:
    """The token ids of a text.

    Args:
        tokenizer: of transformers.
        text: any.
        room: token ids that there may be.
        is_whole: whether the text has all the special tokens that it should have.

    Raises:
        InputError: the text is too long, holds half of a surrogate pair, or the tokenizer fails.
    """
    check_fits(len(text), "characters", 2 * room * MAX_TOKEN)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the text holds half of a surrogate pair") from None
    try:
        ids = list(tokenizer.encode(text, add_special_tokens=not is_whole))
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise _cannot_encode(error) from error
    check_fits(len(ids), "tokens", room)
    return ids


def _cannot_encode(error: Exception) -> InputError:
    return InputError(
        f"the tokenizer of this checkpoint cannot encode the text: {shorten(str(error))}"
    )


def check_fits(size: int, what: str, room: int, name: str = "the text") -> None:
    """Raise `TooLong` unless `size` is at most `room`."""
    if size > room:
        raise TooLong(
            f"{name} has {size} {what}, there is room for {room}", hint="shorten the prompt"
        )


def render_chat(
    tokenizer: Any, messages: list[dict[str, str]], limit: int, *, continues: bool = False
) -> str:
    """A chat as the template of a tokenizer writes it, up to where the assistant answers.

    Args:
        tokenizer: of transformers.
        messages: as `dmax.messages.read_messages` gives them.
        limit: characters that the text may have.
        continues: end after the last message instead, which is to be continued.

    Raises:
        InputError: the template is not usable, fails, hangs or writes more than `limit`, or there
            is none for more than one message of a user.
    """
    settings = {"add_generation_prompt": not continues, "continue_final_message": continues}
    return _render(tokenizer, messages, limit, settings)


def turn_ending(tokenizer: Any) -> str:
    """What the template of a tokenizer writes after a message of the assistant's.

    Two chats that differ in the answer alone end alike from there on. That also holds where a
    template strips the answer, rewrites it, or writes something before it.

    Returns:
        For example `<|role_end|>`; empty if the template writes nothing or takes no answers, or if
        there is none.

    Raises:
        InputError: the template is not usable.
    """
    if not has_template(tokenizer):
        return ""
    _template(tokenizer)
    settings = {"add_generation_prompt": False, "continue_final_message": False}
    question = {"role": "user", "content": "Which letter?"}
    try:
        first, second = (
            _render(tokenizer, [question, {"role": "assistant", "content": answer}], LONG, settings)
            for answer in ("a", "zz")
        )
    except InputError:  # it renders questions only, so its turns have no ending to learn
        return ""
    if first == second:  # the answer is left out
        return ""
    return os.path.commonprefix([first[::-1], second[::-1]])[::-1]


def _render(
    tokenizer: Any, messages: list[dict[str, str]], limit: int, settings: Mapping[str, bool]
) -> str:
    """The text that a template makes of a chat under settings of transformers' templates."""
    if not has_template(tokenizer):
        return _only_question(messages)
    template = _template(tokenizer)
    render = _render_here if _is_plain(template) else _render_elsewhere
    variables = {**tokenizer.special_tokens_map, **settings}
    text, reason = render(template, messages, variables, limit)
    if not reason and len(text) > limit:
        reason = f"it writes {len(text)} characters, there is room for {limit}"
    if reason:
        raise InputError(
            f"the chat template of this checkpoint fails: {shorten(reason)}",
            hint="correct its chat_template.jinja, or pass token ids",
        )
    return text


def _only_question(messages: list[dict[str, str]]) -> str:
    """The text of the one message that there may be without a template."""
    if [message["role"] for message in messages] != ["user"]:
        raise InputError(
            "this checkpoint has no chat template, so it takes one user message and nothing else",
            hint=REMEDY,
        )
    return messages[0]["content"]


def _render_here(
    template: str, messages: list[dict[str, str]], variables: Mapping[str, Any], limit: int
) -> tuple[str, str]:
    """The text of a plain template, or why there is none."""
    try:
        [text], _ = render_jinja_template(
            conversations=[messages], chat_template=template, **variables
        )
    except (TemplateError, TypeError, ValueError) as error:
        return "", str(error)
    return text, ""


def _render_elsewhere(
    template: str, messages: list[dict[str, str]], variables: Mapping[str, Any], limit: int
) -> tuple[str, str]:
    """The text of any template, or why there is none."""
    answer = _renderer().ask(json.dumps([template, messages, variables, limit]))
    if not answer:
        return "", "it takes too long, or too much memory"
    text, reason = json.loads(answer)
    return text, reason


def _template(tokenizer: Any) -> str:
    try:
        template = tokenizer.get_chat_template()  # of several, the default one
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"this checkpoint has no usable chat template: {shorten(str(error))}", hint=REMEDY
        ) from None
    if not isinstance(template, str):
        raise InputError(
            "this checkpoint has no usable chat template: it is not a text", hint=REMEDY
        )
    if len(template) > MAX_TEMPLATE:
        raise InputError(
            f"the chat template of this checkpoint has {len(template)} characters, "
            f"at most {MAX_TEMPLATE} are read"
        )
    return template


def tokenizer_digest(tokenizer: Any) -> str | None:
    """16 hexadecimal digits that tell tokenizers and their chat templates apart."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    for name in ("padding", "truncation"):  # left over from the last call
        rules.pop(name, None)
    content = json.dumps([rules, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@lru_cache(maxsize=16)
def _is_plain(template: str) -> bool:
    """Whether what a template writes is at most proportional to the messages.

    It has no calls, filters or arithmetic, no loop within a loop, and it reads the messages nowhere
    but in loops over them.
    """
    if len(template) > MAX_PLAIN:
        return False
    try:
        tree = ImmutableSandboxedEnvironment().parse(template)
    except (TemplateError, RecursionError):
        return False
    num_loops = sum(1 for _ in tree.find_all(nodes.For))
    num_readers = sum(name.name == "messages" for name in tree.find_all(nodes.Name))
    return num_loops == num_readers and all(map(_is_linear, tree.find_all(nodes.Node)))


def _is_linear(node: nodes.Node) -> bool:
    """Whether a part of a template makes nothing that grows faster than what it reads."""
    match node:
        case nodes.For(iter=nodes.Name(name="messages"), recursive=False):
            return next(node.find_all(nodes.For), None) is None
        case nodes.Pair(key=nodes.Const(), value=nodes.Const()):
            return True
        case nodes.For() | nodes.Pair():
            return False
        case _:
            return isinstance(node, PLAIN)


@cache
def _renderer() -> Worker:
    script = Path(__file__).with_name("chat_template_worker.py")
    worker = Worker(script, "the process that renders chat templates", REPLY_SECONDS)
    atexit.register(worker.stop)
    return worker
