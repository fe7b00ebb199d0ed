"""Keys of a server: files, the environment, and what they must not become."""

from __future__ import annotations

import copy
import hmac
import logging
import os
from pathlib import Path

import pytest

from dmax.errors import InputError
from dmax.serve.keys import Keys, read_keys


def written(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    file = folder / "keys.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    file.chmod(mode)
    return file


def test_every_key_opens_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys(["first", "second", "third"])
    tried = [b"first", b"third", b"", b"f", b"first ", b"first\x00", b"x" * 10**6]
    assert [keys.admit(key) for key in tried] == [True, True, *[False] * 5]
    assert compared == [(32, 32)] * 3 * len(tried)  # all of them, whatever the length and the match


def test_keys_cannot_be_read_from_what_holds_them() -> None:
    keys = Keys(["my-secret-key"])
    assert "secret" not in f"{keys!r} {vars(keys)!r}"
    assert len(keys) == 1 and len(Keys([])) == 0
    assert not Keys([]).admit(b"")


def test_a_file_has_a_key_a_line(tmp_path: Path) -> None:
    file = written(tmp_path, "\ufeff# team a\nkey-a\r\n\n   \n  key-b\t\n#key-c\nkey-a\nlast")
    assert read_keys(file, {}) == ("key-a", "key-b", "last")


def test_the_environment_has_keys_between_commas(tmp_path: Path) -> None:
    assert read_keys(None, {"DMAX_API_KEY": "one"}) == ("one",)
    assert read_keys(None, {"DMAX_API_KEY": " one, two,,"}) == ("one", "two")
    assert read_keys(written(tmp_path, "one\n"), {"DMAX_API_KEY": "two"}) == ("one", "two")
    assert read_keys(None, {}) == ()


def test_keys_are_found_in_another_environment_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `datasets` leaves it: a copy in the place of `os.environ`, where variables then go."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setenv("DMAX_API_KEY", "one")
    assert read_keys(None) == ("one",)


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n", "\ufeff"])
def test_a_file_without_a_key_does_not_open_the_server(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="keys.txt holds no key"):
        read_keys(written(tmp_path, content), {})


@pytest.mark.parametrize("value", ["", " ", ",,"])
def test_an_empty_variable_does_not_open_the_server(value: str) -> None:
    with pytest.raises(InputError, match="DMAX_API_KEY holds no key"):
        read_keys(None, {"DMAX_API_KEY": value})


@pytest.mark.parametrize(
    "line", ["two words", "sécret", "secret\x00", "secret\x7f", b"\xff\xfesecret"]
)
def test_what_is_no_key_is_named_but_not_shown(tmp_path: Path, line: str | bytes) -> None:
    content = b"fine\n" + (line.encode() if isinstance(line, str) else line)
    with pytest.raises(InputError, match="keys.txt:2: a key must be ASCII without spaces") as info:
        read_keys(written(tmp_path, content), {})
    assert "cret" not in str(info.value) and "words" not in str(info.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_keys(tmp_path / "missing", {})
    with pytest.raises(InputError, match="Is a directory"):
        read_keys(tmp_path, {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a device or a pipe"):
        read_keys(tmp_path / "pipe", {})
    if os.geteuid() != 0:  # who may read everything
        with pytest.raises(InputError, match="Permission denied"):
            read_keys(written(tmp_path, "key", 0o000), {})


@pytest.mark.parametrize(("mode", "is_shared"), [(0o600, False), (0o400, False), (0o644, True)])
def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, is_shared: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_keys(written(tmp_path, "my-secret", mode), {}) == ("my-secret",)
    assert ("chmod 600" in caplog.text) == is_shared
    assert "secret" not in caplog.text
