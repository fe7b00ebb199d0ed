"""The log of a server: what a line says, and what happens to lines that cannot be written."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dmax.errors import InputError
from dmax.serve import log
from dmax.serve.log import Journal, Record, as_json, as_text, fields_of

NOW = datetime(2026, 11, 26, 9, 4, 32, 123_456, UTC)


def known(**given: object) -> Record:
    record = Record("POST", "/v1/chat/completions", "127.0.0.1", request_id="abc", began=0.0)
    for name, value in given.items():
        setattr(record, name, value)
    return record


FINISHED = dict(
    status=200,
    is_complete=True,
    model="tiny-dmax",
    strategy="spd",
    is_stream=True,
    prompt_tokens=40,
    completion_tokens=62,
    num_forwards=7,
    num_prefill_forwards=1,
    finish_reason="stop",
    first_block_seconds=0.123456789,
)


def test_a_line_for_programs_has_what_is_known() -> None:
    assert json.loads(as_json(fields_of(known(**FINISHED), NOW, 0.5))) == {
        "time": "2026-11-26T09:04:32.123+00:00",
        "request_id": "abc",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "finished",
        "model": "tiny-dmax",
        "strategy": "spd",
        "stream": True,
        "prompt_tokens": 40,
        "completion_tokens": 62,
        "num_forwards": 7,
        "num_prefill_forwards": 1,
        "finish_reason": "stop",
        "first_block_seconds": 0.123457,
        "seconds": 0.5,
    }


def test_a_line_for_people() -> None:
    assert as_text(fields_of(known(**FINISHED), NOW, 0.5)) == (
        "09:04:32 200 POST /v1/chat/completions, 0.500 s, tiny-dmax, spd, "
        "62 tokens in 7 forwards (8.86 per forward), first block 0.123 s, finished"
    )
    wrong = known(status=401, is_complete=True, code="invalid_api_key")
    assert as_text(fields_of(wrong, NOW, 0.0012)) == (
        "09:04:32 401 POST /v1/chat/completions, 0.001 s, invalid, invalid_api_key"
    )
    left = as_text(fields_of(known(), NOW, 1.0))
    assert left == "09:04:32 --- POST /v1/chat/completions, 1.000 s, cancelled"


@pytest.mark.parametrize("form", [as_json, as_text])
def test_a_client_cannot_forge_a_line(form: Callable[..., str]) -> None:
    record = known(path="/a\n09:04:32 200 \x1b[31m\u2028" + "b" * 1000, method="GET\r\n" * 500)
    line = form(fields_of(record, NOW, 0.0))
    assert line.isprintable() and len(line) < 500


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ({"status": 200, "is_complete": True}, "finished"),
        ({"status": 200}, "cancelled"),
        ({}, "cancelled"),
        ({"status": 499, "is_complete": True}, "cancelled"),
        ({"status": 404, "is_complete": True}, "invalid"),
        ({"status": 429, "is_complete": True}, "overloaded"),
        ({"status": 503, "is_complete": True}, "overloaded"),
        ({"status": 500, "is_complete": True}, "failed"),
        ({"status": 200, "is_complete": True, "outcome": "slow_reader"}, "slow_reader"),
    ],
)
def test_how_a_request_ended(given: dict[str, object], outcome: str) -> None:
    assert known(**given).ended() == outcome


def test_what_went_wrong_is_a_place_and_not_a_message(caplog: pytest.LogCaptureFixture) -> None:
    record = known()
    try:
        raise ValueError("the prompt was: my secret")
    except ValueError as error:
        with caplog.at_level(logging.INFO, "dmax"):
            record.fail("decoding_failed", error)
    assert record.code == "decoding_failed"
    assert record.error is not None
    assert record.error.startswith("ValueError in test_what_went_wrong") and ".py:" in record.error
    assert "secret" not in record.error + caplog.text


def test_the_time_of_blocks_is_that_of_their_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    record = known(began=10.0)
    times = iter([11.0, 13.0, 14.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    for choice in (0, 1, 0, 1):
        record.block(choice)
    assert record.first_block_seconds == 1.0
    assert record.block_seconds == [1.0, 3.0, 3.0, 7.0]


def test_lines_are_added_to_a_file_in_order(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    journal = Journal(file)
    for number in range(1000):
        journal.write(str(number))
    journal.close()
    assert file.read_text().splitlines() == ["before", *map(str, range(1000))]


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    lost: list[None] = []
    journal = Journal(Path("/dev/full"), lambda: lost.append(None))
    for _ in range(50):
        journal.write("a line")
    journal.close()
    assert len(lost) == 50


def test_after_a_disk_was_full_lines_are_whole_again(
    tmp_path: Path, limit_files: Callable[[int], None]
) -> None:
    lost: list[None] = []
    told = threading.Semaphore(0)

    def lose() -> None:
        lost.append(None)
        told.release()

    journal = Journal(tmp_path / "log", lose)
    limit_files(14)
    for line in ("first", "second, too long", "third"):
        journal.write(line)
    for _ in range(2):
        assert told.acquire(timeout=20)
    limit_files(-1)
    journal.write("fourth")
    journal.close()
    assert (tmp_path / "log").read_text() == "first\nsecond, \nfourth\n"
    assert len(lost) == 2


def test_a_pipe_that_nobody_reads_makes_nobody_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="No such device"):  # and nobody waits for a reader
        Journal(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    lost: list[None] = []
    journal = Journal(tmp_path / "pipe", lambda: lost.append(None))
    for _ in range(200):
        journal.write("x" * 1000)
    journal.close()
    os.close(reading)
    assert 100 < len(lost) < 200


def test_a_stderr_that_takes_nothing_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST_WAITING", 10)
    monkeypatch.setattr(log, "CLOSE_SECONDS", 0.1)
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup", lambda descriptor: writing)
    lost: list[None] = []
    journal = Journal(None, lambda: lost.append(None))
    for _ in range(200):
        journal.write("x" * 1000)
    journal.close()  # although its thread still waits for the pipe
    assert lost
    os.set_blocking(reading, False)
    while os.read(reading, 2**16):  # lets the thread end
        if not journal._thread.is_alive():
            break
    os.close(reading)


@pytest.mark.parametrize("name", ["missing/log", ".", "nul\0"])
def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot write the log"):
        Journal(tmp_path / name)
