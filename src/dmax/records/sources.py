"""Sources: records of a file, a folder or the hub, one after another or as a table."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmax import extras
from dmax.errors import InputError, did_you_mean, first_line, shorten
from dmax.files import TO_UTF8, check_readable, json_lines
from dmax.records.readers import Conversation, Prompt, Reader, read_conversation, read_prompt
from dmax.records.tables import generate_conversations, read_table

SUFFIXES = (".jsonl", ".json", ".parquet")
PARQUET = b"PAR1"  # how such a file begins
BEGINNING = 2**16  # bytes by which a file is known; blanks may stand before an array
ROWS = 1_000  # of a parquet file that are in memory together


@dataclass(frozen=True, slots=True)
class Source:
    """Where records lie.

    Attributes:
        name: of a file or folder, or the id of a data set on the hub.
        is_hub: whether it is on the hub.
        config: of a data set on the hub or in a folder that has several.
        split: which part of a data set on the hub or in a folder.
        revision: of a data set on the hub: a branch, a tag or a commit.
    """

    name: str
    is_hub: bool = False
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(os.path.expanduser(self.name))


def find_source(name: str | os.PathLike[str] | Source, **details: Any) -> Source:
    """The file or folder of a name, or else the data set on the hub that has this id.

    Args:
        name: a path, an id such as `openai/gsm8k`, or a source, which is given back.
        details: other fields of `Source`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(name, Source):
        return name
    source = Source(os.fspath(name), **details)
    is_path = os.path.exists(source.path) or source.path.suffix in SUFFIXES
    is_id = source.name.count("/") <= 1 and not source.name.startswith((".", "/", "~"))
    if not is_path and not is_id:
        raise InputError(f"data `{shorten(source.name)}` is not a file or folder")
    return Source(source.name, is_hub=not is_path, **details)


def read_prompts(
    source: str | os.PathLike[str] | Source, reader: Reader | None = None
) -> Iterator[Prompt]:
    """What the records of a file, a folder or a data set on the hub ask, one at a time.

    Every shape that training data may have is read: the problem of Numina-Math, the system prompt
    and the first question of OpenThoughts, the input of OpenCodeInstruct, `prompt`, `question` or
    `messages`; a response need not be there. A `Prompt` has `prompt` (a text, or a chat if it is
    more than one message of the user's), `reference` (the answer of the record, if it has one) and
    `where` (for errors).

    Args:
        source: as `find_source` takes it: JSONL, JSON, parquet, a folder of them, or an id.
        reader: of the columns (`get_reader`); None recognises it.

    Raises:
        InputError: there is no such source, it is empty, or a record has no prompt; names file and
            line.
    """
    for where, record in records_of(find_source(source)):
        yield read_prompt(record, where, reader)


def read_conversations(
    source: str | os.PathLike[str] | Source, reader: Reader | None = None
) -> Iterator[Conversation]:
    """What the records of a source teach, one at a time; arguments and errors as `read_prompts`."""
    for where, record in records_of(find_source(source)):
        yield read_conversation(record, where, reader)


def load_conversations(
    source: Source,
    *,
    reader: Reader | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
) -> Any:
    """The conversations of a source, with the columns of `Conversation`.

    Args:
        source: where the records are.
        reader: of their columns; None recognises it.
        streaming: read while training, and keep nothing on the disk.
        num_proc: processes that read; None: as many as pay.

    Returns:
        A `datasets.Dataset`, cached until the source changes, or an `IterableDataset`.

    Raises:
        InputError: the package `datasets` is missing, there is no such source, it holds no record,
            or a record is wrong; names file and line. A stream raises it when it gets there.
    """
    files = [] if is_table(source) else files_of(source)
    extras.require("datasets", "train", "training data")
    if not files:
        opened = open_table(source, streaming=streaming)
        name = f"{source.name} ({source.split})"
        table = read_table(opened, name, reader=reader, num_proc=num_proc)
    else:
        versions = [(str(file), *_version(file)) for file in files]
        arguments = {"source": source, "reader": reader, "files": versions}
        table = generate_conversations(_conversations_of, arguments, streaming=streaming)
    if not streaming and not len(table):
        raise _empty(source)
    return table


def records_of(source: Source) -> Iterator[tuple[str, Any]]:
    """The records of a source, each after its place.

    Raises:
        InputError: there is no such source, it is empty, or a file cannot be read.
    """
    is_empty = True
    for place_and_record in _records_of_table(source) if is_table(source) else _of_files(source):
        is_empty = False
        yield place_and_record
    if is_empty:
        raise _empty(source)


def _empty(source: Source) -> InputError:
    """The error for a source that holds nothing."""
    return InputError(f"data `{shorten(source.name)}` holds no record")


def is_table(source: Source) -> bool:
    """Whether `datasets` opens a source: on the hub, or in a folder that `save_to_disk` wrote."""
    names = ("state.json", "dataset_dict.json")
    return source.is_hub or any(os.path.isfile(source.path / name) for name in names)


def _records_of_table(source: Source) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(open_table(source, streaming=source.is_hub), 1):
        yield f"{source.name} ({source.split}), row {number}", row


def _of_files(source: Source) -> Iterator[tuple[str, Any]]:
    for file in files_of(source):
        yield from _records_of_file(file)


def open_table(source: Source, *, streaming: bool) -> Any:
    """A data set of the hub, or of a folder written by `save_to_disk`, as `datasets` gives it.

    Raises:
        InputError: the package is missing, or the data set cannot be read.
    """
    extras.require("datasets", "train", f"reading `{source.name}`", "give a JSONL file")
    import datasets

    try:
        if source.is_hub:
            return datasets.load_dataset(
                source.name,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=streaming,
            )
        saved = datasets.load_from_disk(str(source.path))
        held = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
    # What is raised depends on the version of `datasets`, on the network and on the files.
    except Exception as error:
        raise InputError(
            f"cannot read `{shorten(source.name)}`: {first_line(error)}",
            hint="name a file, a folder or the id of a data set on the hub, and its `config` and "
            "`split` if it has several",
        ) from None
    return held.to_iterable_dataset() if streaming else held


def files_of(source: Source) -> list[Path]:
    """The file of a source, or those of a folder that the hub would read for the same split.

    Raises:
        InputError: there is none.
    """
    path = source.path
    if not os.path.exists(path):
        raise InputError(
            f"data `{shorten(source.name)}` is not a file or folder",
            hint="`dmax distill` writes one; a data set on the hub has an id such as openai/gsm8k",
        )
    if not os.path.isdir(path):
        check_readable(path, largest=None)
        return [path]
    extras.require("datasets", "train", "reading a folder", "name one file of it")
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(path.resolve()), source.config).config.data_files or {}
    except Exception as error:  # depends on the version and on the files
        raise InputError(f"cannot read the folder {path}: {first_line(error)}") from None
    splits = {str(split): [Path(file) for file in files] for split, files in found.items()}
    if source.split not in splits:
        raise InputError(
            f"the folder {path} has no split {source.split!r}, it has {', '.join(splits)}",
            did_you_mean(source.split, splits),
        )
    files = [file for file in splits[source.split] if file.suffix in SUFFIXES]
    if not files:
        raise InputError(f"the folder {path} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def _records_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    check_readable(path, largest=None)
    with path.open("rb") as file:
        beginning = file.read(BEGINNING)
    if beginning.startswith(PARQUET):
        yield from _parquet_rows(path)
    elif path.suffix == ".json" and beginning.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_array(path)
    else:
        yield from json_lines(path, largest=None)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    extras.require("pyarrow", "train", f"reading {path}", "give a JSONL file")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}, after row {number}: {first_line(error)}") from None


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    check_readable(path)
    try:
        records = json.loads(path.read_bytes())
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text", hint=TO_UTF8) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON array ({error})") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _conversations_of(source: Source, reader: Reader | None, files: Any) -> Iterator[Conversation]:
    """The conversations of a source; its `files` are named for the cache, which depends on them."""
    yield from read_conversations(source, reader)


def _version(file: Any) -> tuple[int, int]:
    """Size and time of a file, by which a change of it is seen."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
