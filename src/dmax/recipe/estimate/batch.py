"""The largest batch of a run: of its own examples if they are few and here, else of the longest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmax.records.encoding import Encoded, encode_dataset
from dmax.records.readers import Conversation, get_reader
from dmax.records.sources import read_conversations
from dmax.tasks.word_problems import Numbers
from dmax.training.data import Collator
from dmax.training.vocabulary import IGNORE

if TYPE_CHECKING:
    from dmax.recipe.estimate.shape import ModelShape
    from dmax.recipe.sections import DataSection
    from dmax.training.config import DMaxConfig

FEW = 20_000
"""Problems that are drawn and tokenised for an estimate, a few seconds' worth."""
SMALL = 20 * 2**20
"""Bytes of a file that is read and tokenised for an estimate."""


def read_examples(
    data: DataSection, args: DMaxConfig, shape: ModelShape
) -> Sequence[Encoded] | None:
    """All examples of a run; None if they are not here, or too many for an estimate.

    Raises:
        InputError: one of them is wrong, as in training.
    """
    conversations = _conversations(data)
    if conversations is None or shape.tokenizer is None:
        return None
    examples: Sequence[Encoded] = encode_dataset(
        list(conversations),
        shape.tokenizer,
        shape.special_ids,
        max_length=_max_length(data, shape),
        eos_labels=args.eos_labels,
        too_long=data.too_long,
        end_turn=data.end_turn,
        report=lambda _: None,
    )
    return examples


def _conversations(data: DataSection) -> Iterable[Conversation] | None:
    if data.problems is not None:
        from dmax.recipe.build import draw_problems

        numbers = Numbers(**data.numbers)
        return draw_problems(data.problems, data.seed, numbers) if data.problems <= FEW else None
    path = data.file and data.source().path
    if not path or not os.path.isfile(path) or os.path.getsize(path) > SMALL:
        return None
    return read_conversations(data.source(), get_reader(data.reader, data.columns))


def _max_length(data: DataSection, shape: ModelShape) -> int:
    context: int = shape.model.config.max_position_embeddings
    return min(data.max_length or context, context)


def largest_batch(
    examples: Sequence[Encoded] | None, data: DataSection, args: DMaxConfig, shape: ModelShape
) -> dict[str, Tensor]:
    """The fields of the largest `CleanBatch`.

    Without examples all of its sequences are as long as the recipe admits, and all but the first
    block of each is response.
    """
    ids = shape.special_ids
    num_sequences = args.per_device_train_batch_size
    if examples is not None:
        eos_labels = ids.block_length if args.eos_labels is None else args.eos_labels
        collate = Collator(ids.block_length, ids.eos_token_ids[0], eos_labels, args.pad_to)
        return collate(sorted(examples, key=_length, reverse=True)[:num_sequences])
    positions = args.pad_to or _max_length(data, shape)
    length = -(-positions // ids.block_length) * ids.block_length
    clean_ids = torch.zeros(num_sequences, length, dtype=torch.int64)
    prompt = min(ids.block_length, length - ids.block_length)
    is_response = torch.arange(length).expand_as(clean_ids) >= prompt
    return {
        "clean_ids": clean_ids,
        "labels": clean_ids.masked_fill(~is_response, IGNORE),
        "corruptible": is_response,
    }


def _length(example: Encoded) -> int:
    return len(example["prompt_ids"]) + len(example["response_ids"])
