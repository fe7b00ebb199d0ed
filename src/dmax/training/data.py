"""From prompts and responses to padded training batches.

A record is one JSON object per line: `{"prompt": …, "response": …}`, `{"question": …, "answer": …}`
(the released trajectories), or `{"messages": [… , {"role": "assistant", "content": …}]}`. The
prompt goes through the tokenizer's chat template; the response follows it, then EOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from dmax.chat_template import encode_chat
from dmax.errors import InputError, show
from dmax.files import json_lines
from dmax.messages import read_messages
from dmax.training.vocabulary import IGNORE

BESIDE = ("system", "tools")  # what other formats have beside the chat, for the template to place


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
    """One example: prompt and response token ids, EOS not included.

    Attributes:
        prompt: ids of the prompt.
        response: ids of what is to be learnt.
        where: where the example comes from, for errors.
    """

    prompt: list[int]
    response: list[int]
    where: str = "an example"

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def read_records(path: str | Path) -> list[Conversation]:
    """The record of every line of a JSONL file that is not blank.

    Raises:
        InputError: the file is missing or empty, or a line is not such a record; names file and
            line.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"training data `{path}` is not a file", hint="write it with `dmax distill`"
        )
    records = [_conversation(record, where) for where, record in json_lines(path)]
    if not records:
        raise InputError(f"training data `{path}` holds no record")
    return records


def _conversation(record: Any, where: str) -> Conversation:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {show(record)}")
    try:
        messages = read_messages(_messages(record))
    except InputError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from None
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last of `messages` must be the assistant's, the response to learn, "
            "and others before it"
        )
    *prompt, response = messages
    if not response["content"].strip():
        raise InputError(f"{where}: a record without a response")
    return Conversation(prompt, response["content"], where)


def _messages(record: dict[str, Any]) -> Any:
    """The chat of a record, whichever names it has for it."""
    for name in BESIDE:
        if record.get(name) is not None:
            raise InputError(
                f"`{name}` beside the chat would not be learnt",
                hint="leave it out, or make it one of `messages`",
            )
    if "messages" in record:
        return record["messages"]
    keys = ("prompt", "response") if "prompt" in record else ("question", "answer")
    prompt, response = (record.get(key) for key in keys)
    if not isinstance(prompt, str):
        raise InputError("no prompt", hint="a record has `prompt` and `response`, or `messages`")
    if not isinstance(response, str):
        raise InputError("a record without a response")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


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
        try:
            prompt = encode_chat(tokenizer, messages, max_length)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", error.hint) from None
        example = Encoded(prompt, tokenizer.encode(response, add_special_tokens=False), where)
        if len(example) >= max_length:
            raise InputError(
                f"{where}: {len(prompt)} prompt and {len(example.response)} response tokens "
                f"leave no room for EOS in `max_length` {max_length}",
                hint="drop the record or raise `max_length` up to the model's context",
            )
        examples.append(example)
    return examples


def check_examples(examples: Iterable[Encoded], vocab_size: int, mask_token_id: int) -> None:
    """Make sure that a model can learn from examples.

    Args:
        examples: prompts and responses.
        vocab_size: of the model.
        mask_token_id: MASK, which stands for a position without a token and is never learnt.

    Raises:
        InputError: a response is empty, or an id is not of the vocabulary or is MASK; says which.
    """
    for example in examples:
        for ids in (example.prompt, example.response):
            if not isinstance(ids, list):  # bytes are whole numbers, too, and no token ids
                raise InputError(f"{example.where}: token ids must be a list, got {show(ids)}")
        if not example.response:
            raise InputError(f"{example.where}: a response without tokens")
        for token in (*example.prompt, *example.response):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise InputError(
                    f"{example.where}: {show(token)} is not a token id below {vocab_size}",
                    hint="does the tokenizer belong to the model?",
                )
            if token == mask_token_id:
                raise InputError(
                    f"{example.where}: the text holds the mask token",
                    hint="it stands for what is not written yet; drop the record",
                )


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
