"""From the sections of a recipe to a model and to the data that it learns from."""

from __future__ import annotations

from collections.abc import Sequence

from dmax.checkpoint import Checkpoint, load_checkpoint, new_checkpoint
from dmax.environment import DTYPES, select_device
from dmax.recipe.sections import DataSection, ModelSection, model_config
from dmax.tasks.word_problems import Numbers, problems
from dmax.tiny.tokenizer import build_tokenizer
from dmax.training.data import Conversation, Encoded, encode_conversations, read_records


def build_checkpoint(section: ModelSection) -> Checkpoint:
    """The checkpoint to continue on the best device, or a new model on the CPU."""
    if section.path is not None:
        return load_checkpoint(
            section.path,
            dtype=DTYPES.get(section.dtype, "auto"),
            device=select_device("auto"),
            block_length=section.block_length,
            attn_implementation=section.attn_implementation,
            experts_implementation=section.experts_implementation,
            add_mask_token=section.add_mask_token,
        )
    tokenizer = build_tokenizer()
    return new_checkpoint(
        model_config(section.config or {}, tokenizer),
        tokenizer,
        dtype=DTYPES[section.dtype],
        attn_implementation=section.attn_implementation,
        experts_implementation=section.experts_implementation or "eager",
    )


def read_data(section: DataSection) -> list[Conversation]:
    """What is to be learnt; raises `InputError` for a record that is wrong.

    It takes no model, so a wrong record should not cost the loading of one.
    """
    return _draw(section) if section.file is None else read_records(section.file)


def encode_data(
    section: DataSection, conversations: Sequence[Conversation], checkpoint: Checkpoint
) -> list[Encoded]:
    """The examples as token ids; raises `InputError` for one that is too long."""
    context = checkpoint.model.config.max_position_embeddings
    max_length = min(section.max_length or context, context)
    return encode_conversations(conversations, checkpoint.tokenizer, max_length)


def _draw(section: DataSection) -> list[Conversation]:
    numbers = Numbers(**section.numbers)
    drawn = problems(section.problems or 0, seed=section.seed, split="train", numbers=numbers)
    return [
        Conversation(
            [{"role": "user", "content": problem.question}],
            problem.response,
            f"word_problems, {number}",
        )
        for number, problem in enumerate(drawn, 1)
    ]
