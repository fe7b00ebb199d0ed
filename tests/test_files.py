"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from dmax.errors import InputError
from dmax.files import (
    append,
    check_new_folder,
    check_ours,
    check_writable,
    drop_unfinished_line,
    json_lines,
    leftovers,
    new_folder,
    read_lines,
    read_record,
    remove_leftovers,
    write_atomically,
)


@pytest.mark.parametrize("content", ["☃", "☃".encode()])
def test_a_file_is_replaced_whole(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old and long")
    write_atomically(path, content)
    assert path.read_text(encoding="utf-8") == "☃"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fails(self: Path, *_: Any) -> None:
        with self.open("ab") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, broken, fails)
    with pytest.raises(InputError, match=r"cannot write .*a.json: No space left on device"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", '{"a": 1, "b": 2, "c": 3}', '{"b": 2, "a": 1}\n{}\n'])
def test_a_record_of_ours_may_be_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    check_ours(path, "a", "b")
    path.write_text(content)
    check_ours(path, "a", "b")


@pytest.mark.parametrize("content", ["notes", "[]", "{}", '{"a": 1}', '[{"a": 1, "b": 2}]', "\xff"])
def test_what_is_not_our_record_may_not_be_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"a.json exists and was not written by this command"):
        check_ours(path, "a", "b")
    with pytest.raises(InputError):
        check_ours(Path(os.devnull), "a", "b")


def test_a_record_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^cannot read .*a\.json: No such file"):
        read_record(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"^cannot read .*: Is a directory"):
        read_record(tmp_path)
    with pytest.raises(InputError, match=r"^cannot read .*: it is a device or a pipe"):
        read_record(Path(os.devnull))
    (tmp_path / "a.json").write_text("no json")
    assert read_record(tmp_path / "a.json") is None


def test_only_whole_lines_of_a_growing_file_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_lines(path) == ([], b"")
    append(path, "one\ntwo\u2028\nthr")
    assert read_lines(path) == ([b"one", "two\u2028".encode()], b"thr")
    for _ in range(2):
        drop_unfinished_line(path)
        assert read_lines(path) == ([b"one", "two\u2028".encode()], b"")
    append(path, "three\n")
    assert path.read_text(encoding="utf-8") == "one\ntwo\u2028\nthree\n"


@pytest.mark.parametrize("check", [check_writable, check_new_folder])
def test_asking_whether_a_place_can_be_written_leaves_nothing(
    tmp_path: Path, check: Callable[[Path], None]
) -> None:
    check(tmp_path / "a")
    check(tmp_path / "new" / "deep" / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [check_writable, check_new_folder])
def test_what_is_left_by_a_process_that_is_killed_while_asking_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], None]
) -> None:
    def killed(path: Path, missing_ok: bool) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            check(tmp_path / "a")
    assert list(tmp_path.iterdir()) == leftovers(tmp_path / "a") != []
    remove_leftovers(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_with_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "b" / "c" / "a.json", "{}")
    append(tmp_path / "d" / "a.jsonl", "{}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d"]


@pytest.mark.parametrize("place", ["new/{long}/a.json", "new/{long}", "{long}", "a\0b"])
def test_names_that_cannot_be_are_known_before_anything_is_made(tmp_path: Path, place: str) -> None:
    path = tmp_path / place.format(long="x" * 300)
    with pytest.raises(InputError, match="cannot write ") as caught:
        check_writable(path)
    assert len(str(caught.value)) < 500
    assert list(tmp_path.iterdir()) == []


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/full"), Path("/dev/null")):
        for write in (check_writable, lambda path: write_atomically(path, "")):
            with pytest.raises(InputError, match="it is a device or a pipe"):
                write(path)
    assert not Path("/dev/full").is_file()


def test_a_full_disk_is_known_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="No space left on device"):
        check_writable(tmp_path / "a.json")


def test_whose_a_file_is_stands_at_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte of zeros
    with pytest.raises(InputError, match="was not written by this command"):
        check_ours(path, "a")
    path.write_text("[" * 200_000)
    with pytest.raises(InputError, match="was not written by this command"):
        check_ours(path, "a")


def test_a_place_under_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for check in (check_writable, lambda path: write_atomically(path, "")):
        with pytest.raises(InputError, match=r"cannot write .*a.json: "):
            check(tmp_path / "file" / "a.json")


@pytest.mark.parametrize("name", ["folder", "."])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        check_writable(Path(name))


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for name in ("old", "new"):
        with new_folder(path) as partial:
            (partial / name).touch()
            assert list(partial.iterdir()) == [partial / name]
    assert list(path.iterdir()) == [path / "new"]
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_under_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_new_folder(tmp_path / "file" / "folder")


def test_a_folder_that_is_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def fills_half() -> None:
        with new_folder(path) as partial:
            (partial / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fills_half()
    assert list(path.iterdir()) == [path / "old"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writes_left_behind_a_link_is_removed_and_what_links_lead_to_is_not(
    tmp_path: Path,
) -> None:
    big = tmp_path / "big"
    disk = tmp_path / "disk"
    for folder in (big, disk):
        folder.mkdir()
        (folder / "mine").touch()
    (tmp_path / "out").symlink_to(disk)
    (tmp_path / ".disk.00000000.partial").mkdir()
    (tmp_path / ".disk.00000001.partial").symlink_to(big)
    assert len(leftovers(tmp_path / "out")) == 2
    remove_leftovers(tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big", "disk", "out"]
    assert (big / "mine").exists() and (disk / "mine").exists()


# --- JSONL ----------------------------------------------------------------------------------------


def test_the_lines_of_a_jsonl_file_come_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\n \n\n[1]\r\n2')
    places = [f"{path}:{number}" for number in (1, 4, 5)]
    assert list(json_lines(path)) == list(zip(places, [{"a": "\u2028"}, [1], 2], strict=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 200_000, "not a JSON object"),
        (b'{"a":' * 200_000, "not a JSON object"),
        (b"1" * 5000, "not a JSON object"),
        (b"\xff", "not UTF-8 text"),
        (b'"' + b"a" * 20_000_000 + b'"', "a line of more than 8,000,000 bytes"),
    ],
)
def test_a_line_that_is_no_json_is_named_when_it_is_its_turn(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    read = json_lines(path)
    assert next(read) == (f"{path}:1", {})
    with pytest.raises(InputError, match=f"a.jsonl:2: {message}"):
        next(read)


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="it is a device or a pipe"):
            next(json_lines(path))


def test_a_file_without_an_end_of_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jsonl"
    path.touch()
    os.truncate(path, 2 << 30)
    with pytest.raises(InputError, match=r"sparse.jsonl:1: a line of more than"):
        next(json_lines(path))
    os.truncate(path, (2 << 30) + 1)
    with pytest.raises(InputError, match="it is larger than 2 GiB"):
        next(json_lines(path))


@pytest.mark.parametrize(
    ("name", "reason"), [("none", "No such file"), (".", "Is a directory"), ("a\0b", "null")]
)
def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"cannot read .*{reason}"):
        next(json_lines(tmp_path / name))
