"""From examples to padded training batches. What an example is stands in `dmax.records.encoding`.

A data set is a list of examples, a `datasets.Dataset` of them, which lies in Arrow files and is
looked at by columns, or an `IterableDataset`, which is looked at while it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from dmax.errors import InputError, show
from dmax.records.encoding import Encoded
from dmax.training.vocabulary import IGNORE

IDS = ("prompt_ids", "response_ids")
ROWS = 10_000  # of a table that are looked at together


def check_examples(examples: Any, vocab_size: int, mask_token_id: int) -> Any:
    """The examples, once it is sure that a model can learn from them; a stream checks on its way.

    Args:
        examples: prompts and responses.
        vocab_size: of the model.
        mask_token_id: MASK, which stands for a position without a token and is never learnt.

    Raises:
        InputError: a response is empty, or an id is not of the vocabulary or is MASK; says which.
    """
    check = partial(check_example, vocab_size=vocab_size, mask_token_id=mask_token_id)
    if not hasattr(examples, "__len__"):
        return examples.map(check)
    suspects: Any = enumerate(examples)
    if hasattr(examples, "with_format"):
        suspects = _suspects(examples, vocab_size, mask_token_id)
    for index, example in suspects:
        check(example, where=f"example {index + 1}")
    return examples


def _suspects(table: Any, vocab_size: int, mask_token_id: int) -> Iterator[tuple[int, Any]]:
    """Number and example of every row that lies near one that no model can learn from."""
    plain = table.with_format(None)
    for first in range(0, len(table), ROWS):
        rows = range(first, min(first + ROWS, len(table)))
        columns = table.select_columns(IDS).with_format("arrow")[rows.start : rows.stop]
        lists = [columns[name].combine_chunks() for name in IDS]
        is_fine = not any(each.null_count or each.flatten().null_count for each in lists)
        for ids in lists if is_fine else ():
            values = ids.flatten().to_numpy(zero_copy_only=False)
            is_fine &= values.dtype.kind in "iu" and bool(
                ((values >= 0) & (values < vocab_size) & (values != mask_token_id)).all()
            )
        if not is_fine or not num_ids(table.select(rows))[:, 1].all():
            yield from zip(rows, plain.select(rows), strict=True)


def check_example(
    example: Mapping[str, Any],
    vocab_size: int,
    mask_token_id: int,
    where: str = "an example",
) -> Mapping[str, Any]:
    """The example; raises `InputError` if no model can learn from it."""
    where = example.get("where", where)
    for name in IDS:
        if not isinstance(example[name], list):  # bytes are whole numbers, too, and no token ids
            raise InputError(f"{where}: token ids must be a list, got {show(example[name])}")
    if not example["response_ids"]:
        raise InputError(f"{where}: a response without tokens")
    for token in (*example["prompt_ids"], *example["response_ids"]):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InputError(
                f"{where}: {show(token)} is not a token id below {vocab_size}",
                hint="does the tokenizer belong to the model?",
            )
        if token == mask_token_id:
            raise InputError(
                f"{where}: the text holds the mask token",
                hint="it stands for what is not written yet; drop the record",
            )
    return example


def num_ids(examples: Any) -> np.ndarray:
    """How many ids the prompt and the response of every example have, [N, 2] int64."""
    if not hasattr(examples, "with_format"):
        counts = [[len(example[name]) for name in IDS] for example in examples]
        return np.array(counts, dtype=np.int64).reshape(-1, 2)
    from pyarrow import compute

    parts = [
        np.stack([compute.list_value_length(columns[name]).to_numpy() for name in IDS], axis=1)
        for columns in examples.select_columns(IDS).with_format("arrow").iter(ROWS)
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads examples to whole blocks with EOS and labels what is to be learnt.

    Every response is followed by its EOS labels, in the next block too if its own has no room for
    all of them; only one that was cut has none.

    Attributes:
        block_length: every sequence is padded to a multiple of it.
        eos_token_id: end of the response and padding.
        eos_labels: how many EOS carry a label; the rest are padding without loss. One block of them
            teaches a model to fill its last block (A5 in docs/paper.md).
        pad_to: pad every batch to this length instead of its longest sequence, for static shapes.
        end_ids: other tokens that end a response, too.
    """

    block_length: int
    eos_token_id: int
    eos_labels: int
    pad_to: int | None = None
    end_ids: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The fields of a `CleanBatch` by name.

        Raises:
            InputError: an example is longer than `pad_to`.
        """
        ids = [[*example["prompt_ids"], *example["response_ids"]] for example in examples]
        cut = torch.tensor([[example.get("is_cut", False)] for example in examples])  # [B, 1]
        prompts = torch.tensor([[len(example["prompt_ids"])] for example in examples])  # [B, 1]
        ends = torch.tensor([[len(each)] for each in ids])  # [B, 1]
        ends = ends + self.eos_labels * ~cut

        length = self._length(int(ends.max()))
        clean = torch.tensor([each + [self.eos_token_id] * (length - len(each)) for each in ids])
        position = torch.arange(length)
        corruptible = position >= prompts
        labelled = corruptible & (position < ends)
        return {
            "clean_ids": clean,
            "labels": clean.masked_fill(~labelled, IGNORE),
            "corruptible": corruptible,
        }

    def check(self, examples: Any, known: tuple[int, int] | None = None) -> None:
        """Raise `InputError` if an example is longer than `pad_to`; of a stream nobody knows.

        A collator that reads more ids than a text's looks at them too, where the size of the
        vocabulary and MASK are `known`.
        """
        if self.pad_to is None or not hasattr(examples, "__len__"):
            return
        for index in np.flatnonzero(num_ids(examples).sum(axis=1) + self.eos_labels > self.pad_to):
            self([examples[int(index)]])  # one that was cut needs no room for EOS

    def _length(self, longest: int) -> int:
        """Positions of a batch whose longest sequence has so many with its labels."""
        if self.pad_to is not None and longest > self.pad_to:
            raise InputError(
                f"`pad_to` must be at least {longest}, the tokens of the longest example with its "
                f"EOS, got {self.pad_to}"
            )
        return -(-(self.pad_to or longest) // self.block_length) * self.block_length


@dataclass(eq=False)
class LengthSampler(Sampler[int]):
    """A seeded shuffle whose batches hold examples of similar length, so that little is padding.

    Every epoch shuffles anew: windows of `batch_size * window` random examples are sorted by
    length, cut into batches, and the batches shuffled. A pure function of (seed, epoch), hence the
    same after a resume.

    Attributes:
        counts: of the ids of prompt and response of each example, [N, 2] (`num_ids`).
        batch_size: examples of a batch.
        seed: of the shuffles.
        window: batches that are sorted by length together.
        epoch: what the training loop sets.
    """

    counts: np.ndarray
    batch_size: int
    seed: int
    window: int = 32
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        for window in order.split(self.batch_size * self.window):
            prompts, responses = self.counts[window.numpy()].T
            # By all ids, then by those of the prompt; equals stay in their random order.
            by_length = window[torch.from_numpy(np.lexsort((prompts, prompts + responses)))]
            batches = by_length.split(self.batch_size)
            num_whole = len(window) // self.batch_size
            shuffled = torch.randperm(num_whole, generator=generator).tolist()
            for index in (*shuffled, *range(num_whole, len(batches))):
                yield from batches[index].tolist()
