"""Trajectories: what is recorded of a decoding, what is refused, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from responder import by_index, lines
from typer.testing import CliRunner

from dmax import LLM, DecodingParams, InputError, StreamEvent
from dmax.cli import app
from dmax.decoding import strategies
from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.run import distill
from dmax.distill.trajectories import Recorder
from dmax.records.encoding import encode_dataset
from dmax.records.sources import read_conversations
from dmax.records.trajectories import REMASKED, Trajectory, read_trajectory
from dmax.tasks.word_problems import problems
from dmax.trace import record

QUESTIONS = [problem.question for problem in problems(4, seed=11)]
HEADS = ("demask", "learn2pd")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", dtype="float32", max_batch_size=4)


def answer(
    llm: LLM, output: Path, params: DecodingParams, records: bool = True, num: int = 4
) -> None:
    answerer = ModelAnswerer(llm, params, records=records)
    distill(answerer, QUESTIONS[:num], ResponseFiles(output))


def states(trajectory: Trajectory) -> dict[tuple[int, int], list[int]]:
    """What stands in each block after each of its steps, by first position and step."""
    found: dict[tuple[int, int], list[int]] = {}
    start, length = trajectory["prompt_tokens"], trajectory["block_length"]
    blocks: dict[int, list[list[int]]] = {}
    for place, writes in enumerate(trajectory["writes"], start):
        blocks.setdefault(max(place // length * length, start) - start, []).append(writes)
    for first, block in blocks.items():
        for step in range(1, 1 + max(writes[-2] for writes in block)):
            tokens = [dict(zip(each[::2], each[1::2], strict=True)) for each in block]
            found[first, step] = [
                next((token[at] for at in range(step, 0, -1) if at in token), REMASKED)
                for token in tokens
            ]
    return found


@pytest.mark.parametrize("beyond", [{"stop": ["leaves"]}, {"ignore_eos": True}])
def test_what_does_not_end_at_eos_is_not_recorded(llm: LLM, beyond: dict[str, Any]) -> None:
    params = DecodingParams(**beyond)
    with pytest.raises(InputError, match="a trajectory ends at EOS"):
        ModelAnswerer(llm, params, records=True)
    ModelAnswerer(llm, params)


@pytest.mark.parametrize("name", strategies())
def test_it_is_what_a_trace_shows_step_by_step(llm: LLM, tmp_path: Path, name: str) -> None:
    options = {"head": "tiny-base"} if name in HEADS else {}
    llm = LLM("tiny-base", dtype="float32") if name in HEADS else llm
    params = DecodingParams(strategy=name, max_new_tokens=256, options=options)
    answer(llm, tmp_path / "a.jsonl", params, num=2)
    recorded = {each["prompt"]: each for each in lines(tmp_path / "a.jsonl")}
    assert recorded
    for question in recorded:
        trace = record(llm, [{"role": "user", "content": question}], params)
        assert recorded[question]["forwards"] == trace.output["num_forwards"]
        trajectory = recorded[question]["trajectory"]
        assert trajectory["prompt_tokens"] == len(trace.record["prompt_token_ids"])
        closed = {each["position"] for each in trace.frames if each["kind"] == "committed"}
        shown = {
            (frame["position"], frame["step"]): [
                REMASKED if masked else token
                for token, masked in zip(frame["token_ids"], frame["masked"], strict=True)
            ]
            for frame in trace.frames
            if frame["position"] in closed
        }
        found = states(trajectory)
        assert found.keys() <= shown.keys()
        for (first, step), tokens in shown.items():
            last = max(at for start, at in found if start == first)
            assert found[first, min(step, last)] == tokens  # later steps changed nothing


@pytest.mark.parametrize("name", ["spd", "threshold", "mbd"])
def test_recording_changes_nothing_and_its_last_state_is_the_response(
    llm: LLM, tmp_path: Path, name: str
) -> None:
    params = DecodingParams(strategy=name, max_new_tokens=256)
    answer(llm, tmp_path / "recorded.jsonl", params)
    answer(llm, tmp_path / "plain.jsonl", params, records=False)
    recorded, plain = by_index(tmp_path / "recorded.jsonl"), by_index(tmp_path / "plain.jsonl")
    assert recorded
    trajectories = [each.pop("trajectory") for each in recorded]
    assert recorded == plain
    for each, trajectory in zip(recorded, trajectories, strict=True):
        final = [writes[-1] for writes in trajectory["writes"]]
        assert llm.decode(final[: each["tokens"]]) == each["response"]
        assert final[each["tokens"]] in llm.checkpoint.special_ids.eos_token_ids
        block_length = llm.checkpoint.special_ids.block_length
        assert (trajectory["prompt_tokens"] + len(final)) % block_length == 0


def test_it_does_not_depend_on_how_many_are_decoded_together(tmp_path: Path) -> None:
    params = DecodingParams(strategy="spd", threshold=0.9, max_new_tokens=256)
    for size in (1, 3):
        llm = LLM("tiny-dmax", dtype="float32", max_batch_size=size)
        answer(llm, tmp_path / f"{size}.jsonl", params)
    assert by_index(tmp_path / "1.jsonl") == by_index(tmp_path / "3.jsonl")


def test_blocks_of_another_length_are_recorded_as_they_are(llm: LLM, tmp_path: Path) -> None:
    answer(llm, tmp_path / "a.jsonl", DecodingParams(block_length=16, max_new_tokens=256))
    assert {each["trajectory"]["block_length"] for each in lines(tmp_path / "a.jsonl")} == {16}


def test_a_stopped_run_goes_on_in_one_file_and_in_shards(llm: LLM, tmp_path: Path) -> None:
    params = DecodingParams(strategy="spd", max_new_tokens=256)
    answer(llm, tmp_path / "whole.jsonl", params)
    whole = by_index(tmp_path / "whole.jsonl")
    for output, options in ((tmp_path / "a.jsonl", {}), (tmp_path / "b", {"shard_size": 2})):
        for count in (1, 3, 4):
            questions = QUESTIONS[:count]
            files = ResponseFiles(output, **options)  # type: ignore[arg-type]
            distill(ModelAnswerer(llm, params, records=True), questions, files)
        files_of = sorted(output.glob("train-*")) if output.is_dir() else [output]
        found = [each for file in files_of for each in lines(file)]
        assert sorted(found, key=lambda each: each["index"]) == whole


def test_a_run_without_trajectories_is_not_continued_with_them(llm: LLM, tmp_path: Path) -> None:
    params = DecodingParams(strategy="spd", max_new_tokens=256)
    answer(llm, tmp_path / "a.jsonl", params, records=False)
    with pytest.raises(InputError, match="are of another run: `trajectories` was"):
        answer(llm, tmp_path / "a.jsonl", params)


def test_unfinished_responses_are_dropped_without_one(llm: LLM, tmp_path: Path) -> None:
    answer(llm, tmp_path / "a.jsonl", DecodingParams(max_new_tokens=8))
    dropped = lines(tmp_path / "a.dropped.jsonl")
    assert [each["reason"] for each in dropped] == ["unfinished"] * len(QUESTIONS)
    assert not any("trajectory" in each for each in dropped)


def test_other_objectives_read_the_same_examples(llm: LLM, tmp_path: Path) -> None:
    params = DecodingParams(max_new_tokens=256)
    examples = []
    for name, records in (("a", True), ("b", False)):
        answer(llm, tmp_path / f"{name}.jsonl", params, records=records)
        conversations = list(read_conversations(tmp_path / f"{name}.jsonl"))
        examples.append(
            encode_dataset(conversations, llm.tokenizer, llm.checkpoint.special_ids, max_length=512)
        )
    for one, other in zip(*examples, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert one["response_ids"] == other["response_ids"]
        assert read_trajectory(one["trajectory"]) is not None
        assert other["trajectory"] is None


# --- what is recorded -----------------------------------------------------------------------------


def event(kind: Any, position: int, step: int, tokens: list[int]) -> StreamEvent:
    masked = tuple(token < 0 for token in tokens)
    return StreamEvent(kind, "", tuple(tokens), masked, position=position, step=step)


def test_a_position_lists_what_came_to_stand_there() -> None:
    recorder = Recorder(prompt_tokens=2, block_length=4)
    recorder.see(event("provisional", 0, 1, [7, -1]))
    recorder.see(event("provisional", 0, 2, [8, 5]))
    recorder.see(event("provisional", 2, 1, [-1, -1, 9, -1]))  # the next block is open, too
    recorder.see(event("committed", 0, 3, [8, 5]))
    recorder.see(event("provisional", 2, 2, [3, -1, -1, -1]))  # one is masked again
    recorder.see(event("committed", 2, 3, [3, 4, 9, 1]))
    recorder.see(event("provisional", 6, 1, [2, 2, 2, 2]))  # never finished
    assert recorder.trajectory() == {
        "prompt_tokens": 2,
        "block_length": 4,
        "writes": [[1, 7, 2, 8], [2, 5], [2, 3], [3, 4], [1, 9, 2, REMASKED, 3, 9], [3, 1]],
    }


@pytest.mark.parametrize(
    "value",
    [
        None,
        "a text",
        [1, 2],
        {},
        {"prompt_tokens": 2, "block_length": 4},
        {"prompt_tokens": -1, "block_length": 4, "writes": [[1, 2]]},
        {"prompt_tokens": 2, "block_length": 0, "writes": [[1, 2]]},
        {"prompt_tokens": True, "block_length": 4, "writes": [[1, 2]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": []},
        {"prompt_tokens": 2, "block_length": 4, "writes": "12"},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[1, 2], []]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[1]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[0, 2]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[2, 2, 1, 3]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[1, REMASKED]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[1, 2, 2, REMASKED]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[1, 2.5]]},
        {"prompt_tokens": 2, "block_length": 4, "writes": [[1, 2**40]]},
    ],
)
def test_what_is_no_trajectory_counts_as_none(value: Any) -> None:
    assert read_trajectory(json.dumps(value)) is None
    assert read_trajectory("{" + json.dumps(value)) is None


def test_a_trajectory_is_read_back() -> None:
    value = {"prompt_tokens": 2, "block_length": 4, "writes": [[1, 7, 2, REMASKED, 3, 8]]}
    assert read_trajectory(json.dumps(value)) == value


# --- who cannot tell ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [["--endpoint", "http://localhost:9/v1"], ["--ray"], ["--ray-address", "auto"]],
    ids=lambda other: other[0],
)
def test_who_cannot_tell_is_refused(tmp_path: Path, other: list[str]) -> None:
    output = tmp_path / "a.jsonl"
    result = CliRunner().invoke(app, ["distill", "--trajectories", *other, "-o", str(output)])
    assert isinstance(result.exception, SystemExit | InputError)
    said = result.output + str(result.exception)
    assert f"`--trajectories` does not go with {other[0]}: only a model in this process" in said
    assert not output.exists()
