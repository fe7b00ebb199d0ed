"""Fine-tune an autoregressive model on prompts and responses: each token predicts the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from dmax.checkpoint import Checkpoint
from dmax.environment import weights_digest
from dmax.recipe.folder import RunFolder
from dmax.recipe.run import UNTRACKED
from dmax.records.encoding import encode_dataset
from dmax.training.data import LengthSampler
from dmax.training.vocabulary import IGNORE

Record = Mapping[str, str]


def encode(records: Sequence[Record], checkpoint: Checkpoint) -> list[dict[str, list[int]]]:
    """Records with `prompt` and `response` as `input_ids` and `labels`.

    The response and one EOS are learnt, the prompt is only read. The model shifts the labels.
    """
    encoded = encode_dataset(
        list(records),
        checkpoint.tokenizer,
        checkpoint.special_ids,
        max_length=checkpoint.model.config.max_position_embeddings,
    )
    eos = checkpoint.special_ids.eos_token_ids[0]
    examples = []
    for example in encoded:
        prompt = list(example["prompt_ids"])
        learnt = [*example["response_ids"], eos]
        labels = [IGNORE] * len(prompt) + learnt
        examples.append({"input_ids": prompt + learnt, "labels": labels})
    return examples


class CausalTrainer(Trainer):
    """transformers' Trainer, with the batches of similar length that `DMaxTrainer` has."""

    def _get_train_sampler(self, *_: Any) -> LengthSampler:
        counts = np.array([[0, len(example["input_ids"])] for example in self.train_dataset])
        return LengthSampler(counts, self.args.train_batch_size, self.args.seed)


def train_causal(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    held_out: Sequence[Record],
    run: Path,
    settings: Mapping[str, Any],
) -> list[dict[str, float]]:
    """Fine-tune an autoregressive model in place, and go on from the last checkpoint in `run`.

    Args:
        checkpoint: a causal model of transformers with its tokenizer.
        records: `prompt` and `response`, in an order that the seed shuffles.
        held_out: of which the loss is measured, as `settings` says how often.
        run: the folder of checkpoints.
        settings: fields of transformers' `TrainingArguments`.

    Returns:
        What was logged.

    Raises:
        InputError: the checkpoints are of a run of other settings, data or weights, or there is
            none that can be read.
    """
    folder = RunFolder(run, tracked(checkpoint, records, settings))
    folder.find_checkpoint(print)
    trainer = CausalTrainer(
        checkpoint.model,
        TrainingArguments(output_dir=str(run), **settings),
        data_collator=DataCollatorForSeq2Seq(checkpoint.tokenizer, label_pad_token_id=IGNORE),
        train_dataset=encode(records, checkpoint),
        eval_dataset=encode(held_out, checkpoint),
        callbacks=[folder],
    )
    last = folder.last_checkpoint
    if last is not None and folder.is_trained():  # Trainer would take one step more
        trainer._load_from_checkpoint(str(last))
        return TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)).log_history
    folder.begin()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer.state.log_history


def tracked(
    checkpoint: Checkpoint, records: Sequence[Record], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the weights of a run depend on."""
    learnt = json.dumps([dict(record) for record in records])
    return {
        "weights": weights_digest(checkpoint.model),
        "data": hashlib.sha256(learnt.encode()).hexdigest(),
        "training": {
            name: value for name, value in settings.items() if not name.startswith(UNTRACKED)
        },
    }
