"""Tables of conversations: Arrow files that `datasets` makes of records, caches and maps over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dmax import extras
from dmax.errors import InputError
from dmax.records.readers import Conversation, Reader, read_conversation

FORMAT = 2
"""Raised when the same records are to become something else: older caches are passed over then."""
COLUMNS = Conversation._fields
"""Columns of a table of conversations."""
ROWS_PER_PROCESS = 5_000  # from which a process of its own pays for its start


def generate_conversations(
    generate: Callable[..., Iterable[Conversation]],
    arguments: Mapping[str, Any],
    *,
    streaming: bool = False,
) -> Any:
    """The conversations that a function yields, cached by its name and arguments.

    Without the package `datasets` they are a list. What comes with this package, problems of its
    generator and small lists, is trained on without it.

    Args:
        generate: a function of a module, called with the arguments.
        arguments: all that the conversations depend on.
        streaming: yield while training, and keep nothing on the disk.

    Raises:
        InputError: whatever the function raises of this kind.
    """
    if not streaming and not extras.has("datasets"):
        return list(generate(**arguments))
    extras.require("datasets", "train", "a stream")
    from datasets import Dataset, IterableDataset
    from datasets.exceptions import DatasetGenerationError

    settings = {"generate": generate, "arguments": dict(arguments), "version": FORMAT}
    if streaming:
        return IterableDataset.from_generator(_rows, features=_features(), gen_kwargs=settings)
    try:
        with first_process_first():
            return Dataset.from_generator(_rows, features=_features(), gen_kwargs=settings)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def read_table(
    table: Any, name: str, *, reader: Reader | None = None, num_proc: int | None = None
) -> Any:
    """The conversations of a `Dataset` or `IterableDataset` of records.

    Args:
        table: of `datasets`, with the columns that a reader knows; one of conversations is given
            back as it is.
        name: of the data set, for errors.
        reader: of its columns; None recognises it.
        num_proc: processes that read; None: as many as pay.

    Raises:
        InputError: a record is wrong; a stream raises it when it gets there.
    """
    if table.column_names is not None and set(table.column_names) == set(COLUMNS):
        return table
    settings = {"name": name, "reader": reader}
    return map_table(
        table,
        _read_rows,
        settings,
        _features(),
        identity=settings,
        num_proc=num_proc,
        with_indices=True,
    )


def map_table(
    table: Any,
    function: Callable[..., Mapping[str, list[Any]]],
    settings: Mapping[str, Any],
    features: Any,
    *,
    identity: object,
    num_proc: int | None = None,
    **options: Any,
) -> Any:
    """A table with other columns: cached and made in parallel, or a stream of them.

    Args:
        table: of `datasets`.
        function: takes columns of some rows and the settings, and returns other columns.
        settings: further arguments of the function.
        features: of the result.
        identity: what tells these settings from others. (`datasets` would look into their objects:
            a tokenizer differs from itself once it has been used.)
        num_proc: processes that map; None: as many as pay.
        options: of `Dataset.map`.
    """
    fixed = {
        "batched": True,
        "fn_kwargs": dict(settings),
        "remove_columns": table.column_names,
        "features": features,
        **options,
    }
    if not hasattr(table, "__len__"):
        return table.map(function, **fixed)
    from datasets.fingerprint import Hasher

    paying = min(_num_cores(), len(table) // ROWS_PER_PROCESS)
    processes = paying if num_proc is None else min(num_proc, len(table))
    origin = (table._fingerprint, function.__qualname__, identity, FORMAT)
    with first_process_first():
        return table.map(
            function,
            num_proc=processes if processes > 1 else None,
            new_fingerprint=Hasher.hash(origin),
            **fixed,
        )


@contextmanager
def first_process_first() -> Iterator[None]:
    """Of several processes on a machine, one works first; the others then find what it cached.

    They go on after an error of the first one, too, and meet it themselves.
    """
    import torch  # a server is asked for responses without it

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    from accelerate import PartialState

    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def _rows(
    generate: Callable[..., Iterable[Conversation]], arguments: Mapping[str, Any], version: int
) -> Iterator[dict[str, Any]]:
    for conversation in generate(**arguments):
        yield conversation._asdict()


def _read_rows(
    columns: Mapping[str, list[Any]],
    indices: list[int],
    name: str,
    reader: Reader | None,
) -> dict[str, list[Any]]:
    """Conversations of some rows of a table."""
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    read = [
        read_conversation(record, f"{name}, row {index + 1}", reader)
        for index, record in zip(indices, records, strict=True)
    ]
    return {column: [getattr(each, column) for each in read] for column in COLUMNS}


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _features() -> Any:
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    text = Value("string")
    texts = {"response": text, "where": text, "trajectory": text}
    return Features({"messages": List(message), **texts})
