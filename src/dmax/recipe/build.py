"""From the sections of a recipe to a model and to the data that it learns from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dmax.checkpoint import Checkpoint, load_checkpoint, new_checkpoint
from dmax.environment import DTYPES
from dmax.recipe.sections import DataSection, ModelSection, model_config
from dmax.records.encoding import encode_dataset
from dmax.records.readers import Conversation, get_reader
from dmax.records.sources import files_of, load_conversations
from dmax.records.tables import generate_conversations
from dmax.tasks.word_problems import Numbers, problems
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.start import longest

SHUFFLED_TOGETHER = 10_000
"""Conversations of a stream that are held in memory, of which the next is drawn at random."""


def build_checkpoint(
    section: ModelSection, device: torch.device, *, attention: str | None = None
) -> Checkpoint:
    """The checkpoint to continue, on a device, or a new model on the CPU.

    On the meta device it is a model without weights, and none are read. `attention` is the
    implementation if the section names none.
    """
    attention = section.attn_implementation or attention
    if section.path is not None:
        return load_checkpoint(
            section.path,
            dtype=DTYPES.get(section.dtype, "auto"),
            device=device,
            block_length=section.block_length,
            shift=section.shift,
            attn_implementation=attention,
            experts_implementation=section.experts_implementation,
            add_mask_token=section.add_mask_token,
        )
    tokenizer = build_tokenizer()
    with torch.device("meta" if device.type == "meta" else "cpu"):
        return new_checkpoint(
            model_config(section.config or {}, tokenizer),
            tokenizer,
            dtype=DTYPES[section.dtype],
            attn_implementation=attention,
            experts_implementation=section.experts_implementation or "eager",
        )


def read_data(section: DataSection) -> Any:
    """The conversations that are learnt, as a table or a stream of `datasets`.

    It takes no model, so a wrong record should not cost the loading of one.

    Raises:
        InputError: there is no such data, or a record is wrong.
    """
    if section.streaming:
        stream = _conversations(section)
        return stream.shuffle(seed=section.seed, buffer_size=SHUFFLED_TOGETHER)
    return _conversations(section)


def _conversations(section: DataSection) -> Any:
    if section.problems is not None:
        arguments = {
            "count": section.problems,
            "seed": section.seed,
            "numbers": Numbers(**section.numbers),
        }
        return generate_conversations(draw_problems, arguments, streaming=section.streaming)
    return load_conversations(
        section.source(),
        reader=get_reader(section.reader, section.columns),
        streaming=section.streaming,
        num_proc=section.num_proc,
    )


def held_out(section: DataSection) -> DataSection | None:
    """The section of the held-out records, which are read as the others are; None without any."""
    if section.eval_file is None:
        return None
    return replace(
        section,
        file=section.eval_file,
        eval_file=None,
        hub=None,
        problems=None,
        config=None,
        split="train",
        revision=None,
        streaming=False,
    )


def encode_data(
    section: DataSection,
    conversations: Any,
    checkpoint: Checkpoint,
    *,
    eos_labels: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Any:
    """The examples as token ids, as `encode_dataset` makes them of a table or a stream."""
    return encode_dataset(
        conversations,
        checkpoint.tokenizer,
        checkpoint.special_ids,
        max_length=longest(section.max_length, checkpoint.model.config, checkpoint.special_ids),
        eos_labels=eos_labels,
        too_long=section.too_long,
        end_turn=section.end_turn,
        num_proc=section.num_proc,
        report=report,
    )


def data_digest(section: DataSection) -> str | None:
    """SHA-256 of the files that are learnt; None if there is none, or not yet."""
    if section.file is None or not os.path.exists(section.source().path):
        return None
    digest = hashlib.sha256()
    for file in files_of(section.source()):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def draw_problems(count: int, seed: int, numbers: Numbers) -> Iterator[Conversation]:
    """Problems of the bundled generator, with their worked solutions."""
    drawn = problems(count, seed=seed, split="train", numbers=numbers)
    for number, problem in enumerate(drawn, 1):
        question = {"role": "user", "content": problem.question}
        yield Conversation([question], problem.response, f"word_problems, {number}")
