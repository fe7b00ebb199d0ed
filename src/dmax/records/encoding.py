"""From conversations to token ids: what a model is shown, and what it learns of that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from dmax.chat_template import (
    MAX_TOKEN,
    check_fits,
    encode_texts,
    has_template,
    render_chat,
    tokenizer_digest,
    turn_ending,
)
from dmax.errors import InputError, did_you_mean, show
from dmax.records.readers import Conversation, read_conversation
from dmax.records.tables import map_table, read_table
from dmax.special_ids import SpecialIds

logger = logging.getLogger(__name__)

TOO_LONG = ("error", "truncate", "skip")
"""What may be done about an example that does not fit."""


class Encoded(TypedDict):
    """One example as token ids.

    Attributes:
        prompt_ids: of the prompt.
        response_ids: of what is learnt: the response and the ending of its turn, without EOS.
        is_cut: whether the ids were cut, so that no EOS is learnt after them; False if missing.
        where: where the example comes from, for errors.
        trajectory: how the response was decoded, JSON; None or missing where nobody says.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    is_cut: NotRequired[bool]
    where: NotRequired[str]
    trajectory: NotRequired[str | None]


@dataclass(frozen=True, slots=True)
class Rules:
    """How conversations become token ids.

    Attributes:
        max_length: most ids of prompt, response, ending and EOS labels.
        eos_labels: how many EOS are learnt after a response.
        eos_token_id: the EOS that is learnt.
        ending: ids between a response and its EOS.
        too_long: what is done about an example of more ids: `error` raises, `skip` leaves it out,
            `truncate` cuts its ids, EOS labels included, and leaves it out only if its prompt alone
            has so many.
    """

    max_length: int
    eos_labels: int
    eos_token_id: int
    ending: tuple[int, ...]
    too_long: str

    def __post_init__(self) -> None:
        """Raises `InputError` if nobody knows what to do about an example that is too long."""
        check_too_long(self.too_long)


def encode_dataset(
    dataset: Any,
    tokenizer: Any,
    special_ids: SpecialIds,
    *,
    max_length: int,
    eos_labels: int | None = None,
    too_long: str = "error",
    end_turn: bool = True,
    num_proc: int | None = None,
    name: str = "the data",
    report: Callable[[str], None] = logger.warning,
) -> Any:
    """The examples of a data set as token ids (`Encoded`).

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a list: of records that a reader
            knows, of conversations, or of examples, which are given back as they are.
        tokenizer: of transformers; without a chat template, a prompt is the text of one message.
        special_ids: those of the checkpoint.
        max_length: most ids of an example with its EOS labels.
        eos_labels: how many EOS are learnt after a response; None: one block.
        too_long: `error`, `truncate` (no EOS is learnt where the text has not ended) or `skip`.
        end_turn: whether what the chat template writes after an answer is learnt too, before EOS.
        num_proc: processes that work side by side; None: as many as pay.
        name: of the data set, for errors.
        report: told how many examples were cut or left out.

    Returns:
        As `dataset`: a cached `Dataset`, a stream, or a list.

    Raises:
        InputError: there is no example, a record is wrong, or an example is too long; says which.
    """
    if is_encoded(dataset):
        return dataset
    _check_encodable(dataset, tokenizer, name)
    rules = Rules(
        max_length,
        special_ids.block_length if eos_labels is None else eos_labels,
        special_ids.eos_token_ids[0],
        ending_ids(tokenizer, special_ids.eos_token_ids) if end_turn else (),
        too_long,
    )
    if isinstance(dataset, Sequence):
        encoded: Any = _encode(tokenizer, rules, _conversations(dataset, name))
    else:
        encoded = map_table(
            read_table(dataset, name, num_proc=num_proc),
            _encode_rows,
            {"tokenizer": tokenizer, "rules": rules},
            _features(),
            identity=(tokenizer_digest(tokenizer), rules),
            num_proc=num_proc,
        )
    if hasattr(encoded, "__len__"):
        _report(len(dataset), encoded, max_length, report)
    return encoded


def check_too_long(value: object) -> None:
    """Raise `InputError` unless a value says what to do about examples that are too long."""
    if value not in TOO_LONG:
        raise InputError(
            f"`too_long` must be one of {', '.join(TOO_LONG)}, got {show(value)}",
            did_you_mean(value, TOO_LONG),
        )


def is_encoded(dataset: Any) -> bool:
    """Whether a data set holds examples already."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Mapping):
        columns = dataset[0]
    return columns is not None and "prompt_ids" in columns and "response_ids" in columns


def ending_ids(tokenizer: Any, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids that the chat template writes after an answer, up to the first EOS.

    EOS itself is learnt after every response anyway. An end of turn that is another of the EOS ids
    than the first is part of the ending.
    """
    [ids] = encode_texts(tokenizer, [turn_ending(tokenizer)])
    ends = [index for index, token in enumerate(ids) if token in eos_token_ids]
    if not ends:
        return tuple(ids)
    end = ends[0]
    return tuple(ids[:end] if ids[end] == eos_token_ids[0] else ids[: end + 1])


def _check_encodable(dataset: Any, tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        raise InputError(
            f"there is no tokenizer to encode {name} with",
            hint="pass `processing_class`, or examples that are `prompt_ids` and `response_ids`",
        )
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, Mapping):
        splits = ", ".join(map(str, columns))
        raise InputError(f"{name} is a mapping of the splits {splits}", hint="pass one of them")
    is_list = isinstance(dataset, Sequence) and not isinstance(dataset, (str, bytes))
    if not is_list and not hasattr(dataset, "map"):
        raise InputError(
            f"{name} must be a list of records, or a Dataset or IterableDataset of them, "
            f"got {show(dataset)}"
        )


def _conversations(records: Sequence[Any], name: str) -> list[Conversation]:
    """What the records of a list teach."""
    return [
        record
        if isinstance(record, Conversation)
        else read_conversation(record, f"{name}, row {number}")
        for number, record in enumerate(records, 1)
    ]


def _encode_rows(
    columns: Mapping[str, list[Any]], tokenizer: Any, rules: Rules
) -> dict[str, list[Any]]:
    """Columns of examples from some columns of conversations."""
    rows = zip(*(columns[name] for name in Conversation._fields), strict=True)
    examples = _encode(tokenizer, rules, [Conversation(*row) for row in rows])
    return {name: [example[name] for example in examples] for name in Encoded.__annotations__}


def _encode(
    tokenizer: Any, rules: Rules, conversations: Sequence[Conversation]
) -> list[dict[str, Any]]:
    """The examples of some conversations, without those that are left out."""
    texts = [_prompt_text(tokenizer, each, rules) for each in conversations]
    asked = [text or "" for text in texts]
    prompts = encode_texts(tokenizer, asked, is_whole=has_template(tokenizer))
    responses = encode_texts(tokenizer, [each.response for each in conversations])
    examples = [
        _example(prompt_ids, [*response_ids, *rules.ending], each, rules)
        for text, prompt_ids, response_ids, each in zip(
            texts, prompts, responses, conversations, strict=True
        )
        if text is not None
    ]
    return [example for example in examples if example is not None]


def _prompt_text(tokenizer: Any, conversation: Conversation, rules: Rules) -> str | None:
    """The text of a prompt up to where the assistant answers; None if it is far too long."""
    size = sum(len(message["content"]) for message in conversation.messages)
    room = rules.max_length * MAX_TOKEN
    if size > room and rules.too_long != "error":
        return None
    try:
        check_fits(size, "characters", room)
        return render_chat(tokenizer, conversation.messages, limit=2 * room)
    except InputError as error:
        raise InputError(f"{conversation.where}: {error.message}", error.hint) from None


def _example(
    prompt_ids: list[int], response_ids: list[int], conversation: Conversation, rules: Rules
) -> dict[str, Any] | None:
    """An example as the rules want it; None if it is left out."""
    room = rules.max_length - len(prompt_ids)
    learnt = [*response_ids, *[rules.eos_token_id] * rules.eos_labels]
    is_cut = len(learnt) > room
    if is_cut and rules.too_long == "error":
        raise InputError(
            f"{conversation.where}: {len(prompt_ids)} prompt and {len(response_ids)} response "
            f"tokens leave no room for {rules.eos_labels} EOS in `max_length` {rules.max_length}",
            hint="raise `max_length` up to the model's context, or choose another `too_long` than "
            "`error`: `truncate` or `skip`",
        )
    if is_cut and (rules.too_long == "skip" or room <= 0):
        return None
    return {
        "prompt_ids": prompt_ids,
        "response_ids": learnt[:room] if is_cut else response_ids,
        "is_cut": is_cut,
        "where": conversation.where,
        "trajectory": conversation.trajectory,
    }


def _report(total: int, encoded: Any, max_length: int, report: Callable[[str], None]) -> None:
    """Say how many examples were cut or left out; raises `InputError` if none is left."""
    count = len(encoded)
    if not count:
        longer = f": all of {total} are longer than {max_length} tokens" if total else ""
        raise InputError(f"there is no example to learn from{longer}")
    if isinstance(encoded, list):
        num_cut = sum(example["is_cut"] for example in encoded)
    else:
        num_cut = int(encoded.with_format("numpy")["is_cut"][:].sum())
    if count < total:
        report(f"left out {total - count} of {total} examples, longer than {max_length} tokens")
    if num_cut:
        report(f"cut {num_cut} of {total} examples after {max_length} tokens")


def _features() -> Any:
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    kinds = {"prompt_ids": ids, "response_ids": ids, "is_cut": Value("bool")}
    return Features(kinds | {"where": Value("string"), "trajectory": Value("string")})
