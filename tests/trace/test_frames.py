"""Frames: every forward of a request as traces and streams tell it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from dmax import LLM, DecodingParams
from dmax.trace.frames import FORMAT, VERSION, Frame, Frames

QUESTION = (
    "Jack starts the week with 8 mugs. Later Jack hands 2 mugs to a teacher. Jack throws away 4 "
    "broken mugs. How many mugs does Jack end up with?"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", dtype="float32")


def frames_of(llm: LLM, params: DecodingParams) -> tuple[Frames, list[Frame], dict[str, Any]]:
    """What a run looks like, with a clock that ticks once a look."""
    ticks = count()
    request = llm.request(0, QUESTION, params)
    frames = Frames(llm, request, clock=lambda: float(next(ticks)))
    found = []
    with llm.submit([replace(request, provisional=True)]) as call:
        for event in call:
            if event.kind == "finished":
                return frames, found, frames.output(llm.output(request, event))
            found.append(frames.frame(event))
    raise AssertionError("the last event is finished")


def test_the_texts_of_the_last_frames_are_the_answer(llm: LLM) -> None:
    _, frames, output = frames_of(llm, DecodingParams())
    settled = [frame for frame in frames if frame.kind == "committed"]
    assert "".join(text for frame in settled for text in frame.texts) == output["text"]
    tokens = [token for frame in settled for token in frame.token_ids]
    assert tokens[: len(output["token_ids"])] == list(output["token_ids"])
    assert [frame.position for frame in settled] == [
        sum(len(before.token_ids) for before in settled[:index]) for index in range(len(settled))
    ]


def test_every_forward_is_a_frame(llm: LLM) -> None:
    _, frames, output = frames_of(llm, DecodingParams())
    assert [frame.num_forwards for frame in frames] == list(range(1, output["num_forwards"] + 1))
    assert [frame.seconds for frame in frames] == list(range(1, len(frames) + 1))
    [whole] = llm.generate(QUESTION)
    assert tuple(output["token_ids"]) == whole.token_ids  # watching changes no token
    assert output["num_forwards"] == whole.num_forwards
    assert output["tokens_per_forward"] == whole.tokens_per_forward


def test_masked_positions_have_no_text_and_written_ones_are_decoded(llm: LLM) -> None:
    _, frames, _ = frames_of(llm, DecodingParams())
    mask = llm.checkpoint.special_ids.mask_token_id
    for frame in frames:
        for token, text, masked, written in zip(
            frame.token_ids, frame.texts, frame.masked, frame.written, strict=True
        ):
            assert masked == (token == mask)
            assert not (masked and (text or written))


def test_candidates_are_there_where_the_strategy_blends_several(llm: LLM) -> None:
    _, (one, *_), _ = frames_of(llm, DecodingParams())
    assert "candidates" not in one.as_record()
    _, (two, *_), _ = frames_of(llm, DecodingParams(top_k=2))
    [first, *_] = two.as_record()["candidates"]
    assert [len(candidate) for candidate in first] == [3, 3]
    assert first[0][2] == two.texts[0]


def test_a_run_is_json(llm: LLM) -> None:
    params = DecodingParams(stop=("####",), options={"soft_inputs": False})
    frames, found, output = frames_of(llm, params)
    header = json.loads(json.dumps(frames.header("tiny-dmax", QUESTION)))
    assert (header["format"], header["version"]) == (FORMAT, VERSION)
    assert (header["model"], header["prompt"]) == ("tiny-dmax", QUESTION)
    assert header["params"]["strategy"] == "spd"
    assert header["params"]["stop"] == ["####"]
    assert header["params"]["options"] == {"soft_inputs": False}
    assert (header["threshold"], header["stop_confidence"]) == (0.5, 0.9)
    assert header["block_length"] == 32
    assert json.loads(json.dumps([frame.as_record() for frame in found]))
    assert json.loads(json.dumps(output))["finish_reason"] == "stop"
