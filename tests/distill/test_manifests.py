"""Other things have manifests, too: such a file is neither replaced nor proof of a distillation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from responder import PROMPTS, Responder, run

from dmax import InputError
from dmax.distill.files import ResponseFiles
from dmax.distill.prompts import Part

STRANGE = '{"name": "my web app"}'
EARLIER = '{"dmax": "0.0.1", "weights": "0123456789abcdef"}'  # before there were filters
REFUSED = "exists and was not written by this command"
PART = Part(0, 2)


@pytest.mark.parametrize("content", [STRANGE, "a diary", "{", "[1]", '"dmax"'])
def test_a_manifest_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    manifest = tmp_path / "data.manifest.json"
    manifest.write_text(content)
    with pytest.raises(InputError, match=f"data.manifest.json {REFUSED}"):
        ResponseFiles(tmp_path / "data.jsonl").check()  # before a model is loaded
    responder = Responder()
    with pytest.raises(InputError, match=REFUSED):
        run(tmp_path / "data.jsonl", responder)
    assert (manifest.read_text(), responder.asked) == (content, [])
    assert [file.name for file in tmp_path.iterdir()] == [manifest.name]


def test_responses_beside_a_manifest_of_something_else_are_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "data.jsonl"
    run(output, Responder(), PROMPTS[:2])
    output.with_suffix(".manifest.json").write_text(STRANGE)
    with pytest.raises(InputError, match=REFUSED):
        ResponseFiles(output).check()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.webapp.json", "manifest-0-of-2.json"])
@pytest.mark.parametrize("part", [Part(), PART])
def test_a_folder_with_a_manifest_of_its_own_is_no_folder_of_ours(
    tmp_path: Path, name: str, part: Part
) -> None:
    (tmp_path / "index.html").write_text("<html>")
    (tmp_path / name).write_text(STRANGE)
    with pytest.raises(InputError, match="holds something else"):
        run(tmp_path, Responder(), shard_size=4, part=part)
    assert {file.name for file in tmp_path.iterdir()} == {"index.html", name}
    assert (tmp_path / name).read_text() == STRANGE


def test_a_strange_manifest_beside_one_of_ours_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "out", Responder(), shard_size=4, part=Part(1, 2))
    manifest = tmp_path / "out" / "manifest-0-of-2.json"
    manifest.write_text(STRANGE)
    with pytest.raises(InputError, match=REFUSED):
        run(tmp_path / "out", Responder(), shard_size=4, part=PART)
    assert manifest.read_text() == STRANGE


@pytest.mark.parametrize("shard_size", [None, 4])
def test_a_manifest_of_an_earlier_version_without_responses_is_replaced(
    tmp_path: Path, shard_size: int | None
) -> None:
    output = tmp_path / "out" if shard_size else tmp_path / "out.jsonl"
    manifest = output / "manifest.json" if shard_size else output.with_suffix(".manifest.json")
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text(EARLIER)
    run(output, Responder(), shard_size=shard_size)
    assert json.loads(manifest.read_text())["filters"]["min_length"] == 0
