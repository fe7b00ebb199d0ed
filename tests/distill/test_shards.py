"""A folder of shards: each appears whole, several processes share it, and training reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from responder import PARAMS, PROMPTS, Responder, by_index, counts, lines, run

from dmax import InputError
from dmax.distill.prompts import Part, read_part
from dmax.records.sources import read_conversations

MANY = [f"question {number}" for number in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "responses"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of all shards in order."""
    shards = sorted(folder.glob("train-*.jsonl"))
    return [record for shard in shards for record in lines(shard)]


def test_shards_are_whole_and_the_last_holds_the_rest(folder: Path) -> None:
    report = run(folder, Responder(max_batch_size=2), MANY, shard_size=4)
    assert (report.prompts, report.kept) == (10, 10)
    shards = [f"train-0000{number}.jsonl" for number in range(3)]
    assert names(folder) == ["dropped.jsonl", "manifest.json", *shards]
    assert [len(lines(folder / shard)) for shard in shards] == [4, 4, 2]
    assert sorted(record["index"] for record in records(folder)) == list(range(10))


def test_a_shard_appears_only_when_it_is_whole(folder: Path) -> None:
    seen = []

    def look(done: int, total: int, speed: str) -> None:
        if done:
            seen.append([len(lines(shard)) for shard in sorted(folder.glob("train-*.jsonl"))])

    run(folder, Responder(max_batch_size=1), MANY, shard_size=4, progress=look)
    assert seen == [[]] * 3 + [[4]] * 4 + [[4, 4]] * 3


@pytest.mark.parametrize("dies_at", range(0, 100, 9))
def test_a_stopped_run_answers_each_prompt_once(folder: Path, dies_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Responder(dies_at, max_batch_size=1), MANY, shard_size=3)
    whole = records(folder) if folder.exists() else []
    assert len(whole) % 3 == 0
    again = Responder()
    assert run(folder, again, MANY, shard_size=3).kept == 10
    assert records(folder)[: len(whole)] == whole
    assert sorted(record["index"] for record in records(folder)) == list(range(10))
    assert not (folder / "partial.jsonl").exists()
    assert run(folder, Responder(dies_at=0), MANY, shard_size=3).kept == 10


def test_a_shard_that_was_full_when_the_run_was_killed_is_closed_later(folder: Path) -> None:
    run(folder, Responder(), MANY, shard_size=10)
    (folder / "train-00000.jsonl").rename(folder / "partial.jsonl")
    nobody = Responder(dies_at=0)
    assert run(folder, nobody, MANY, shard_size=10).kept == 10
    assert "train-00000.jsonl" in names(folder) and "partial.jsonl" not in names(folder)
    (folder / "train-00000.jsonl").rename(folder / "partial.jsonl")
    assert run(folder, Responder(), [*MANY, "one more"], shard_size=10).kept == 11
    assert [len(lines(shard)) for shard in sorted(folder.glob("train-*"))] == [10, 1]


def test_more_prompts_go_to_more_shards(folder: Path) -> None:
    run(folder, Responder(), MANY[:5], shard_size=4)
    before = records(folder)
    assert run(folder, Responder(), MANY, shard_size=4).kept == 10
    assert records(folder)[:5] == before
    assert [len(lines(shard)) for shard in sorted(folder.glob("train-*"))] == [4, 1, 4, 1]


def test_answers_that_are_finished_together_are_divided_among_shards(folder: Path) -> None:
    together = [f"prompt {index}" for index in range(10)]  # as many steps each
    assert run(folder, Responder(), together, shard_size=4).kept == 10
    assert [len(lines(shard)) for shard in sorted(folder.glob("train-*"))] == [4, 4, 2]
    assert sorted(record["index"] for record in records(folder)) == list(range(10))


def test_a_damaged_shard_is_refused(folder: Path) -> None:
    run(folder, Responder(), MANY, shard_size=4)
    shard = folder / "train-00001.jsonl"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train-00001.jsonl:4 is no response to a prompt"):
        run(folder, Responder(), MANY, shard_size=4)


def test_a_shard_that_is_there_twice_is_refused(folder: Path) -> None:
    run(folder, Responder(), MANY, shard_size=4)
    (folder / "train-00007.jsonl").write_bytes((folder / "train-00000.jsonl").read_bytes())
    with pytest.raises(InputError, match=r"train-00007.jsonl:1 answers prompt \d again"):
        run(folder, Responder(), MANY, shard_size=4)


def test_datasets_and_training_read_the_shards_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    prompts = [*PROMPTS, "refused"]
    for index in range(2):
        run(folder, Responder(), prompts, shard_size=2, part=Part(index, 2))
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert sorted(loaded["train"]["index"]) == [0, 1, 3, 5, 6]
    assert set(loaded["train"].column_names) >= {"prompt", "response"}
    learnt = [each.messages[0]["content"] for each in read_conversations(folder)]
    assert sorted(learnt) == sorted(loaded["train"]["prompt"])


# ---- a folder of something else ------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("a diary")
    with pytest.raises(InputError, match="responses holds something else"):
        run(folder, Responder(), MANY, shard_size=4)
    assert names(folder) == ["diary.txt"]


def test_shards_do_not_replace_a_file(folder: Path) -> None:
    run(folder, Responder(), MANY)
    with pytest.raises(InputError, match="cannot write shards to .*: it is a file"):
        run(folder, Responder(), MANY, shard_size=4)


def test_shards_are_continued_with_the_same_settings_only(folder: Path) -> None:
    run(folder, Responder(), MANY[:5], shard_size=4)
    with pytest.raises(InputError, match="of another run: `weights` was"):
        run(folder, Responder(weight=2.0), MANY, shard_size=4)


def test_a_manifest_without_responses_is_replaced(folder: Path) -> None:
    run(folder, Responder(), MANY, shard_size=4)
    for file in folder.glob("*.jsonl"):
        file.unlink()
    assert run(folder, Responder(weight=2.0), MANY, shard_size=4).kept == 10


# ---- parts ---------------------------------------------------------------------------------------


def test_parts_share_a_folder_and_answer_every_prompt_once(folder: Path) -> None:
    asked = []
    for index in range(3):
        responder = Responder()
        report = run(folder, responder, MANY, shard_size=2, part=Part(index, 3))
        assert report.prompts == report.kept == len(responder.asked)
        asked += responder.asked
    assert sorted(asked) == sorted(MANY)
    assert sorted(record["index"] for record in records(folder)) == list(range(10))
    assert {"train-2-of-3-00000.jsonl", "manifest-0-of-3.json"} < {*names(folder)}


def test_a_part_goes_on_where_it_stopped(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Responder(25, max_batch_size=1), MANY, shard_size=2, part=Part(1, 2))
    again = Responder()
    assert run(folder, again, MANY, shard_size=2, part=Part(1, 2)).kept == 5
    assert 0 < len(again.asked) < 5


def test_a_folder_keeps_its_division_and_its_settings(folder: Path) -> None:
    run(folder, Responder(), MANY, shard_size=2, part=Part(0, 2))
    for part in (Part(), Part(1, 3)):
        with pytest.raises(InputError, match="are divided otherwise, as manifest-0-of-2.json says"):
            run(folder, Responder(), MANY, shard_size=2, part=part)
    with pytest.raises(InputError, match="manifest-0-of-2.json are of another run: `weights`"):
        run(folder, Responder(weight=2.0), MANY, shard_size=2, part=Part(1, 2))


def test_a_file_of_one_part_is_not_one_of_another(tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    assert counts(run(output, Responder(), MANY, part=Part(0, 2))) == (5, 5, {})
    with pytest.raises(InputError, match="responses.jsonl:1 answers another prompt"):
        run(output, Responder(), MANY, part=Part(1, 2))
    assert run(output, Responder(), MANY).kept == 10  # who wants the others too gets them
    assert [record["index"] for record in by_index(output)] == list(range(10))


def test_the_name_of_a_part() -> None:
    assert read_part("0/1") == Part()
    assert list(read_part("2/3").numbers(9)) == [2, 5, 8]
    for text in ("", "1", "3/3", "-1/2", "1/0", "a/b", "0/1/2", "1/99999999", "٣/٤", "0/2\n"):
        with pytest.raises(InputError, match="`--part` must be INDEX/COUNT"):
            read_part(text)


# ---- two processes -------------------------------------------------------------------------------


HOLD = """
import sys
from pathlib import Path
from dmax.distill.files import ResponseFiles

with ResponseFiles(Path(sys.argv[1]), int(sys.argv[2]) or None).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("shard_size", [None, 4])
def test_two_processes_do_not_write_the_same_responses(
    folder: Path, shard_size: int | None
) -> None:
    words = [sys.executable, "-c", HOLD, str(folder), str(shard_size or 0)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another process is writing .*responses"):
            run(folder, Responder(), MANY, shard_size=shard_size)
        other.kill()  # no process of its own can give the lock back
        other.wait()
        assert run(folder, Responder(), MANY, shard_size=shard_size).kept == 10
    assert not list(folder.parent.rglob("*.lock"))


def test_a_manifest_says_what_the_responses_depend_on(folder: Path) -> None:
    run(folder, Responder(), MANY, shard_size=4)
    settings = json.loads((folder / "manifest.json").read_text())
    assert settings["params"]["threshold"] == PARAMS.threshold
    assert settings["filters"]["max_repetition"] is None
