"""What a caller may pass as prompts, and the token ids that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch

from dmax.chat_template import check_fits, encode_chat, encode_text
from dmax.checkpoint import Checkpoint
from dmax.errors import InputError, shorten, show
from dmax.messages import read_messages

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | torch.Tensor | np.ndarray | Sequence[Message]

FORMS = "a text, a list of token ids or a list of chat messages"
ARRAYS = (np.ndarray, torch.Tensor)
TEXTS = (str, bytes, bytearray, memoryview)  # sequences, but no lists
ANY_CONTEXT = 2**20  # positions of a model that names no number of them


def split_prompts(prompts: object) -> list[Any]:
    """The prompts of a call that takes one prompt or several; each is read by `encode_prompt`.

    An array or tensor [N] of token ids is one prompt, one of [M, N] is M prompts.

    Raises:
        InputError: it is neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, ARRAYS):
        prompts = _as_array(prompts, "an array of prompts")
        if prompts.ndim not in (1, 2):
            raise InputError(
                f"an array of prompts must have one dimension or two, got {prompts.ndim}",
                hint="[N] is one prompt of token ids, [M, N] is M prompts",
            )
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if not _is_list(prompts):
        raise InputError(f"prompts must be a text or a list, got {show(prompts)}", _remedy(prompts))
    is_one = bool(prompts) and (_is_id(prompts[0]) or isinstance(prompts[0], Mapping))
    return [prompts] if is_one else list(prompts)


def encode_prompt(
    prompt: object, checkpoint: Checkpoint, name: str = "the prompt", *, raw: bool = False
) -> tuple[int, ...]:
    """Token ids of one prompt of any form, the chat template applied to messages and texts.

    Args:
        prompt: a text, a list of token ids (an array or tensor [N] too), or a list of messages.
        checkpoint: whose tokenizer and context decide.
        name: what errors call the prompt.
        raw: leave the chat template out of texts.

    Raises:
        InputError: it is of no known form, cannot fit the context, holds MASK, or the tokenizer or
            its chat template cannot take it.
    """
    context = getattr(checkpoint.model.config, "max_position_embeddings", None) or ANY_CONTEXT
    is_text = isinstance(prompt, str)
    if is_text or (_is_list(prompt) and prompt and isinstance(prompt[0], Mapping)):
        ids = _encode_text(prompt, checkpoint.tokenizer, context, name, raw)
    else:
        ids = _read_ids(prompt, context, name)
    mask = checkpoint.special_ids.mask_token_id
    if mask in ids:
        raise InputError(
            f"{name} holds the mask token {mask}, which stands for what is still to be written",
            hint="leave it out; positions to write are added after the prompt",
        )
    return tuple(ids)


def _encode_text(prompt: Any, tokenizer: Any, context: int, name: str, raw: bool) -> list[int]:
    """The token ids of a text, or of the text that the chat template makes of messages."""
    is_text = isinstance(prompt, str)
    if tokenizer is None:
        raise InputError(
            f"this checkpoint has no tokenizer to encode {name} with",
            hint="pass prompts as lists of token ids",
        )
    try:
        if is_text and raw:
            return encode_text(tokenizer, prompt, context)
        if is_text:
            return encode_chat(tokenizer, [{"role": "user", "content": prompt}], context)
        check_fits(len(prompt), "messages", context)
        return encode_chat(tokenizer, read_messages(prompt), context)
    except InputError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from error


def _read_ids(prompt: Any, context: int, name: str) -> list[int]:
    parts = prompt
    if isinstance(prompt, ARRAYS):
        parts = _as_array(prompt, name)
    is_array = isinstance(parts, np.ndarray) and parts.ndim == 1
    if is_array or _is_list(parts):
        check_fits(len(parts), "tokens", context, name)
        parts = parts.tolist() if is_array else parts
        if all(map(_is_id, parts)):
            return list(map(int, parts))
    raise InputError(f"{name} must be {FORMS}, got {show(prompt)}", _remedy(prompt))


def _as_array(value: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """An array or tensor as one of numpy.

    Raises:
        InputError: there is none with the same numbers: it is sparse, nested, quantized or of the
            device "meta".
    """
    if isinstance(value, np.ndarray):
        return value
    try:
        return value.detach().cpu().numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be a tensor of {value.dtype}, {value.layout}, on {value.device}: "
            f"{shorten(str(error))}",
            hint="token ids are whole numbers",
        ) from None


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, TEXTS)


def _is_id(value: object) -> bool:
    """Whether a value is a whole number; `True` and 1.0 are none."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_meta and type(value.item()) is int
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _remedy(value: object) -> str | None:
    """What the caller of something that is no prompt may have meant."""
    match value:
        case bytes() | bytearray() | memoryview():
            return "decode the bytes to a text"
        case Mapping() if "input_ids" in value:
            return "pass its `input_ids`"
        case Mapping():
            return "a message stands in a list, and has `role` and `content`"
        case np.ndarray() | torch.Tensor():
            return "token ids are whole numbers, one prompt a row"
        case Iterable() if not isinstance(value, Sequence):
            return "make a list of it"
    return None
