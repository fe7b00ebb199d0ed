"""Benchmarks over a fixed set of rows, from a JSONL file or from the hub.

Every row is checked when the task is made, before a model is opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmax import extras
from dmax.errors import InputError, first_line, show
from dmax.files import json_lines
from dmax.tasks import Example


@dataclass(frozen=True, slots=True)
class HubDataset:
    """Where a benchmark lies on the hub, as `datasets.load_dataset` takes it.

    Attributes:
        path: name of the dataset.
        config: one of its configurations; None for a dataset that has only one.
        split: which of its rows.
    """

    path: str
    config: str | None
    split: str


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One row of a dataset.

    Attributes:
        fields: its values by their names.
        location: file and line, or number on the hub; errors begin with it.
    """

    fields: Mapping[str, Any]
    location: str

    def text(self, *names: str) -> str:
        """The first of these fields that is there.

        Raises:
            InputError: none is there, or the first is no text or a blank one.
        """
        found = next((name for name in names if self.fields.get(name) is not None), None)
        if found is None:
            raise self.wrong(f"{' or '.join(f'`{name}`' for name in names)} is missing")
        value = self.fields[found]
        if not isinstance(value, str):
            raise self.wrong(f"`{found}` must be a text, got {value!r:.40}")
        if not value.strip():
            raise self.wrong(f"`{found}` is empty")
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can write what no text holds
            raise self.wrong(f"`{found}` holds half of a surrogate pair") from None
        return value

    def optional_text(self, name: str) -> str:
        """The text of a field; empty if the field is missing or empty.

        Raises:
            InputError: the field is no text, or a blank one.
        """
        is_missing = self.fields.get(name) in (None, "")
        return "" if is_missing else self.text(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty if the field is missing.

        Raises:
            InputError: the field is something else.
        """
        value = self.fields.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(f"`{name}` must be a list of texts, got {value!r:.40}")
        return value

    def wrong(self, reason: str) -> InputError:
        """The error that says where the row is and what is wrong with it."""
        message = f"{self.location}: {reason}"
        return InputError(message, hint="docs/tasks.md lists the fields of every task")


class Benchmark(ABC):
    """A task over the rows of one published test set.

    All rows are read when the task is made. A bad row is an error then, not after hours of
    computing.
    """

    name: str
    hub: HubDataset
    max_new_tokens = 2048  # of the published evaluation, for every task (DMax section 4.1)

    def __init__(self, data: Path | None = None) -> None:
        if data is None:
            self._examples = [self.example(row) for row in rows_of_hub(self.hub)]
        else:
            self._examples = self._distinct_examples(data)

    @abstractmethod
    def example(self, row: DatasetRow) -> Example:
        """The example of a row; raises `InputError` if the row has none."""

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """The answer in a completion; None if there is none."""

    @abstractmethod
    def score(self, text: str, example: Example) -> bool:
        """Whether a completion answers the example."""

    def examples(self, limit: int, seed: int) -> list[Example]:
        """The first `limit` rows of the set, or all if it has fewer; `seed` changes nothing."""
        return self._examples[:limit]

    def _distinct_examples(self, data: Path) -> list[Example]:
        """The examples of a file; raises `InputError` if two ask the same."""
        first_asked: dict[str, str] = {}
        examples = []
        for row in rows_of_file(data):
            example = self.example(row)
            if example.prompt in first_asked:
                raise row.wrong(f"repeats the question of {first_asked[example.prompt]}")
            first_asked[example.prompt] = row.location
            examples.append(example)
        return examples


def rows_of_file(path: Path) -> Iterator[DatasetRow]:
    r"""Rows of a JSONL file, one object a line; blank lines are skipped.

    Only `\n` separates rows, since texts may hold other line breaks.

    Raises:
        InputError: the file is missing, unreadable or empty, or a line is not a JSON object. The
            error names file and line.
    """
    is_empty = True
    for location, value in json_lines(path):
        if not isinstance(value, dict):
            raise InputError(f"{location}: not a JSON object but {show(value, 40)}")
        is_empty = False
        yield DatasetRow(value, location)
    if is_empty:
        raise InputError(
            f"{path} holds no rows", hint="--data takes a JSONL file with one row a line"
        )


def rows_of_hub(hub: HubDataset) -> Iterator[DatasetRow]:
    """Rows of a dataset on the hub.

    Raises:
        InputError: the package `datasets` is missing, or the hub gives no rows.
    """
    from_a_file = "give the rows as a JSONL file: --data FILE"
    extras.require("datasets", "eval", f"reading `{hub.path}` from the hub", from_a_file)
    from datasets import load_dataset

    try:
        rows = list(load_dataset(hub.path, hub.config, split=hub.split))
    # Without a network, the error depends on the version of `datasets` and on the network.
    except Exception as error:
        raise InputError(
            f"cannot read `{hub.path}` from the hub: {first_line(error)}", hint=from_a_file
        ) from None
    if not rows:
        raise InputError(f"`{hub.path}` on the hub holds no rows", hint=from_a_file)
    for number, fields in enumerate(rows, 1):
        yield DatasetRow(fields, f"{hub.path} ({hub.split}), row {number}")
