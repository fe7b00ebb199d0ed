"""Examples as batches: padding, labels, order, and what no model can learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmax.errors import InputError
from dmax.records.encoding import Encoded
from dmax.training.data import Collator, LengthSampler, check_examples, num_ids

WRONG = [
    ([1, 2], [], "a response without tokens"),
    ([1, -1], [3], "-1 is not a token id"),
    ([1], [9], "9 is not a token id"),
    ([7], [3], "the text holds the mask token"),
    ([1], [3, 7], "the text holds the mask token"),
]
NO_IDS = [
    ([1, 2], [True], "True is not a token id below 9"),
    ([1, 2.0], [3], "2.0 is not a token id"),
    (b"\1\2", [3], "token ids must be a list, got b"),
    (["1"], [3], "'1' is not a token id"),
    ([1], [10**5000], "a number of 5001 digits is not a token id"),
]


def encoded(prompt: Any, response: Any, **more: Any) -> Encoded:
    return Encoded(prompt_ids=prompt, response_ids=response, **more)


@pytest.mark.parametrize(("prompt", "response", "message"), [*WRONG, *NO_IDS])
def test_ids_that_no_model_can_learn_are_refused(prompt: Any, response: Any, message: str) -> None:
    right = encoded([1, 2], [0, 8], where="line 1")
    with pytest.raises(InputError, match=f"line 2: {message}"):
        check_examples([right, encoded(prompt, response, where="line 2")], 9, mask_token_id=7)
    with pytest.raises(InputError, match=f"example 2: {message}"):
        check_examples([right, encoded(prompt, response)], 9, mask_token_id=7)


@pytest.mark.parametrize("form", ["table", "stream"])
@pytest.mark.parametrize(
    ("prompt", "response", "message"), [*WRONG, ([None, 1], [3], "None is not a token id")]
)
def test_ids_of_a_table_are_checked_too(
    prompt: Any, response: Any, message: str, form: str
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [encoded([1, 2], [0, 8])] * 30_000 + [encoded(prompt, response, where="line 3")]
    if form == "stream":
        table = datasets.IterableDataset.from_generator(lambda: iter(rows[-2:]))
        assert next(iter(check_examples(table, 9, 7))) == rows[0]
    else:
        table = datasets.Dataset.from_list([row | {"where": "line"} for row in rows[:-1]])
        assert check_examples(table, 9, 7) is table
        table = datasets.concatenate_datasets([table, datasets.Dataset.from_list(rows[-1:])])
    with pytest.raises(InputError, match=f"line 3: {message}"):
        list(check_examples(table, 9, 7))


LENGTHS = [(5, 4), (3, 30), (8, 8), (1, 7), (16, 1), (2, 15)]


@pytest.mark.parametrize("batch", [[index] for index in range(6)] + [[0, 2, 3], list(range(6))])
@pytest.mark.parametrize("pad_to", [None, 41, 48, 64])
def test_a5_labels_one_block_of_trailing_eos(batch: list[int], pad_to: int | None) -> None:
    """Whatever else is in the batch, and where it ends: alone, with its like, with longer ones."""
    collate = Collator(block_length=8, eos_token_id=0, eos_labels=8, pad_to=pad_to)
    examples = [encoded([1] * LENGTHS[index][0], [2] * LENGTHS[index][1]) for index in batch]
    fields = collate(examples)
    longest = pad_to or max(sum(LENGTHS[index]) for index in batch) + 8
    assert fields["clean_ids"].shape == (len(batch), -(-longest // 8) * 8)
    for row, index in enumerate(batch):
        prompt, response = LENGTHS[index]
        expected = [-100] * prompt + [2] * response + [0] * 8
        labels = fields["labels"][row].tolist()
        assert labels == expected + [-100] * (len(labels) - len(expected))
        ids = fields["clean_ids"][row].tolist()
        assert ids == [1] * prompt + [2] * response + [0] * (len(ids) - prompt - response)
        # Padding is noise too (D6), without loss.
        assert fields["corruptible"][row].tolist() == [False] * prompt + [True] * (
            len(ids) - prompt
        )


def test_a_text_that_was_cut_has_not_ended() -> None:
    collate = Collator(block_length=8, eos_token_id=0, eos_labels=8)
    fields = collate([encoded([1] * 5, [2] * 11, is_cut=True), encoded([1], [2])])
    assert fields["clean_ids"].shape == (2, 16)
    assert fields["labels"][0].tolist() == [-100] * 5 + [2] * 11
    assert fields["labels"][1].tolist() == [-100, 2] + [0] * 8 + [-100] * 6


def test_an_example_that_is_longer_than_the_padding_is_refused() -> None:
    collate = Collator(block_length=8, eos_token_id=0, eos_labels=8, pad_to=24)
    fits = [encoded([1] * 8, [2] * 8), encoded([1] * 8, [2] * 16, is_cut=True)]
    collate.check(fits)
    assert collate(fits)["clean_ids"].shape == (2, 24)
    with pytest.raises(InputError, match="`pad_to` must be at least 25, .* got 24"):
        collate.check([*fits, encoded([1] * 8, [2] * 9)])


def test_lengths_of_a_table_are_those_of_its_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [encoded([1] * prompt, [2] * response) for prompt, response in LENGTHS]
    table = datasets.Dataset.from_list(rows)
    assert num_ids(rows).tolist() == num_ids(table).tolist() == [list(each) for each in LENGTHS]
    assert num_ids(table.select([4, 1])).tolist() == [[16, 1], [3, 30]]
    assert num_ids([]).shape == (0, 2)


def test_batches_of_similar_length_cover_everything_once() -> None:
    counts = np.array([(10 + index % 7, 2 + index % 5) for index in range(53)])
    sampler = LengthSampler(counts, batch_size=4, seed=1, window=4)
    first = list(sampler)
    assert sorted(first) == list(range(53))
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    lengths = counts.sum(axis=1)
    spreads = [np.ptp(lengths[first[begin : begin + 4]]) for begin in range(0, 48, 4)]
    assert sum(spreads) / len(spreads) < 4 < np.ptp(lengths)


def test_an_example_that_is_left_over_comes_too() -> None:
    """The last window may hold a single one."""
    counts = np.array([[1, length] for length in range(9)])
    assert sorted(LengthSampler(counts, batch_size=2, seed=0, window=4)) == list(range(9))
