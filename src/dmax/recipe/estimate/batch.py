"""The largest batch of a run: of its own examples if they are few and here, else of the longest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dmax.records.encoding import Encoded, encode_dataset
from dmax.records.readers import Conversation, get_reader
from dmax.records.sources import read_conversations
from dmax.records.trajectories import Trajectory
from dmax.tasks.word_problems import Numbers
from dmax.training.start import longest, make_collator

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
        max_length=longest(data.max_length, shape.model.config, shape.special_ids),
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


def largest_batch(
    examples: Sequence[Encoded] | None, data: DataSection, args: DMaxConfig, shape: ModelShape
) -> dict[str, Tensor]:
    """The fields of the objective's largest batch.

    Without examples all of its sequences are as long as the recipe admits, and all but the first
    block of each is response.
    """
    ids = shape.special_ids
    num_sequences = args.per_device_train_batch_size
    collate = make_collator(ids, args)
    if examples is not None:
        return collate(sorted(examples, key=_length, reverse=True)[:num_sequences])
    positions = args.pad_to or longest(data.max_length, shape.model.config, ids)
    length = -(-positions // ids.block_length) * ids.block_length
    return collate([_longest(length, ids.block_length)] * num_sequences)


def _longest(length: int, block_length: int) -> Encoded:
    """An example of so many ids, without EOS, that was decoded a token a step."""
    num_prompt = min(block_length, length - block_length)
    num_response = length - num_prompt
    trajectory = Trajectory(
        prompt_tokens=num_prompt,
        block_length=block_length,
        writes=[[1 + place % block_length, 0] for place in range(num_prompt, length)],
    )
    return Encoded(
        prompt_ids=[0] * num_prompt,
        response_ids=[0] * num_response,
        is_cut=True,
        trajectory=json.dumps(trajectory),
    )


def _length(example: Encoded) -> int:
    return len(example["prompt_ids"]) + len(example["response_ids"])
