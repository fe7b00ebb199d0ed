"""Files, folders and the hub give the same records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dmax.errors import InputError
from dmax.records.sources import (
    Source,
    find_source,
    load_conversations,
    read_prompts,
    records_of,
)

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"q{number}", "response": f"r{number}"} for number in range(3)]


def write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A file whose name says what it is."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def responses(table: Any) -> list[str]:
    return [row["response"] for row in table]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("data.jsonl", [":1", ":2", ":3"]),
        ("data.json", [", record 1", ", record 2", ", record 3"]),
        ("data.parquet", [", row 1", ", row 2", ", row 3"]),
    ],
)
def test_every_kind_of_file_is_read(
    tmp_path: Path, name: str, places: list[str], streaming: bool
) -> None:
    file = write(tmp_path, name)
    rows = list(load_conversations(find_source(file), streaming=streaming))
    assert [row["where"] for row in rows] == [f"{file}{place}" for place in places]
    assert rows[2]["messages"] == [{"role": "user", "content": "q2"}]
    assert responses(rows) == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    "beginning",
    [b"\xef\xbb\xbf", b"\n" * 5, b"\xef\xbb\xbf \r\n\t ", b" " * 10_000],
    ids=["mark", "lines", "both", "many"],
)
def test_an_array_is_known_whatever_stands_before_it(tmp_path: Path, beginning: bytes) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(beginning + json.dumps(ROWS, indent=1).encode())
    assert [record for _, record in records_of(Source(str(file)))] == ROWS


def test_a_folder_is_read_as_the_hub_would_read_it(tmp_path: Path) -> None:
    write(tmp_path, "data/train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path, "data/train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path, "data/test-00000-of-00001.parquet", [{"prompt": "t", "response": "t"}])
    assert responses(load_conversations(find_source(tmp_path))) == ["r0", "r1", "r2"]
    assert responses(load_conversations(find_source(tmp_path, split="test"))) == ["t"]
    with pytest.raises(InputError, match="has no split 'tests', it has train, test"):
        load_conversations(find_source(tmp_path, split="tests"))


def test_a_folder_without_data_says_what_it_should_hold(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"holds no file that ends in \.jsonl, \.json, \.parquet"):
        load_conversations(find_source(tmp_path))
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(InputError, match="cannot read the folder"):
        load_conversations(find_source(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path: Path, streaming: bool) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "several")
    one = load_conversations(find_source(tmp_path / "one"), streaming=streaming)
    test = find_source(tmp_path / "several", split="test")
    several = load_conversations(test, streaming=streaming)
    assert responses(one) == responses(several) == ["r0", "r1", "r2"]
    assert [prompt.prompt for prompt in read_prompts(tmp_path / "one")] == ["q0", "q1", "q2"]
    with pytest.raises(InputError, match="cannot read"):
        load_conversations(find_source(tmp_path / "several"))


def test_an_id_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, options["split"], options["revision"]))
        table = datasets.Dataset.from_list([{"question": "q", "answer": "r #### 3"}])
        return table.to_iterable_dataset() if options["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = find_source("openai/gsm8k", config="main", split="test")
    for streaming in (False, True):
        [row] = load_conversations(source, streaming=streaming)
        assert row["response"] == "r #### 3"
        assert row["where"] == "openai/gsm8k (test), row 1"
    [prompt] = read_prompts(source)
    assert prompt == ("q", "r #### 3", "openai/gsm8k (test), row 1")
    assert asked == [("openai/gsm8k", "main", "test", None)] * 3


def test_an_id_that_cannot_be_reached_says_so() -> None:
    with pytest.raises(InputError, match="cannot read `openai/gsm8k`: "):
        load_conversations(find_source("openai/gsm8k", config="main"))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "a/b/c", "~/nowhere.parquet"])
def test_a_name_that_leads_nowhere(name: str) -> None:
    with pytest.raises(InputError, match="is not a file or folder"):
        list(records_of(find_source(name)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_a_bad_record_names_file_and_row(tmp_path: Path, name: str, streaming: bool) -> None:
    file = write(tmp_path, name, [*ROWS, {"prompt": "q", "response": " "}])
    place = ":4" if name == "data.jsonl" else ", r\\w+ 4"
    with pytest.raises(InputError, match=f"^{file}{place}: a record without a response"):
        list(load_conversations(find_source(file), streaming=streaming))


def test_a_folder_of_a_distillation_is_read_without_what_was_dropped(tmp_path: Path) -> None:
    write(tmp_path, "train-00000.jsonl", ROWS[:2])
    write(tmp_path, "train-00001.jsonl", ROWS[2:])
    write(tmp_path, "dropped.jsonl", [{"prompt": "q", "reason": "empty"}])
    write(tmp_path, "manifest.json", [])
    assert responses(load_conversations(find_source(tmp_path))) == ["r0", "r1", "r2"]


def test_a_bad_record_of_a_table_names_its_row(tmp_path: Path) -> None:
    datasets.Dataset.from_list([*ROWS, {"prompt": "q", "response": None}]).save_to_disk(tmp_path)
    with pytest.raises(InputError, match=r"row 4: a record without a response"):
        load_conversations(find_source(tmp_path))


def test_a_parquet_file_that_is_cut_off_names_itself(tmp_path: Path) -> None:
    file = write(tmp_path, "data.parquet")
    os.truncate(file, file.stat().st_size - 20)
    with pytest.raises(InputError, match="data.parquet, after row 0: "):
        list(records_of(Source(str(file))))


def test_no_record_at_all_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "data.jsonl", [])
    with pytest.raises(InputError, match="data.jsonl` holds no record"):
        load_conversations(find_source(file))


def test_conversations_are_read_once_until_their_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmax.records import sources

    file = write(tmp_path, "data.jsonl")
    first = load_conversations(find_source(file))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_conversations", lambda *_: pytest.fail("read again"))
        again = load_conversations(find_source(file))
    assert list(again) == list(first)
    assert again.cache_files == first.cache_files != []
    write(tmp_path, "data.jsonl", ROWS[:2])
    assert responses(load_conversations(find_source(file))) == ["r0", "r1"]


def test_without_the_package_one_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmax import extras

    file = write(tmp_path, "data.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(InputError, match="training data needs the package `datasets`"):
        load_conversations(find_source(file))
    assert [prompt.prompt for prompt in read_prompts(file)] == ["q0", "q1", "q2"]
