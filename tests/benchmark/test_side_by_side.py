"""bench/side_by_side.py: runs in processes of their own, and their records together."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from side_by_side import add_options, begin, check_options, do, merged, put_together

from dmax.errors import InputError
from dmax.files import read_record


def measure(name: str, whole: Path) -> list[tuple[Path, Path]]:
    """One point more, in a record beside the whole one; `bad` fails, and `killed` is killed."""
    part = whole.with_name(f"{name}.json")
    begin(part, whole)
    if name == "bad":
        raise ValueError("no such run")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    record = dict(read_record(part))
    record["points"].append({"label": name, "value": 0.5})
    part.write_text(json.dumps(record))
    return [(part, whole)]


def test_every_run_adds_to_the_record(tmp_path: Path) -> None:
    whole = tmp_path / "whole.json"
    first = {"label": "first", "value": 0.0}
    whole.write_text(json.dumps({"seed": 7, "environment": {}, "points": [first]}))
    do({name: (measure, (name, whole)) for name in "ab"}, 2)
    labels = sorted(point["label"] for point in read_record(whole)["points"])
    assert labels == ["a", "b", "first"]
    assert read_record(tmp_path / "a.json")["seed"] == 7


def test_a_run_gives_back_only_what_it_has_measured(tmp_path: Path) -> None:
    """What another run has measured anew meanwhile stays."""
    whole = tmp_path / "whole.json"
    both = {"a": 60, "b": 60}
    points = [{"label": name, "value": 0.5, "tpf": 1} for name in "ab"]
    whole.write_text(json.dumps({"environment": {}, "points": points, "seconds": both}))
    parts = {name: tmp_path / f"{name}.json" for name in "ab"}
    for part in parts.values():
        begin(part, whole)
    for number, (name, part) in enumerate(parts.items()):
        record = dict(read_record(part))
        record["seconds"][name] = 4000
        record["points"][number]["tpf"] = 2
        part.write_text(json.dumps(record))
        put_together(part, whole)
    record = read_record(whole)
    assert record["seconds"] == {"a": 4000, "b": 4000}
    assert {point["label"]: point["tpf"] for point in record["points"]} == {"a": 2, "b": 2}


def test_runs_that_fail_or_are_killed_end_no_other_and_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"environment": {}, "points": []}))
    with pytest.raises(InputError, match="the process of killed was killed"):
        do({name: (measure, (name, whole)) for name in ("killed", "bad", "a")}, 1)
    assert [point["label"] for point in read_record(whole)["points"]] == ["a"]
    said = capfd.readouterr().out
    assert "no such run" in said and "not finished: killed, bad" in said


def test_a_part_is_renewed_and_keeps_what_it_alone_knows(tmp_path: Path) -> None:
    def point(label: str, tpf: int) -> dict[str, object]:
        return {"label": label, "value": 0.5, "tpf": tpf}

    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    record = {"limit": 2, "environment": {}, "points": [point("a", 1)], "seconds": {"a": 1}}
    whole.write_text(json.dumps(record))
    begin(part, whole)
    own = record | {"points": [point("a", 1), point("own", 1)], "seconds": {"a": 1, "own": 1}}
    part.write_text(json.dumps(own))  # and then it was killed
    later = [point("a", 2), point("later", 2)]
    whole.write_text(json.dumps(record | {"points": later, "seconds": {"a": 2}}))
    begin(part, whole)
    assert read_record(part)["points"] == [*later, point("own", 1)]
    assert read_record(part)["seconds"] == {"a": 2, "own": 1}
    put_together(part, whole)
    assert read_record(whole) == read_record(part)


def test_a_part_of_another_limit_stays_as_it_is(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    held = json.dumps({"limit": 5, "environment": {}, "points": [{"label": "a", "value": 0.5}]})
    part.write_text(held)
    whole.write_text(json.dumps({"limit": 200, "environment": {}, "points": []}))
    begin(part, whole)
    assert part.read_text() == held


def test_what_is_in_both_records_is_the_new_ones() -> None:
    old = {"date": "yesterday", "cpu": "old", "threads": 1}
    held = {
        "seed": 7,
        "points": [{"label": "a", "value": 0.5, "tpf": 1}, {"label": "b", "value": 0.5, "tpf": 2}],
        "training": {"a": 1},
        "environment": old,
    }
    points = [{"label": "a", "value": 0.5, "tpf": 3}, {"label": "a", "value": 0.9, "tpf": 4}]
    new = {"points": points, "training": {"b": 2}, "environment": old | {"date": "today"}}
    kept = {"label": "b", "value": 0.5, "tpf": 2}
    both = {"seed": 7, "training": {"a": 1, "b": 2}, "environment": old}
    assert merged(held, new) == both | {"points": [kept, *points]}
    gpu = {"gpu": "new"}
    elsewhere = [{"environment": gpu, **point} for point in points]
    assert merged(held, new | {"environment": gpu}) == both | {"points": [kept, *elsewhere]}
    assert merged({}, new) == new


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "argument --jobs: expected a whole number above 0, got '0'"),
        (["--gpu"], "cuda"),
    ],
)
def test_what_cannot_be_followed_here_is_said(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(SystemExit):
        check_options(parser, parser.parse_args(words))
    assert message in capsys.readouterr().err.lower()
