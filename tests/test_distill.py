"""Distillation: what is kept and what is set apart, and going on after an interruption as if there had been none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_llm import folder_fixture, llm_fixture  # noqa: F401  (fixtures)

from dmax import LLM, DecodingParams, GenerationOutput, InputError
from dmax.recipe.distill import DistillReport, distill, read_prompts
from dmax.training.data import read_records

PARAMS = DecodingParams(strategy="threshold", threshold=0.3, max_new_tokens=16)
PROMPTS = ["one", "two", "endless three", "four", "silent five", "six für ☃", "seven"]


class Responder:
    """Answers in place of a model; dies before chunk number `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.chunks, self.dies_at = 0, dies_at

    def generate(self, prompts: Sequence[Any], params: DecodingParams) -> list[GenerationOutput]:
        if self.chunks == self.dies_at:
            raise KeyboardInterrupt
        self.chunks += 1
        assert params is PARAMS
        texts = [message["content"] for (message,) in prompts]
        assert all(message["role"] == "user" for (message,) in prompts)
        self.asked += texts
        return [self.answer(text) for text in texts]

    def answer(self, text: str) -> GenerationOutput:
        reason: Any = "length" if "endless" in text else "stop"
        response = " \n" if "silent" in text else f"answer to {text}"
        return GenerationOutput(response, (1, 2), (1,), reason, 1, 0, 0)


def run(
    output: Path, responder: Responder, prompts: Sequence[str] = PROMPTS, **options: Any
) -> DistillReport:
    return distill(responder, prompts, output, PARAMS, **options)  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "responses.jsonl"


def test_a22_finished_responses_are_kept_unfiltered_and_the_others_set_apart(output: Path) -> None:
    told: list[tuple[int, int]] = []
    report = run(
        output, Responder(), chunk=3, progress=lambda done, total: told.append((done, total))
    )
    assert report == DistillReport(prompts=7, kept=5, unfinished=2)
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert [record["index"] for record in lines(output)] == [0, 1, 3, 5, 6]
    assert lines(output)[3] == {
        "index": 5,
        "prompt": "six für ☃",
        "response": "answer to six für ☃",
    }
    apart = lines(output.with_suffix(".unfinished.jsonl"))
    assert [record["prompt"] for record in apart] == ["endless three", "silent five"]


def test_training_reads_what_distillation_writes(output: Path) -> None:
    run(output, Responder())
    kept = [prompt for prompt in PROMPTS if "endless" not in prompt and "silent" not in prompt]
    expected = [([{"role": "user", "content": prompt}], f"answer to {prompt}") for prompt in kept]
    assert [record[:2] for record in read_records(output)] == expected


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_an_interrupted_run_goes_on_where_it_stopped(
    output: Path, tmp_path: Path, dies_at: int
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(whole, Responder(), chunk=3)
    with pytest.raises(KeyboardInterrupt):
        run(output, Responder(dies_at), chunk=3)
    second = Responder()
    assert run(output, second, chunk=3) == DistillReport(7, 5, 2)
    assert second.asked == PROMPTS[3 * dies_at :]
    for suffix in (".jsonl", ".unfinished.jsonl"):
        assert output.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()


def test_a_line_cut_off_is_answered_again(output: Path) -> None:
    run(output, Responder())
    text = output.read_text(encoding="utf-8")
    output.write_text(text[:-9], encoding="utf-8")
    again = Responder()
    assert run(output, again) == DistillReport(7, 5, 2)
    assert again.asked == ["seven"]
    assert output.read_text(encoding="utf-8") == text


def test_a_line_cut_off_inside_a_letter_is_answered_again(output: Path) -> None:
    run(output, Responder(), PROMPTS[:6])
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.rindex("☃".encode()) + 1])
    again = Responder()
    run(output, again, PROMPTS[:6])
    assert again.asked == ["six für ☃"]
    assert output.read_bytes() == whole


def test_separators_of_lines_inside_a_response_are_no_ends_of_records(output: Path) -> None:
    prompts = ["first\u2028second", "next\x85line"]
    run(output, Responder(), prompts)
    again = Responder()
    assert run(output, again, prompts).kept == 2
    assert again.asked == []
    assert [record.messages[0]["content"] for record in read_records(output)] == prompts


def test_a_finished_run_asks_nothing(output: Path) -> None:
    run(output, Responder())
    before = output.read_bytes()
    again = Responder()
    assert run(output, again) == DistillReport(7, 5, 2)
    assert again.asked == []
    assert output.read_bytes() == before


def test_more_prompts_continue_a_file_and_other_prompts_do_not(output: Path) -> None:
    run(output, Responder(), PROMPTS[:4])
    more = Responder()
    assert run(output, more) == DistillReport(7, 5, 2)
    assert more.asked == PROMPTS[4:]
    before = output.read_bytes()
    for others in (PROMPTS[:3], ["one", "other", *PROMPTS[2:]]):
        with pytest.raises(InputError, match=r"responses.jsonl:\d answers another prompt"):
            run(output, Responder(), others)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", "{}", '{"index": 1, "prompt": "one"}'],
)
def test_a_file_of_something_else_is_refused(output: Path, line: str) -> None:
    output.parent.mkdir()
    output.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"responses.jsonl:1"):
        run(output, Responder())
    assert output.read_text() == f"{line}\n"


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file" / "responses.jsonl", Responder())


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "folder", Responder())


def test_a_model_answers_as_it_generates(llm: LLM, output: Path) -> None:
    prompts = ["Tom has 3 apples.", "Hi"]
    report = distill(llm, prompts, output, PARAMS)
    outputs = llm.generate(prompts, PARAMS)
    assert (report.kept, report.unfinished) == (0, 2)  # a random model does not find an end
    apart = lines(output.with_suffix(".unfinished.jsonl"))
    assert [record["response"] for record in apart] == [result.text for result in outputs]


# ---- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_read_by_either_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n{"question": "b", "answer": "c"}\n{"prompt": "ü\u2028"}\n',
        encoding="utf-8",
    )
    assert read_prompts(path) == ["a", "b", "ü\u2028"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"prompt": "a"}\nnonsense\n', r"prompts.jsonl:2: not a JSON object"),
        (b"[1]\n", r"prompts.jsonl:1: no `prompt`"),
        (b'{"prompt": " "}\n', r"prompts.jsonl:1: no `prompt`"),
        (b'{"prompt": 3}\n', r"prompts.jsonl:1: no `prompt`"),
        (b"\xff\xfe\n", "prompts.jsonl"),
    ],
)
def test_bad_prompts_are_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_missing_prompts_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.jsonl` is not a file"):
        read_prompts(tmp_path / "nowhere.jsonl")
