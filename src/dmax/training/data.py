"""From prompts and responses to padded training batches.

A record is one JSON object per line: `{"prompt": …, "response": …}`, `{"question": …, "answer": …}`
(the released trajectories), or `{"messages": [… , {"role": "assistant", "content": …}]}`. The
prompt goes through the tokenizer's chat template; the response follows it, then EOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from dmax.errors import InputError
from dmax.files import json_lines
from dmax.training.clean_stream import IGNORE


class Conversation(NamedTuple):
    """What a record says.

    Attributes:
        messages: of the prompt, each with `role` and `content`.
        response: what is to be learnt.
        where: file and line, or where else it comes from, for errors.
    """

    messages: list[dict[str, str]]
    response: str
    where: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: prompt and response token ids, EOS not included."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def read_records(path: str | Path) -> list[Conversation]:
    """The record of every line of a JSONL file that is not blank.

    Raises:
        InputError: the file is missing or empty, or a line is not such a record; names file and
            line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"training data `{path}` is not a file", hint="write it with `dmax distill`"
        )
    records = [_conversation(record, where) for where, record in json_lines(path)]
    if not records:
        raise InputError(f"training data `{path}` holds no record")
    return records


def _conversation(record: Any, where: str) -> Conversation:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")

    if "messages" in record:
        messages = _checked_messages(record["messages"], where)
        response: Any = messages.pop()["content"]
    else:
        keys = ("prompt", "response") if "prompt" in record else ("question", "answer")
        prompt, response = (record.get(key) for key in keys)
        if not isinstance(prompt, str):
            raise InputError(
                f"{where}: no prompt", hint="a record has `prompt` and `response`, or `messages`"
            )
        messages = [{"role": "user", "content": prompt}]

    if not isinstance(response, str) or not response.strip():
        raise InputError(f"{where}: a record without a response")
    try:
        "".join((response, *(message["content"] for message in messages))).encode()
    except UnicodeEncodeError:  # JSON can write what no text holds
        raise InputError(f"{where}: a text holds half of a surrogate pair") from None
    return Conversation(messages, response, where)


def _checked_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(
            f"{where}: `messages` must be a list of objects whose `role` and `content` are texts"
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last of `messages` must be the assistant's, the response to learn, "
            "and others before it"
        )
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Any, max_length: int
) -> list[Encoded]:
    """The token ids of every conversation, which is all that the trainer needs of a dataset.

    Args:
        conversations: prompts and responses.
        tokenizer: a transformers tokenizer with a chat template.
        max_length: longest prompt + response + one block of EOS that fits the context.

    Raises:
        InputError: there is no example, or one is longer than `max_length`; says which.
    """
    if not conversations:
        raise InputError("there is no example to learn from")
    examples = []
    for messages, response, where in conversations:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        example = Encoded(prompt, tokenizer.encode(response, add_special_tokens=False))
        if len(example) >= max_length:
            raise InputError(
                f"{where}: {len(prompt)} prompt and {len(example.response)} response tokens "
                f"leave no room for EOS in `max_length` {max_length}",
                hint="drop the record or raise `max_length` up to the model's context",
            )
        examples.append(example)
    return examples


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads encoded examples to whole blocks with EOS and labels what is to be learnt.

    Attributes:
        block_length: every sequence is padded to a multiple of it.
        eos_token_id: end of the response and padding.
        eos_labels: how many trailing EOS carry a label; the rest are padding without loss. One
            block of them teaches a model to fill its last block (A5 in docs/paper.md).
        pad_to: pad every batch to this length instead of its longest sequence, for static shapes.
    """

    block_length: int
    eos_token_id: int
    eos_labels: int
    pad_to: int | None = None

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        """The fields of a `CleanBatch` by name."""
        longest = self.pad_to or max(len(example) for example in examples) + 1
        length = -(-longest // self.block_length) * self.block_length
        clean = torch.tensor(
            [
                example.prompt + example.response + [self.eos_token_id] * (length - len(example))
                for example in examples
            ]
        )
        position = torch.arange(length)
        prompts = torch.tensor([[len(example.prompt)] for example in examples])  # [B, 1]
        ends = torch.tensor([[len(example)] for example in examples])  # [B, 1]
        corruptible = position >= prompts
        labelled = corruptible & (position < ends + self.eos_labels)
        return {
            "clean_ids": clean,
            "labels": clean.masked_fill(~labelled, IGNORE),
            "corruptible": corruptible,
            "start": int(prompts.min()) // self.block_length * self.block_length,
        }


@dataclass(eq=False)
class LengthSampler(Sampler[int]):
    """A seeded shuffle whose batches hold examples of similar length, so that little is padding.

    Every epoch shuffles anew: windows of `batch_size * window` random examples are sorted by
    length, cut into batches, and the batches shuffled. A pure function of (seed, epoch), hence the
    same after a resume.

    Attributes:
        examples: what is to be ordered.
        batch_size: examples of a batch.
        seed: of the shuffles.
        window: batches that are sorted by length together.
        epoch: what the training loop sets.
    """

    examples: Sequence[Encoded]
    batch_size: int
    seed: int
    window: int = 32
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        lengths = [(len(example), len(example.prompt)) for example in self.examples]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        for window in order.split(self.batch_size * self.window):
            by_length = torch.tensor(sorted(window.tolist(), key=lengths.__getitem__))
            batches = by_length.split(self.batch_size)
            num_whole = len(window) // self.batch_size
            shuffled = torch.randperm(num_whole, generator=generator).tolist()
            for index in (*shuffled, *range(num_whole, len(batches))):
                yield from batches[index].tolist()
