"""Distillation: what is kept, what is set apart, and what an interrupted run goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_llm import folder_fixture, llm_fixture  # noqa: F401  (fixtures)

from dmax import LLM, DecodingParams, GenerationOutput, InputError
from dmax.engine.request import Request
from dmax.outputs import Cost
from dmax.recipe import distill as distillation
from dmax.recipe.distill import DistillReport, check_files, check_outputs, distill, read_prompts
from dmax.records.sources import read_conversations
from dmax.special_ids import SpecialIds

PARAMS = DecodingParams(strategy="threshold", threshold=0.3, max_new_tokens=16)
PROMPTS = ["one", "two", "endless three", "four", "silent five", "six für ☃", "seven"]


class Weight(torch.nn.Module):
    """What a model is known by."""

    dtype = torch.float32

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([weight]))


class Responder:
    """Answers in place of a model and its engine; dies before step number `dies_at`.

    A response takes as many steps as its prompt has letters.
    """

    tokenizer = None
    checkpoint = SimpleNamespace(special_ids=SpecialIds(1, (2,), 2, 8))

    def __init__(
        self, dies_at: int | None = None, max_batch_size: int = 64, weight: float = 1.0
    ) -> None:
        self.options = SimpleNamespace(max_batch_size=max_batch_size)
        self.model = Weight(weight)
        self.dies_at = dies_at
        self.asked: list[str] = []
        self.batches: list[int] = []  # how many prompts each step had
        self.left: dict[int, int] = {}

    def encode(self, messages: Any) -> tuple[int, ...]:
        ((role, content),) = [(message["role"], message["content"]) for message in messages]
        assert role == "user"
        return tuple(content.encode())

    def resolve(self, params: DecodingParams) -> DecodingParams:
        return params

    def request(self, index: int, messages: Any, params: DecodingParams) -> Request:
        return Request(index, self.encode(messages), params)

    def engine(self, block_length: int | None, max_batch_size: int) -> Responder:
        assert block_length is None
        self.capacity = 0
        return self

    def add(self, request: Request) -> None:
        assert not self.capacity or len(request.prompt_ids) <= self.capacity  # memory is planned
        self.capacity = self.capacity or len(request.prompt_ids)
        self.asked.append(bytes(request.prompt_ids).decode())
        self.left[request.index] = len(request.prompt_ids)

    def is_busy(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append(len(self.left))
        self.left = {index: left - 1 for index, left in self.left.items()}
        finished = [index for index, left in self.left.items() if not left]
        for index in finished:
            del self.left[index]
        return [SimpleNamespace(kind="finished", index=index) for index in finished]

    def output(self, request: Request, event: Any) -> GenerationOutput:
        text = bytes(request.prompt_ids).decode()
        reason: Any = "length" if "endless" in text else "stop"
        response = " \n" if "silent" in text else f"answer to {text}"
        return GenerationOutput(response, (1, 2), (1,), reason, Cost(num_forwards=1))


def run(
    output: Path,
    responder: Responder,
    prompts: Sequence[str] = PROMPTS,
    params: DecodingParams = PARAMS,
    **options: Any,
) -> DistillReport:
    return distill(responder, prompts, output, params, **options)  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "responses.jsonl"


def by_index(path: Path) -> list[dict[str, Any]]:
    return sorted(lines(path), key=lambda record: record["index"])


def test_a22_finished_responses_are_kept_unfiltered_and_the_others_set_apart(output: Path) -> None:
    told: list[tuple[int, int]] = []
    report = run(output, Responder(), progress=lambda done, total: told.append((done, total)))
    assert report == DistillReport(prompts=7, kept=5, unfinished=2)
    assert told == [(done, 7) for done in range(1, 8)]
    assert [record["index"] for record in by_index(output)] == [0, 1, 3, 5, 6]
    assert by_index(output)[3] == {
        "index": 5,
        "prompt": "six für ☃",
        "response": "answer to six für ☃",
    }
    apart = by_index(output.with_suffix(".unfinished.jsonl"))
    assert [record["prompt"] for record in apart] == ["endless three", "silent five"]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_stays_full_until_no_prompt_is_left(output: Path, batch_size: int) -> None:
    prompts = [f"{'a' * (1 + index % 7)} {index}" for index in range(150)]
    responder = Responder(max_batch_size=batch_size)
    assert run(output, responder, prompts).kept == 150
    num_last = responder.batches.count(batch_size)
    assert responder.batches[:num_last] == [batch_size] * num_last
    longest = max(len(prompt) for prompt in prompts)
    assert len(responder.batches) - num_last <= longest


def test_a_response_is_written_when_it_is_finished(output: Path) -> None:
    seen: list[int] = []
    run(
        output,
        Responder(),
        ["long prompt", "p"],
        progress=lambda *_: seen.append(len(lines(output))),
    )
    assert seen == [1, 2]
    assert [record["index"] for record in lines(output)] == [1, 0]


def test_training_reads_what_distillation_writes(output: Path) -> None:
    run(output, Responder())
    kept = [prompt for prompt in PROMPTS if "endless" not in prompt and "silent" not in prompt]
    expected = [([{"role": "user", "content": prompt}], f"answer to {prompt}") for prompt in kept]
    learnt = sorted([record[:2] for record in read_conversations(output)], key=expected.index)
    assert learnt == expected


@pytest.mark.parametrize("dies_at", [0, 4, 10, 14])
def test_an_interrupted_run_goes_on_where_it_stopped(
    output: Path, tmp_path: Path, dies_at: int
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(whole, Responder(max_batch_size=2))
    with pytest.raises(KeyboardInterrupt):
        run(output, Responder(dies_at, max_batch_size=2))
    apart = output.with_suffix(".unfinished.jsonl")
    files = [file for file in (output, apart) if file.exists()]
    done = {record["prompt"] for file in files for record in lines(file)}
    second = Responder(max_batch_size=2)
    assert run(output, second) == DistillReport(7, 5, 2)
    assert sorted(second.asked) == sorted(set(PROMPTS) - done)
    for suffix in (".jsonl", ".unfinished.jsonl"):
        assert by_index(output.with_suffix(suffix)) == by_index(whole.with_suffix(suffix))


@pytest.mark.parametrize("suffix", [".jsonl", ".unfinished.jsonl"])
def test_a_run_goes_on_from_any_prefix(output: Path, suffix: str) -> None:
    run(output, Responder())
    file = output.with_suffix(suffix)
    whole = by_index(file)
    data = file.read_bytes()
    # Less than the beginning that all lines share does not say whose the file is.
    for end in range(len(b'{"index": '), len(data)):
        file.write_bytes(data[:end])
        assert run(output, Responder()) == DistillReport(7, 5, 2)
        assert by_index(file) == whole


def test_a_line_cut_off_is_answered_again(output: Path) -> None:
    run(output, Responder())
    text = output.read_text(encoding="utf-8")
    output.write_text(text[:-9], encoding="utf-8")
    again = Responder()
    assert run(output, again) == DistillReport(7, 5, 2)
    assert again.asked == [lines(output)[-1]["prompt"]]
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
    read = [record.messages[0]["content"] for record in read_conversations(output)]
    assert sorted(read) == sorted(prompts)


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
    assert sorted(more.asked) == sorted(PROMPTS[4:])
    before = output.read_bytes()
    for others in (PROMPTS[:3], ["one", "other", *PROMPTS[2:]]):
        with pytest.raises(InputError, match=r"responses.jsonl:\d answers another prompt"):
            run(output, Responder(), others)
    assert output.read_bytes() == before


FOREIGN = (
    "nonsense",
    "[1]",
    "{}",
    "{",
    '{"index": -1, "prompt": "seven"}',
    '{"index": 1, "prompt": "one"}',
    '{"index": 1, "prompt": "tw0',
)


@pytest.mark.parametrize("suffix", [".jsonl", ".unfinished.jsonl"])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("line", FOREIGN)
def test_a_file_of_something_else_is_left_alone(
    output: Path, line: str, end: str, suffix: str
) -> None:
    file = output.with_suffix(suffix)
    file.parent.mkdir()
    file.write_text(line + end)
    manifest(output).write_text("{}")
    with pytest.raises(InputError, match=f"responses{suffix}:1 "):
        run(output, Responder())
    assert file.read_text() == line + end


def test_words_after_our_lines_are_left_alone(output: Path) -> None:
    run(output, Responder(), PROMPTS[:2])
    text = output.read_text() + "to do: read these"
    output.write_text(text)
    with pytest.raises(InputError, match=r"responses.jsonl:3 is no response"):
        run(output, Responder())
    assert output.read_text() == text


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file" / "responses.jsonl", Responder())


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path / "folder", Path(), Path("/")):
        with pytest.raises(InputError, match="cannot write .*: it is a folder"):
            run(folder, Responder())


def test_a_model_answers_as_it_generates(llm: LLM, output: Path) -> None:
    prompts = ["Tom has 3 apples.", "Hi"]
    report = distill(llm, prompts, output, PARAMS)
    outputs = llm.generate(prompts, PARAMS)
    assert (report.kept, report.unfinished) == (0, 2)  # a random model does not find an end
    apart = by_index(output.with_suffix(".unfinished.jsonl"))
    assert [record["response"] for record in apart] == [result.text for result in outputs]


# ---- what an earlier run depends on --------------------------------------------------------------


def manifest(output: Path) -> Path:
    return output.with_suffix(".manifest.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responder": Responder(weight=2.0)}, r"`weights` was '\w{16}' and is '\w{16}'"),
        (
            {"params": replace(PARAMS, threshold=0.4)},
            r"`params.threshold` was 0.3 and is 0.4, `decoding` was .* and is .*",
        ),
        ({"params": replace(PARAMS, strategy="llada", threshold=None)}, "`params.strategy` was"),
        ({"params": replace(PARAMS, max_new_tokens=17)}, "`params.max_new_tokens` was 16 and is"),
    ],
)
@pytest.mark.parametrize("has_unfinished_only", [False, True])
def test_a_run_goes_on_with_the_same_model_and_settings_only(
    output: Path, change: dict[str, Any], message: str, has_unfinished_only: bool
) -> None:
    first = ["silent one"] if has_unfinished_only else PROMPTS[:2]
    prompts = first + PROMPTS[2:]
    run(output, Responder(), first)
    before = {file: file.read_bytes() for file in output.parent.iterdir()}
    changed = {"responder": Responder()} | change
    with pytest.raises(InputError, match=f"are of another run: {message}") as caught:
        run(output, prompts=prompts, **changed)
    assert "\n" not in caught.value.message
    assert changed["responder"].asked == []
    assert {file: file.read_bytes() for file in output.parent.iterdir()} == before
    assert run(output, Responder(max_batch_size=2), prompts).prompts == len(prompts)


def test_a_run_goes_on_with_the_same_version_only(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(output, Responder(), PROMPTS[:2])
    monkeypatch.setattr(distillation, "__version__", "9.9")
    with pytest.raises(InputError, match=r"another run: `dmax` was '.*' and is '9\.9'"):
        run(output, Responder())


def test_responses_that_nothing_speaks_of_are_left_alone(output: Path) -> None:
    run(output, Responder(), PROMPTS[:2])
    manifest(output).unlink()
    with pytest.raises(InputError, match=r"responses\.manifest\.json is missing"):
        check_outputs(output, PROMPTS)  # before a model is loaded
    with pytest.raises(InputError, match="or move the earlier one away"):
        run(output, Responder())
    assert len(lines(output)) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_none(output: Path, content: str) -> None:
    run(output, Responder(), PROMPTS[:2])
    manifest(output).write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match="is not the manifest of a distillation"):
        run(output, Responder())


def test_a_run_killed_before_its_first_response_may_begin_otherwise(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(output, Responder(dies_at=0))
    assert not output.parent.exists() or not list(output.parent.iterdir())
    output.parent.mkdir(exist_ok=True)
    manifest(output).write_text('{"weights": "others"}')
    assert run(output, Responder()) == DistillReport(7, 5, 2)
    assert json.loads(manifest(output).read_text())["params"]["threshold"] == 0.3


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full"])
def test_a_device_is_no_output(path: str) -> None:
    with pytest.raises(InputError, match=f"cannot write {path}"):
        run(Path(path), Responder())


def test_files_are_looked_at_before_there_are_prompts(output: Path) -> None:
    check_files(output)
    assert not output.parent.exists()
    run(output, Responder(), PROMPTS[:2])
    check_files(output)
    manifest(output).unlink()
    with pytest.raises(InputError, match="manifest.json is missing"):
        check_files(output)
    output.write_text("a diary")
    with pytest.raises(InputError, match="responses.jsonl:1 is no response to a prompt"):
        check_files(output)


def test_a_model_knows_its_own_responses(llm: LLM, output: Path) -> None:
    distill(llm, PROMPTS[:1], output, PARAMS)
    told = json.loads(manifest(output).read_text())
    llm.generate("Tom", PARAMS)
    assert distill(llm, PROMPTS[:2], output, PARAMS).prompts == 2
    assert json.loads(manifest(output).read_text()) == told
    template, llm.tokenizer.chat_template = llm.tokenizer.chat_template, "{{ messages }}"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="of another run: `tokenizer` was"):
        distill(llm, PROMPTS, output, PARAMS)
    llm.tokenizer.chat_template = template  # type: ignore[union-attr]


# ---- prompts -------------------------------------------------------------------------------------


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
        (b"[" * 100_000 + b"\n", r"prompts.jsonl:1: not a JSON object"),
        (b"[1]\n", r"prompts.jsonl:1: no `prompt`"),
        (b'{"prompt": " "}\n', r"prompts.jsonl:1: no `prompt`"),
        (b'{"prompt": 3}\n', r"prompts.jsonl:1: no `prompt`"),
        (b'{"prompt": "\\ud800"}\n', r"prompts.jsonl:1: .* half of a surrogate pair"),
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
